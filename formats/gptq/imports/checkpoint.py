"""Takes over a GPTQ checkpoint that another program made: the same integers, scales and floats.

Two layouts are read. One is GPTQ's own (AutoGPTQ, GPTQModel, Qwen's published GPTQ models, ours).
The other is `pack-quantized` of compressed-tensors, in which llm-compressor exports its GPTQ
results:

    X.weight_packed      int32 [N, ⌈K·bits/32⌉]   codes, one stream of bits along K
    X.weight_scale       float [N, G]
    X.weight_zero_point  int32 [⌈N·bits/32⌉, G]   packed along N; absent where symmetric
    X.weight_g_idx       int32 [K]                only with actorder "group"
    X.weight_shape       int   [2]

What no artifact can hold without loss is refused with the reason.
"""

from __future__ import annotations

import logging
import shutil
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vlmq_export._version import __version__
from vlmq_export.errors import CheckpointError
from vlmq_export.formats.gptq.imports.scheme import PARTS, quantization_of, scheme_of
from vlmq_export.formats.gptq.read import unpack
from vlmq_export.quantizer.artifact.manifest import SCHEMA, Manifest, ModuleRecord
from vlmq_export.quantizer.artifact.write import write_floats, write_layer, write_manifest
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.linears import QuantizedLinear
from vlmq_export.quantizer.grids.solutions import Solution
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import parameter_shapes
from vlmq_export.quantizer.storage.tensors import TensorInfo
from vlmq_export.quantizer.storage.whole_files import write_json

log = logging.getLogger("vlmq_export")
# What a linear has in the file, decoded: codes uint8 [N, K], zero-points int16 [N, G], and scales
# in their stored dtype [N, G].
_Stored = tuple[np.ndarray, np.ndarray, torch.Tensor]


class GptqCheckpoint(Checkpoint):
    """A quantized folder that shows itself as its float model.

    Every quantized linear has one tensor X.weight of its true shape, in place of its packed parts.
    Raises CheckpointError for what cannot become an artifact without loss.
    """

    def __init__(self, path: Path):
        quantization = quantization_of(Path(path))
        if quantization is None:
            raise CheckpointError(f"{path}: no quantization_config; this is a float checkpoint")
        self.scheme = scheme_of(quantization, Path(path))
        super().__init__(path)
        # GPTQModel adds rope settings at the top level that are not the model's. Those of the
        # language model are in text_config.
        added = {"rope_parameters"} if "text_config" in self.config else set()
        strange = {"quantization_config"} | added
        self.config = {k: v for k, v in self.config.items() if k not in strange}
        self.family = self.architecture.family
        self.linears = self.architecture.linears
        self.packed: dict[str, TensorInfo] = {}  # parts of linears, by their names in the file
        self.dropped: list[str] = []  # biases of zeros that the model does not have
        expected = parameter_shapes(self)
        self._refuse_other_linears()
        for name in self.linears:
            self._replace_parts(name, expected)
        self._refuse_other_tensors(expected)

    def _refuse_quantized(self) -> None:
        """Nothing is refused: a quantized model is what this class reads."""

    def info(self, name: str) -> TensorInfo:
        """Shape and dtype of a tensor of the float model, or of a packed part."""
        return self.packed.get(name) or super().info(name)

    def _refuse_other_linears(self) -> None:
        """Raises CheckpointError unless the decoder's linears are quantized, and nothing else."""
        lead = f".{PARTS[self.scheme.layout][0]}"
        quantized = {n.removesuffix(lead) for n in self.tensors if n.endswith(lead)}
        if left := [n for n in self.linears if n not in quantized]:
            raise self._refusal(
                f"{left[0]} is not quantized ({len(left)} of {len(self.linears)}),"
                " an artifact has all or none"
            )
        if more := sorted(quantized - set(self.linears)):
            raise self._refusal(
                f"{more[0]} is quantized ({len(more)} outside the decoder),"
                " an artifact keeps it in float"
            )

    def _replace_parts(self, name: str, expected: dict[str, tuple[int, ...]]) -> None:
        """Put X.weight in place of the packed parts of the linear X.

        A bias that the model does not have is dropped if it is zero. Raises CheckpointError if it
        is not.
        """
        parts = PARTS[self.scheme.layout]
        for part in parts:
            if info := self.tensors.pop(f"{name}.{part}", None):
                self.packed[info.name] = info
        weight, bias = f"{name}.weight", f"{name}.bias"
        file = self.packed[f"{name}.{parts[0]}"].file
        self.tensors[weight] = TensorInfo(weight, expected[weight], "F16", file)
        if bias in self.tensors and bias not in expected:
            if bool(self.tensor(bias).any()):
                raise self._refusal(f"{bias} is not zero, and the model has no such bias")
            self.dropped.append(bias)
            del self.tensors[bias]

    def _refuse_other_tensors(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises CheckpointError for tensors and shapes that config.json does not ask for.

        A tied output matrix may be stored or not.
        """
        more = {n for n in self.tensors if n not in expected}
        more = {n for n in more if self.family.module_name(n) != "lm_head.weight"}
        wrong = sorted(more | {n for n in expected if n not in self.tensors})
        if wrong:
            which = "is missing" if wrong[0] in expected else "is not of this model"
            raise self._refusal(
                f"tensor {wrong[0]} {which} ({len(wrong)} in all)", "copy the folder again"
            )
        for name, shape in expected.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                raise self._refusal(
                    f"{name} has shape {self.tensors[name].shape}, the model has {shape}"
                )

    def _refusal(self, why: str, do: str = "give the original float checkpoint") -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}; {do}")

    @cached_property
    def quant_config(self) -> QuantConfig:
        """The recipe as far as the files tell.

        Grid and order of the columns are exact. The rest is what the maker states, or a default.
        """
        scheme, stated = self.scheme, self.scheme.meta
        if any(not _natural(self._g_idx(name)) for name in self.linears):
            order = "dynamic"
        elif stated.get("static_groups"):
            order = "static"
        else:
            order = "gar" if stated.get("act_group_aware") else "off"
        method, damp = str(stated.get("method", "gptq")), stated.get("damp_percent")
        return QuantConfig(
            method=method if method in METHODS else "gptq",
            bits=scheme.bits,
            group_size=scheme.group_size,
            symmetric=scheme.symmetric,
            act_order=order,
            damp=damp if isinstance(damp, float) else QuantConfig.damp,
        )

    def linear(self, name: str) -> QuantizedLinear:
        """The integers of one linear.

        Raises CheckpointError for what no artifact can hold without loss.
        """
        n, k = self.tensors[f"{name}.weight"].shape
        size = self._group_columns(k)
        if k % size:
            raise self._refusal(
                f"group_size {size} does not divide the {k} inputs of {name}",
                "correct quantization_config",
            )
        groups = k // size
        read = self._gptq_parts if self.scheme.layout == "gptq" else self._packed_parts
        codes, zeros, scales = read(name, n, k, groups)
        if codes.shape != (n, k) or zeros.shape != (n, groups) or scales.shape != (n, groups):
            raise self._refusal(
                f"the parts of {name} do not fit its shape {n}×{k}", "copy the folder again"
            )
        self._refuse_zero_points(name, zeros)
        half = scales.half()
        if not torch.equal(half.float(), scales.float()):
            raise self._refusal(f"{name} has scales that float16 cannot hold")
        solution = Solution(
            torch.from_numpy(np.ascontiguousarray(codes)),
            half.contiguous(),
            torch.from_numpy(np.ascontiguousarray(zeros.astype(np.uint8))),
            self._g_idx(name),
        )
        s = self.scheme
        bias = self._bias(name)
        return QuantizedLinear(name, solution, bias, s.bits, s.group_size, s.symmetric)

    def _refuse_zero_points(self, name: str, zeros: np.ndarray) -> None:
        """Raises CheckpointError for zero-points [N, G] that readers decode differently."""
        bits = self.scheme.bits
        top, middle = 2**bits - 1, 2 ** (bits - 1)
        if over := int((zeros > top).sum()):
            raise self._refusal(
                f"{name} has {over} zero-points that GPTQ v1 cannot express (stored as −1),"
                " and each reader decodes them otherwise",
                "save it as gptq_v2",
            )
        if self.scheme.symmetric and (zeros != middle).any():
            raise self._refusal(
                f"{name}: sym is true but zero-points are {int(zeros.min())} to {int(zeros.max())},"
                f" not {middle}; v1 and v2 may be confused",
                "correct checkpoint_format or sym",
            )

    def _group_columns(self, columns: int) -> int:
        """The number of columns that share one scale."""
        return columns if self.scheme.group_size == -1 else self.scheme.group_size

    def _gptq_parts(self, name: str, n: int, k: int, groups: int) -> _Stored:
        """What a linear has in GPTQ's own layout."""
        bits = self.scheme.bits
        qweight = self._words(name, "qweight", (k * bits // 32, n))
        qzeros = self._words(name, "qzeros", (groups, n * bits // 32))
        stored = unpack(np.ascontiguousarray(qzeros.T), bits)
        zeros = stored.astype(np.int16) + self.scheme.zero_offset
        return unpack(qweight, bits).T, zeros, self.tensor(f"{name}.scales").T

    def _packed_parts(self, name: str, n: int, k: int, groups: int) -> _Stored:
        """What a linear has in the layout of compressed-tensors."""
        bits = self.scheme.bits
        rows = self._words(name, "weight_packed", (n, -(-k * bits // 32)))
        codes = _stream(rows.T, bits, k).T
        scales = self.tensor(f"{name}.weight_scale")
        if self.scheme.symmetric:
            zeros = np.full((n, groups), 2 ** (bits - 1), np.int16)
        else:
            words = self._words(name, "weight_zero_point", (-(-n * bits // 32), groups))
            zeros = _stream(words, bits, n).astype(np.int16)
        return codes, zeros, scales

    def _words(self, name: str, part: str, shape: tuple[int, int]) -> np.ndarray:
        """The int32 words of a packed part. Raises CheckpointError unless they have this shape."""
        value = self.tensor(f"{name}.{part}")
        if tuple(value.shape) != shape or value.dtype != torch.int32:
            raise self._refusal(
                f"{name}.{part} is {value.dtype} {tuple(value.shape)},"
                f" its grid asks for int32 {shape}",
                "copy the folder again",
            )
        return value.numpy()

    def _g_idx(self, name: str) -> torch.Tensor:
        """The group of each input column, int32 [K].

        Raises CheckpointError where groups differ in size.
        """
        k = self.tensors[f"{name}.weight"].shape[1]
        size = self._group_columns(k)
        names = [f"{name}.{part}" for part in ("g_idx", "weight_g_idx")]
        stored = next((n for n in names if n in self.packed), None)
        if stored is None:
            return torch.arange(k, dtype=torch.int32) // size
        g_idx = self.tensor(stored).int()
        even = (
            g_idx.shape == (k,) and int(g_idx.min()) >= 0 and bool((g_idx.bincount() == size).all())
        )
        if not even or int(g_idx.max()) != k // size - 1:
            raise self._refusal(
                f"{stored} does not give each of {k // size} groups {size} columns",
                "copy the folder again",
            )
        return g_idx

    def _bias(self, name: str) -> torch.Tensor | None:
        """The bias of a linear, float16 [N], or None. A warning says where it had to be rounded."""
        if f"{name}.bias" not in self.tensors:
            return None
        bias = self.tensor(f"{name}.bias")
        if not torch.equal(bias.half().to(bias.dtype), bias):
            log.warning("%s.bias is rounded to float16, as every runtime stores it", name)
        return bias.half()


def write_artifact(
    checkpoint: GptqCheckpoint,
    folder: Path,
    name: str,
    *,
    repository: str = "",
    revision: str = "",
) -> None:
    """Write the artifact of a quantized checkpoint into an empty folder, one layer at a time.

    name, repository, revision: those of `Manifest`.
    """
    (folder / "source").mkdir(parents=True)
    for file in checkpoint.companions:
        shutil.copyfile(file, folder / "source" / file.name)
    write_json(folder / "source" / "config.json", checkpoint.written_config)
    config = checkpoint.quant_config
    taken = {f"{n}.{part}" for n in checkpoint.linears for part in ("weight", "bias")}
    write_floats(folder, checkpoint, [t for t in checkpoint.tensors if t not in taken])
    records: list[ModuleRecord] = []
    per_layer = len(checkpoint.linears) // checkpoint.architecture.layers
    for i in range(checkpoint.architecture.layers):
        names = checkpoint.linears[i * per_layer : (i + 1) * per_layer]
        linears = [checkpoint.linear(n) for n in names]
        own = [ModuleRecord.of(linear, i, {}) for linear in linears]
        write_layer(folder, i, linears, own)
        records += own
    if checkpoint.dropped:
        log.info(
            "%d biases of zeros left out, which the model does not have", len(checkpoint.dropped)
        )
    manifest = Manifest(
        SCHEMA,
        __version__,
        name,
        checkpoint.model_type,
        checkpoint.fingerprint(),
        config.to_dict(),
        {"imported": f"GPTQ checkpoint made by {checkpoint.scheme.maker}"},
        records,
        repository=repository,
        revision=revision,
    )
    write_manifest(folder, manifest)


def _stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """`count` values of int32 words [R, M] whose stream may end within a word: uint8 [count, M]."""
    words = np.pad(words, ((0, -len(words) % bits), (0, 0)))
    return unpack(words, bits)[:count]


def _natural(g_idx: torch.Tensor) -> bool:
    """Whether every group is a run of neighbouring columns."""
    return bool((g_idx[1:] >= g_idx[:-1]).all())
