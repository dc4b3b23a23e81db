"""The artifact on disk: the truth that every format is written from.

    artifact/
      manifest.json              schema, source model and its hashes, recipe, one entry a linear (grid and metrics)
      layer-00000.safetensors    one file a decoder layer: codes, scales, zero_points, g_idx, changed biases, energy of inputs
      float-00001.safetensors    every tensor that is not quantized, bytes as in the source checkpoint
      float-changed-00000.safetensors  norms of a decoder layer that took a scale (awq, mbq), in place of the source's
      timing.json                seconds by phase and layer, tokens a second, peak memory
      source/                    config.json, tokenizer and processor files, as they are

Each file is written to a temporary name and renamed when whole; manifest.json comes last, so a folder with a manifest is
complete and one without is a run to resume. Codes are stored in the original column order with one byte each: packing
belongs to the formats.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from vlmq_export.errors import ArtifactError, CheckpointError
from vlmq_export.quantizer.checkpoint import COMPANIONS, Checkpoint, TensorInfo, read_infos, read_tensor
from vlmq_export.quantizer.config import ACT_ORDERS, BITS, QuantConfig
from vlmq_export.quantizer.families import untied
from vlmq_export.quantizer.kquants import GRIDS, Params
from vlmq_export.quantizer.linears import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.tensor_file import write_tensors
from vlmq_export.quantizer.untrusted import contained, read_json

SCHEMA = 1
OUTER = -1  # the "layer" of an embedding
MANIFEST = "manifest.json"
TIMING = "timing.json"  # seconds; kept apart so that every other file has the same bytes in every run
_FLOAT_SHARD_BYTES = 2 * 2**30


@dataclass
class ModuleRecord:
    """What the manifest says of one linear. `layer` is −1 for an embedding; the output head comes after the last layer."""

    name: str
    layer: int
    bits: int
    group_size: int
    symmetric: bool
    out_features: int
    in_features: int
    bias: bool
    metrics: dict = field(default_factory=dict)  # loss, relative error, damp used, fallback, seconds
    type: str = ""  # a GGUF block type; empty for the affine grid
    energy: bool = False  # whether calibration left the energy of its inputs

    @classmethod
    def of(cls, linear: Linear, layer: int, metrics: dict) -> ModuleRecord:
        shape, bias = (linear.out_features, linear.in_features), linear.bias is not None
        energy = linear.energy is not None
        if isinstance(linear, BlockLinear):
            grid = GRIDS[linear.type]
            sizes = (grid.bits, grid.sub_block, not grid.affine, *shape)
            return cls(linear.name, layer, *sizes, bias, metrics, linear.type, energy)
        sizes = (linear.bits, linear.group_size, linear.symmetric, *shape)
        return cls(linear.name, layer, *sizes, bias, metrics, energy=energy)

    def packed_bits(self) -> float:
        """Bits of codes, scales and zero-points once packed; on disk a code takes a byte."""
        if self.type:
            return self.out_features * self.in_features * GRIDS[self.type].bits_per_weight
        groups = 1 if self.group_size == -1 else self.in_features // self.group_size
        return self.out_features * (self.in_features * self.bits + groups * (16 + self.bits))

    def stored(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Dtype (safetensors' spelling) and shape of each of its tensors."""
        codes = {"codes": ("U8", (self.out_features, self.in_features))}
        more = {"bias": ("F16", (self.out_features,))} if self.bias else {}
        more |= {"energy": ("F32", (self.in_features,))} if self.energy else {}
        if self.type:
            grid = GRIDS[self.type]
            blocks, subs = ((self.out_features, self.in_features // n) for n in (grid.block, grid.sub_block))
            minimum = {"dmin": ("F16", blocks), "sub_mins": ("U8", subs)} if grid.affine else {}
            return codes | {"d": ("F16", blocks), "sub_scales": ("I8", subs)} | minimum | more
        groups = (self.out_features, 1 if self.group_size == -1 else self.in_features // self.group_size)
        parts = {"scales": ("F16", groups), "zero_points": ("U8", groups), "g_idx": ("I32", (self.in_features,))}
        return codes | parts | more

    def linear(self, read: Callable[[str], torch.Tensor]) -> Linear:
        """The integers themselves; `read(key)` gives a stored tensor and raises KeyError where there is none."""

        def part(key: str) -> torch.Tensor:
            return read(f"{self.name}.{key}")

        bias, energy = part("bias") if self.bias else None, part("energy") if self.energy else None
        if not self.type:
            parts = (part(k) for k in ("codes", "scales", "zero_points", "g_idx"))
            return QuantizedLinear(self.name, *parts, bias, self.bits, self.group_size, self.symmetric, energy)
        d, scales, minimum = part("d"), part("sub_scales").to(torch.int16), ()
        if GRIDS[self.type].affine:
            minimum = (part("dmin"), part("sub_mins").to(torch.int16))
        return BlockLinear(self.name, part("codes"), Params(d, scales, *minimum), bias, self.type, energy)


@dataclass
class Manifest:
    schema: int
    version: str  # of vlmq-export
    name: str  # of the model, for file names and cards
    model_type: str
    source: dict[str, str]  # file → sha256 of the source checkpoint
    config: dict  # QuantConfig as a dict
    calibration: dict  # rows used, dropped, tokens, and the file's hash
    modules: list[ModuleRecord]
    phases: dict = field(default_factory=dict)  # seconds a phase, peak memory


def write_atomic(path: Path, write) -> None:
    """Call write(temporary sibling) and rename it to `path`, mode 0644, when whole and on the disk.

    Raises ArtifactError where it cannot be written; nothing is left of it then.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        temporary.chmod(0o644)  # safetensors creates its files with mode 0600
        sync(temporary)
        temporary.replace(path)
    except (SafetensorError, OSError) as e:  # safetensors' errors of input and output are no OSError
        raise ArtifactError(
            f"{path}: cannot be written ({getattr(e, 'strerror', None) or e}); free space and use --resume"
        ) from None
    finally:
        temporary.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    with path.open("rb") as f:
        os.fsync(f.fileno())


def write_json(path: Path, value) -> None:
    write_atomic(path, lambda t: t.write_text(json.dumps(value, indent=1) + "\n", "utf-8"))


def layer_file(index: int) -> str:
    """−1 is the embedding, where the recipe quantizes it; the output head's number follows the last decoder layer's."""
    return f"layer-{index:05d}.safetensors" if index >= 0 else "layer-outer.safetensors"


def write_layer(folder: Path, index: int, linears: Iterable[Linear], records: Iterable[ModuleRecord]) -> None:
    """One decoder layer with its records in the header: what a resumed run needs is in the one file."""
    tensors: dict[str, torch.Tensor] = {}
    for q in linears:
        tensors |= {f"{q.name}.{part}": value for part, value in q.tensors().items()}
        if q.bias is not None:
            tensors[f"{q.name}.bias"] = q.bias
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}
    metadata = {"records": json.dumps([asdict(r) for r in records])}
    write_atomic(folder / layer_file(index), lambda t: save_file(tensors, t, metadata=metadata))


def read_layer_records(folder: Path, index: int) -> list[ModuleRecord]:
    file = folder / layer_file(index)
    try:
        with safe_open(file, framework="pt") as f:
            return [ModuleRecord(**r) for r in json.loads(f.metadata()["records"])]
    except (SafetensorError, OSError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ArtifactError(f"{file}: damaged ({e}); delete it and resume to solve this layer again") from None


def read_layer(folder: Path, index: int) -> list[Linear]:
    """The linears of one published layer, before there is a manifest. Raises ArtifactError when it is damaged."""
    file = folder / layer_file(index)
    try:
        infos = read_infos(file)
        linears = [r.linear(lambda key: read_tensor(folder, infos[key])) for r in read_layer_records(folder, index)]
        for q in linears:
            if problem := q.out_of_range():
                raise ValueError(f"{q.name}: {problem}")
        return linears
    except (CheckpointError, SafetensorError, EOFError, KeyError, TypeError, ValueError, RuntimeError) as e:
        raise ArtifactError(f"{file}: damaged ({e}); delete it and resume to solve this layer again") from None


def write_floats(folder: Path, checkpoint: Checkpoint, names: list[str]) -> None:
    """Copy every tensor that is not quantized, in its source dtype, in shards of about 2 GiB; a whole shard is kept.

    One tensor is in memory at a time. Wide types come first in a shard, so that every tensor is aligned to its own width.
    """
    shards: list[list[str]] = [[]]
    room = _FLOAT_SHARD_BYTES
    for name in names:
        size = checkpoint.tensors[name].nbytes
        if shards[-1] and size > room:
            shards.append([])
            room = _FLOAT_SHARD_BYTES
        shards[-1].append(name)
        room -= size
    for i, shard in enumerate(shards, start=1):
        file = folder / f"float-{i:05d}.safetensors"
        if file.is_file():
            continue  # resumed: renamed only when whole
        infos = [checkpoint.tensors[name] for name in shard]
        infos.sort(key=lambda t: (-t.nbytes // max(1, t.numel), t.name))
        write_atomic(file, lambda t, infos=infos: write_tensors(t, infos, lambda info: checkpoint.tensor(info.name)))


def write_source(folder: Path, checkpoint: Checkpoint, *, own_head: bool = False) -> None:
    """config.json, tokenizer and processor files. `own_head`: of a model that no longer shares its output matrix."""
    target = folder / "source"
    target.mkdir(parents=True, exist_ok=True)
    checkpoint.write_config(target / "config.json")
    for file in checkpoint.companions:
        shutil.copyfile(file, target / file.name)
    if own_head and (config := untied(checkpoint.config)) != checkpoint.config:
        write_json(target / "config.json", config)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    write_json(folder / MANIFEST, asdict(manifest))


def changed_file(index: int) -> str:
    """Float tensors of a decoder layer that differ from the source's: norms that took a scale."""
    return f"float-changed-{index:05d}.safetensors"


def write_changed(folder: Path, index: int, tensors: dict[str, torch.Tensor]) -> None:
    """Published before the layer's integers, which fit no other norms."""
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in sorted(tensors.items())}
    write_atomic(folder / changed_file(index), lambda t: save_file(tensors, t))


class Artifact:
    """A whole artifact, read lazily. Raises ArtifactError when something is missing or does not fit together."""

    def __init__(self, path: str | Path):
        self.path = Path(path)
        manifest = self.path / MANIFEST
        if not manifest.is_file():
            raise ArtifactError(f"{path}: no {MANIFEST}; not an artifact, or one whose run was stopped (try --resume)")
        _refuse_strangers(self.path)
        raw = read_json(manifest, error=ArtifactError)
        if raw.get("schema") != SCHEMA:
            raise ArtifactError(f"{manifest}: schema {raw.get('schema')}, this version reads {SCHEMA}; quantize again")
        try:
            raw["modules"] = [ModuleRecord(**m) for m in raw["modules"]]
            self.manifest = Manifest(**raw)
            self.config = QuantConfig(**self.manifest.config)
        except (KeyError, TypeError) as e:
            raise ArtifactError(f"{manifest}: damaged ({e!r}); quantize again") from None
        if problems := manifest_problems(self.manifest, self.config):
            raise ArtifactError(f"{manifest}: damaged ({'; '.join(problems[:4])}); quantize again")
        self.records = {m.name: m for m in self.manifest.modules}
        self._where = self._index()

    def _index(self) -> dict[str, TensorInfo]:
        layers = sorted({m.layer for m in self.manifest.modules})
        files = [self.path / layer_file(i) for i in layers]
        missing = [f.name for f in files if not f.is_file()]
        floats = sorted(self.path.glob("float-*.safetensors"))
        if missing or not floats:
            raise ArtifactError(f"{self.path}: incomplete, {', '.join(missing[:8]) or 'float tensors'} missing")
        self._floats: list[TensorInfo] = []
        where: dict[str, TensorInfo] = {}
        expected = self._expected()
        for file in [*files, *floats]:
            infos = _infos(file)
            if twice := where.keys() & infos.keys():
                raise ArtifactError(f"{self.path}: tensor {min(twice)} is in two files; quantize again")
            where |= infos
            if file.name.startswith("float-"):
                self._floats += infos.values()
            for name, info in infos.items():
                found, want = (info.dtype, info.shape), expected.pop(name, None)
                if found != want and (want or file.name.startswith("layer-")):
                    raise ArtifactError(f"{file}: {name} is {found}, the manifest says {want}; quantize again")
        if expected:
            raise ArtifactError(
                f"{self.path}: {len(expected)} tensors of the manifest missing, first {min(expected)}; quantize again"
            )
        return where

    def _expected(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Every tensor of the layer files: its dtype and shape, as the manifest has them."""
        return {f"{m.name}.{part}": held for m in self.manifest.modules for part, held in m.stored().items()}

    @property
    def source(self) -> Path:
        """Folder with the source's config.json, tokenizer and processor files."""
        return self.path / "source"

    @property
    def companions(self) -> list[Path]:
        """Tokenizer and processor files of the source."""
        return [self.source / n for n in COMPANIONS if (self.source / n).is_file()]

    @cached_property
    def source_config(self) -> dict:
        return read_json(self.source / "config.json", error=ArtifactError)

    def _read(self, key: str) -> torch.Tensor:
        try:
            return read_tensor(self.path, self._where[key])
        except (KeyError, EOFError, OSError) as e:
            raise ArtifactError(f"{self.path}: cannot read {key} ({e}); the artifact is damaged") from None

    def linear_names(self) -> list[str]:
        """Hub names of the quantized modules, in layer order."""
        return list(self.records)

    def linear(self, name: str) -> Linear:
        linear = self.records[name].linear(self._read)
        if problem := linear.out_of_range():
            raise ArtifactError(
                f"{self.path / self._where[f'{name}.codes'].file}: {name}: {problem}; the artifact is damaged"
            )
        return linear

    def linears(self) -> Iterator[Linear]:
        return (self.linear(name) for name in self.linear_names())

    def float_names(self) -> list[str]:
        """Hub names of every tensor that is not a quantized weight nor a quantized module's bias."""
        return [t.name for t in self._floats]

    def float_info(self) -> Iterator[tuple[str, tuple[int, ...], str]]:
        """(hub name, shape, dtype in safetensors' spelling) of the same tensors."""
        return ((t.name, t.shape, t.dtype) for t in self._floats)

    def float_tensor(self, name: str) -> torch.Tensor:
        """Source dtype and bytes."""
        return self._read(name)


def _infos(file: Path) -> dict[str, TensorInfo]:
    try:
        return read_infos(file)
    except CheckpointError as e:
        raise ArtifactError(f"{file.parent}: {e}") from None


def _refuse_strangers(folder: Path) -> None:
    """An artifact is copied whole into an output folder, and its source/ into every export: neither may bring a link to
    somebody's own files, nor a file that takes the place of one that we write."""
    for file in folder.rglob("*"):
        if file.is_symlink():
            try:
                contained(folder, file.relative_to(folder).as_posix())
            except ValueError as e:
                raise ArtifactError(f"{folder}: {e}") from None
    source = folder / "source"
    if not (source / "config.json").is_file():
        raise ArtifactError(f"{folder}: source/config.json is missing; quantize again")
    if strange := sorted({p.name for p in source.iterdir()} - {"config.json", *COMPANIONS}):
        raise ArtifactError(f"{source}: {strange[0]} does not belong there; delete it")


def manifest_problems(m: Manifest, config: QuantConfig) -> list[str]:
    """What a manifest says that no artifact of ours can say: it is a file like any other and may be damaged or hostile."""
    problems = []
    name = m.name if isinstance(m.name, str) else ""
    if not name.strip(".") or set(name) & set("/\\") or not name.isprintable():
        problems.append(f"name {m.name!r} is no file name")  # output files are named after it
    if not isinstance(m.model_type, str) or not all(isinstance(x, dict) for x in (m.source, m.calibration, m.phases)):
        problems.append("model_type, source, calibration or phases of another type")
    known = config.head_bits in (0, *BITS) and config.act_order in ACT_ORDERS and isinstance(config.method, str)
    if not known or not _is_grid(config):
        problems.append(f"a recipe of {config.bits} bits in groups of {config.group_size}, order {config.act_order}")
    names: set[str] = set()
    for r in m.modules:
        sizes = (r.layer, r.out_features, r.in_features)
        if not isinstance(r.name, str) or r.name in names:
            problems.append(f"linear {r.name!r} twice")
        elif not all(type(n) is int and OUTER <= n < 2**31 for n in sizes) or min(sizes[1:]) < 1:
            problems.append(f"{r.name} has layer and shape {sizes}")
        elif not _fits(r):
            problems.append(
                f"{r.name} has {r.in_features} columns of {r.type or f'{r.bits} bits in groups of {r.group_size}'}"
            )
        elif not isinstance(r.bias, bool) or not isinstance(r.energy, bool) or not isinstance(r.metrics, dict):
            problems.append(f"{r.name} has bias {r.bias!r}, energy {r.energy!r} or metrics that are none")
        names.add(str(r.name))
    return problems if m.modules else [*problems, "no linears"]


def _fits(r: ModuleRecord) -> bool:
    """Whether a linear's columns fall into whole groups of a grid that there is."""
    if r.type:
        return isinstance(r.type, str) and r.type in GRIDS and r.in_features % GRIDS[r.type].block == 0
    return _is_grid(r) and (r.group_size == -1 or r.in_features % r.group_size == 0)


def _is_grid(g: QuantConfig | ModuleRecord) -> bool:
    if [type(x) for x in (g.bits, g.group_size, g.symmetric)] != [int, int, bool]:
        return False
    return g.bits in BITS and (g.group_size == -1 or g.group_size >= 1)
