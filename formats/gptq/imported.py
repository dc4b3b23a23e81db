"""A GPTQ checkpoint that others made → an artifact with the same integers, scales and floats, or a reason why not.

Two layouts are read: GPTQ's own (AutoGPTQ, GPTQModel, Qwen's published GPTQ models, ours), and the `pack-quantized` one
of compressed-tensors, which llm-compressor exports its GPTQ results in:

    X.weight_packed      int32 [N, ⌈K·bits/32⌉]   codes, one stream of bits along K
    X.weight_scale       float [N, G]
    X.weight_zero_point  int32 [⌈N·bits/32⌉, G]   packed along N; absent where symmetric
    X.weight_g_idx       int32 [K]                only with actorder "group"
    X.weight_shape       int   [2]
"""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from vlmq_export._version import __version__
from vlmq_export.errors import CheckpointError
from vlmq_export.formats.gptq.read import unpack
from vlmq_export.quantizer.artifact import (
    SCHEMA,
    Manifest,
    ModuleRecord,
    QuantizedLinear,
    write_floats,
    write_json,
    write_layer,
    write_manifest,
)
from vlmq_export.quantizer.checkpoint import Checkpoint, TensorInfo
from vlmq_export.quantizer.config import BITS, QuantConfig
from vlmq_export.quantizer.families import family_of, layer_count
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model import parameter_shapes
from vlmq_export.quantizer.untrusted import contained, read_json

log = logging.getLogger("vlmq_export")
PARTS = {
    "gptq": ("qweight", "qzeros", "scales", "g_idx"),
    "pack-quantized": ("weight_packed", "weight_scale", "weight_zero_point", "weight_g_idx", "weight_shape"),
}


@dataclass(frozen=True)
class Scheme:
    """One grid for every linear, and how it lies in the files."""

    layout: str  # a key of PARTS
    bits: int
    group_size: int  # −1: per output channel
    symmetric: bool
    zero_offset: int  # added to a stored zero-point
    meta: dict

    @property
    def maker(self) -> str:
        made = self.meta.get("quantizer", self.layout)
        return ", ".join(made) if isinstance(made, list) else str(made)


def quantization_of(folder: Path) -> dict | None:
    """The quantization_config of a model folder, or None for a float checkpoint."""
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        try:
            value = read_json(contained(folder, file)) if (folder / file).is_file() else {}
        except (CheckpointError, ValueError):
            continue  # whoever reads it for good says what is wrong with it
        value = value.get(key) if key else value
        if isinstance(value, dict) and value:
            return value
    return None


def scheme_of(q: dict, where: Path) -> Scheme:
    """Raises CheckpointError with the reason for what cannot become an artifact without loss."""

    def refuse(why: str, do: str = "give the original float checkpoint"):
        return CheckpointError(f"{where}: {why}; {do}")

    kind = str(q.get("quant_method", "gptq"))
    if kind == "compressed-tensors":
        return _pack_quantized(q, refuse)
    if kind != "gptq":
        raise refuse(f"already quantized by {kind}, and only GPTQ's integers can be taken over")
    version = str(q.get("checkpoint_format", q.get("format", "gptq")))
    if version == "marlin" or q.get("is_marlin_format"):
        raise refuse("its weights are shuffled for the Marlin kernel", "give the checkpoint before that conversion")
    if version not in ("gptq", "gptq_v2"):
        raise refuse(f"checkpoint_format {version} is not gptq or gptq_v2")
    if q.get("pack_dtype", "int32") != "int32":
        raise refuse(f"packed in {q['pack_dtype']}, GPTQ readers take int32")
    rules = q.get("dynamic") or {}
    if own := [rule for rule in rules if not str(rule).startswith("-:")] if isinstance(rules, dict) else [rules]:
        raise refuse(f"dynamic rule {own[0]} gives modules a grid of their own, an artifact has one grid")
    if q.get("lm_head"):
        raise refuse("its lm_head is quantized, an artifact keeps it in float")
    stated = {k: q[k] for k in ("damp_percent", "static_groups") if k in q}  # AutoGPTQ's place for them
    meta = stated | (q["meta"] if isinstance(q.get("meta"), dict) else {})
    offset = 1 if version == "gptq" else 0
    scheme = Scheme("gptq", q.get("bits"), q.get("group_size", -1), bool(q.get("sym", True)), offset, meta)
    return _checked(scheme, refuse)


def _pack_quantized(q: dict, refuse) -> Scheme:
    if q.get("format") != "pack-quantized":
        raise refuse(f"compressed-tensors format {q.get('format')} does not hold GPTQ's integers")
    groups = q.get("config_groups")
    groups = list(groups.values()) if isinstance(groups, dict) else []
    if len(groups) != 1 or not isinstance(groups[0], dict) or not isinstance(groups[0].get("weights"), dict):
        raise refuse(f"{len(groups)} config_groups, an artifact has one grid")
    (group,) = groups
    for other in ("input_activations", "output_activations"):
        if group.get(other):
            raise refuse(f"it quantizes {other.replace('_', ' ')} too")
    for other in ("kv_cache_scheme", "transform_config"):
        if q.get(other):
            raise refuse(f"its {other} changes what the model computes")
    w = group["weights"]
    if w.get("type", "int") != "int" or w.get("strategy") not in ("group", "channel"):
        raise refuse(f"weights of type {w.get('type')} by {w.get('strategy')}, GPTQ has integers by group or channel")
    size = w.get("group_size") if w["strategy"] == "group" else -1
    return _checked(
        Scheme("pack-quantized", w.get("num_bits"), size, bool(w.get("symmetric", True)), 0,
               {"quantizer": "compressed-tensors", "static_groups": w.get("actorder") in ("weight", "static")}),
        refuse,
    )  # fmt: skip


def _checked(scheme: Scheme, refuse) -> Scheme:
    if scheme.bits not in BITS:
        raise refuse(f"bits {scheme.bits}, and only {', '.join(map(str, BITS))} are known here")
    if type(scheme.group_size) is not int or (scheme.group_size < 1 and scheme.group_size != -1):
        raise refuse(f"group_size {scheme.group_size} is not a number of columns nor -1")
    return scheme


class GptqCheckpoint(Checkpoint):
    """A quantized folder that shows itself as its float model: every linear as one tensor X.weight of its true shape."""

    def __init__(self, path: Path):
        quantization = quantization_of(Path(path))
        if quantization is None:
            raise CheckpointError(f"{path}: no quantization_config; this is a float checkpoint")
        self.scheme = scheme_of(quantization, Path(path))
        super().__init__(path)
        # GPTQModel adds rope settings on top that are not the model's: the language model's own are in text_config.
        strange = {"quantization_config", *({"rope_parameters"} if "text_config" in self.config else ())}
        self.config = {k: v for k, v in self.config.items() if k not in strange}
        self.family = family_of(self.config)
        self.layers = layer_count(self.config)
        self.linears = self.family.linear_names(self.layers)
        self.packed: dict[str, TensorInfo] = {}
        self.dropped: list[str] = []  # biases of zeros that the model does not have
        self._unwrap()

    def _refuse_quantized(self) -> None:
        pass

    def info(self, name: str) -> TensorInfo:
        return self.packed.get(name) or super().info(name)

    def _unwrap(self) -> None:
        """Check the folder against the model that config.json describes, and put weights in place of packed parts."""
        expected = parameter_shapes(self)
        parts = PARTS[self.scheme.layout]
        lead = parts[0]
        quantized = {n.removesuffix(f".{lead}") for n in self.tensors if n.endswith(f".{lead}")}
        if left := [n for n in self.linears if n not in quantized]:
            raise self._refusal(
                f"{left[0]} is not quantized ({len(left)} of {len(self.linears)}), an artifact has all or none"
            )
        if more := sorted(quantized - set(self.linears)):
            raise self._refusal(
                f"{more[0]} is quantized ({len(more)} outside the decoder), an artifact keeps it in float"
            )
        for name in self.linears:
            for part in parts:
                if info := self.tensors.pop(f"{name}.{part}", None):
                    self.packed[info.name] = info
            self.tensors[f"{name}.weight"] = TensorInfo(
                f"{name}.weight", expected[f"{name}.weight"], "F16", self.packed[f"{name}.{lead}"].file
            )
            bias = f"{name}.bias"
            if bias in self.tensors and bias not in expected:
                if bool(self.tensor(bias).any()):
                    raise self._refusal(f"{bias} is not zero, and the model has no such bias")
                self.dropped.append(bias)
                del self.tensors[bias]
        tied = {"lm_head.weight"} & {self.family.module_name(n) for n in {*expected} ^ {*self.tensors}}
        wrong = sorted(n for n in {*expected} ^ {*self.tensors} if self.family.module_name(n) not in tied)
        if wrong:
            which = "is missing" if wrong[0] in expected else "is not of this model"
            raise self._refusal(f"tensor {wrong[0]} {which} ({len(wrong)} in all)", "copy the folder again")
        for name, shape in expected.items():
            if name in self.tensors and self.tensors[name].shape != shape:
                raise self._refusal(f"{name} has shape {self.tensors[name].shape}, the model has {shape}")

    def _refusal(self, why: str, do: str = "give the original float checkpoint") -> CheckpointError:
        return CheckpointError(f"{self.path}: {why}; {do}")

    @cached_property
    def quant_config(self) -> QuantConfig:
        """The recipe as far as the file tells: grid and column order exactly, the rest as stated or by default."""
        s, stated = self.scheme, self.scheme.meta
        order = "static" if stated.get("static_groups") else "gar" if stated.get("act_group_aware") else "off"
        permuted = any(not _natural(self._g_idx(name)) for name in self.linears)
        method, damp = str(stated.get("method", "gptq")), stated.get("damp_percent")
        return QuantConfig(
            method=method if method in METHODS else "gptq", bits=s.bits, group_size=s.group_size, symmetric=s.symmetric,
            act_order="dynamic" if permuted else order, damp=damp if isinstance(damp, float) else QuantConfig.damp,
        )  # fmt: skip

    def linear(self, name: str) -> QuantizedLinear:
        """The integers of one linear. Raises CheckpointError for what no artifact can hold without loss."""
        n, k = self.tensors[f"{name}.weight"].shape
        s = self.scheme
        size = k if s.group_size == -1 else s.group_size
        if k % size:
            raise self._refusal(
                f"group_size {size} does not divide the {k} inputs of {name}", "correct quantization_config"
            )
        groups = k // size
        read = self._gptq_parts if s.layout == "gptq" else self._packed_parts
        codes, zeros, scales = read(name, n, k, groups)
        if codes.shape != (n, k) or zeros.shape != (n, groups) or scales.shape != (n, groups):
            raise self._refusal(f"the parts of {name} do not fit its shape {n}×{k}", "copy the folder again")
        top, middle = 2**s.bits - 1, 2 ** (s.bits - 1)
        if over := int((zeros > top).sum()):
            raise self._refusal(
                f"{name} has {over} zero-points that GPTQ v1 cannot express (stored as −1), and each reader decodes them"
                " otherwise",
                "save it as gptq_v2",
            )
        if s.symmetric and (zeros != middle).any():
            raise self._refusal(
                f"{name}: sym is true but zero-points are {int(zeros.min())} to {int(zeros.max())}, not {middle}; v1 and v2"
                " may be confused",
                "correct checkpoint_format or sym",
            )
        half = scales.half()
        if not torch.equal(half.float(), scales.float()):
            raise self._refusal(f"{name} has scales that float16 cannot hold")
        return QuantizedLinear(
            name, torch.from_numpy(np.ascontiguousarray(codes)), half.contiguous(),
            torch.from_numpy(np.ascontiguousarray(zeros.astype(np.uint8))), self._g_idx(name), self._bias(name), s.bits,
            s.group_size, s.symmetric,
        )  # fmt: skip

    def _gptq_parts(self, name: str, n: int, k: int, groups: int):
        """codes uint8 [N, K], zero-points int16 [N, G], scales [N, G]."""
        bits = self.scheme.bits
        qweight = self._words(name, "qweight", (k * bits // 32, n))
        qzeros = self._words(name, "qzeros", (groups, n * bits // 32))
        zeros = unpack(np.ascontiguousarray(qzeros.T), bits).astype(np.int16) + self.scheme.zero_offset
        return unpack(qweight, bits).T, zeros, self.tensor(f"{name}.scales").T

    def _packed_parts(self, name: str, n: int, k: int, groups: int):
        """The same, of compressed-tensors."""
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
        value = self.tensor(f"{name}.{part}")
        if tuple(value.shape) != shape or value.dtype != torch.int32:
            raise self._refusal(
                f"{name}.{part} is {value.dtype} {tuple(value.shape)}, its grid asks for int32 {shape}",
                "copy the folder again",
            )
        return value.numpy()

    def _g_idx(self, name: str) -> torch.Tensor:
        """int32 [K]: group of input column k. Raises CheckpointError where groups differ in size."""
        k = self.tensors[f"{name}.weight"].shape[1]
        size = k if self.scheme.group_size == -1 else self.scheme.group_size
        stored = next((f"{name}.{p}" for p in ("g_idx", "weight_g_idx") if f"{name}.{p}" in self.packed), None)
        if stored is None:
            return torch.arange(k, dtype=torch.int32) // size
        g_idx = self.tensor(stored).int()
        even = g_idx.shape == (k,) and int(g_idx.min()) >= 0 and bool((g_idx.bincount() == size).all())
        if not even or int(g_idx.max()) != k // size - 1:
            raise self._refusal(
                f"{stored} does not give each of {k // size} groups {size} columns", "copy the folder again"
            )
        return g_idx

    def _bias(self, name: str) -> torch.Tensor | None:
        if f"{name}.bias" not in self.tensors:
            return None
        bias = self.tensor(f"{name}.bias")
        if not torch.equal(bias.half().to(bias.dtype), bias):
            log.warning("%s.bias is rounded to float16, as every runtime stores it", name)
        return bias.half()


def write_artifact(checkpoint: GptqCheckpoint, folder: Path, name: str) -> None:
    """Write the artifact of a quantized checkpoint into an empty folder, a layer at a time."""
    (folder / "source").mkdir(parents=True)
    for file in checkpoint.companions:
        shutil.copyfile(file, folder / "source" / file.name)
    write_json(folder / "source" / "config.json", checkpoint.config)
    config = checkpoint.quant_config
    taken = {f"{n}.{part}" for n in checkpoint.linears for part in ("weight", "bias")}
    write_floats(folder, checkpoint, [t for t in checkpoint.tensors if t not in taken])
    records = []
    per_layer = len(checkpoint.linears) // checkpoint.layers
    for i in range(checkpoint.layers):
        linears = [checkpoint.linear(n) for n in checkpoint.linears[i * per_layer : (i + 1) * per_layer]]
        own = [
            ModuleRecord(
                q.name, i, q.bits, q.group_size, q.symmetric, q.out_features, q.in_features, q.bias is not None
            )
            for q in linears
        ]
        write_layer(folder, i, linears, own)
        records += own
    if checkpoint.dropped:
        log.info("%d biases of zeros left out, which the model does not have", len(checkpoint.dropped))
    manifest = Manifest(
        SCHEMA, __version__, name, checkpoint.model_type, checkpoint.fingerprint(), config.to_dict(),
        {"imported": f"GPTQ checkpoint made by {checkpoint.scheme.maker}"}, records,
    )  # fmt: skip
    write_manifest(folder, manifest)


def _stream(words: np.ndarray, bits: int, count: int) -> np.ndarray:
    """int32 [R, M] → uint8 [count, M]: a stream that may end within a word."""
    words = np.pad(words, ((0, -len(words) % bits), (0, 0)))
    return unpack(words, bits)[:count]


def _natural(g_idx: torch.Tensor) -> bool:
    return bool((g_idx[1:] >= g_idx[:-1]).all())
