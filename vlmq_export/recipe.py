"""Recipe: one validated description of a run, from flags, from YAML, or both (flags win)."""

from __future__ import annotations

import difflib
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from vlmq_export.errors import UsageError
from vlmq_export.formats.base import FormatOptions
from vlmq_export.quantizer.config import QuantConfig

RECIPE_FILE = "recipe.yaml"
MAX_RECIPE_BYTES = 2**16  # 20 keys of one line each


class FormatName(StrEnum):
    gptq = "gptq"
    onnx = "onnx"
    gguf = "gguf"


class Method(StrEnum):
    rtn = "rtn"
    gptq = "gptq"
    gptaq = "gptaq"
    vlmq = "vlmq"
    vlmq_l2 = "vlmq-l2"
    vlmq_gptq = "vlmq-gptq"
    vlm_ptq = "vlm-ptq"
    awq = "awq"
    mbq = "mbq"
    exact = "exact"
    auto = "auto"


class ActOrder(StrEnum):
    off = "off"
    static = "static"
    gar = "gar"
    dynamic = "dynamic"


class Rotate(StrEnum):
    off = "off"
    folded = "folded"
    online = "online"


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class GptqVersion(StrEnum):
    v1 = "v1"
    v2 = "v2"


class GptqNames(StrEnum):
    hub = "hub"
    module = "module"


class OnnxGraph(StrEnum):
    fused = "fused"
    single = "single"
    plain = "plain"


class OnnxDtype(StrEnum):
    float32 = "float32"
    float16 = "float16"


class OnnxProvider(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


class MmprojType(StrEnum):
    f16 = "f16"
    f32 = "f32"
    q8_0 = "q8_0"


class ClassRow(StrEnum):
    last = "last"
    first = "first"


class Recipe(BaseModel):
    """Keys are the command's long options with underscores. `model: null` is the bundled reference VLM."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None
    format: list[FormatName] = Field(default_factory=list)
    bits: int = 4
    group_size: Annotated[int, Field(le=2**20)] = 128
    sym: bool | None = None  # None: symmetric at 8 bits, asymmetric below
    method: Method = Method.vlmq
    act_order: ActOrder = ActOrder.gar
    rotate: Rotate = Rotate.off
    calibration: Path | None = None  # None: the bundled set
    image_root: Path | None = None
    samples: Annotated[int, Field(ge=1, le=10**7)] = 512
    seq_len: Annotated[int, Field(ge=8, le=2**20)] | None = None  # None: the paper's for the family
    head_bits: int | None = None  # None: the output head stays as it is
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    verify_data: Path | None = None  # None: the bundled held-out set
    verify: bool = True
    device: Device = Device.auto
    max_memory: Annotated[float, Field(gt=0)] | None = None  # GB of host memory; None: what is free
    out: Path | None = None
    gptq_version: GptqVersion = GptqVersion.v1
    gptq_names: GptqNames = GptqNames.hub
    accuracy_level: Annotated[int, Field(ge=0, le=4)] = 0
    onnx_graph: OnnxGraph = OnnxGraph.fused
    onnx_dtype: OnnxDtype = OnnxDtype.float32
    onnx_provider: OnnxProvider = OnnxProvider.cpu
    mmproj: MmprojType = MmprojType.f16
    class_row: ClassRow = ClassRow.last
    split_max_size: Annotated[str, Field(pattern=r"^[1-9]\d{0,5}[MG]$")] | None = None
    emit_imatrix: bool = False  # an imatrix.gguf for stock llama-quantize beside the GGUF
    gguf_type: str | None = None  # a mix of block types in place of the affine grid: Q4_K_M
    target_bpw: Annotated[float, Field(gt=0, le=16)] | None = None  # of all matrices: types by measured cost
    tensor_type: list[str] = Field(default_factory=list)  # regex=TYPE on GGUF tensor names, first match wins

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"--bits {self.bits}: the runtimes decode 2, 3, 4 or 8 bits")
        if self.head_bits not in (None, 2, 3, 4, 8):
            raise ValueError(f"--head-bits {self.head_bits}: the runtimes decode 2, 3, 4 or 8 bits")
        if self.group_size != -1 and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(f"--group-size {self.group_size}: a multiple of 16, or -1 for one scale an output channel")
        for key in ("model", "calibration", "image_root", "verify_data", "out"):
            if "\0" in str(getattr(self, key)):
                raise ValueError(f"--{key.replace('_', '-')}: a name with a null byte")
        if self.emit_imatrix and FormatName.gguf not in self.format:
            raise ValueError("--emit-imatrix writes beside the GGUF; add --format gguf")
        if self.tensor_type and self.block_types is None:
            raise ValueError("--tensor-type changes a mix; give --gguf-type or --target-bpw too")
        if self.gguf_type is not None and self.target_bpw is not None:
            raise ValueError("--gguf-type and --target-bpw exclude each other: both choose the types")
        if self.block_types is not None:
            self._check_types(self.block_types)
        if len(set(self.format)) != len(self.format):
            raise ValueError("--format is given twice with the same value")
        return self

    def _check_types(self, given: str) -> None:
        for key in ("bits", "group_size", "sym"):
            if getattr(self, key) != type(self).model_fields[key].default:
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"{flag} and {given} exclude each other: the type sets the grid")
        if self.act_order in (ActOrder.static, ActOrder.dynamic):
            raise ValueError(
                f"--act-order {self.act_order}: with {given} a block's columns stay together; use gar or off"
            )
        if self.head_bits is not None:
            raise ValueError(
                f"--head-bits and {given} exclude each other: the mix names the head's type; "
                "--tensor-type '^output.weight$=Q8_0' gives it another"
            )
        if any(f != FormatName.gguf for f in self.format):
            raise ValueError(f"{given}: only GGUF holds these integers; export other formats without it")

    @property
    def block_types(self) -> str | None:
        """The flag that makes llama.cpp's block types the grid, or None."""
        if self.target_bpw is not None:
            return f"--target-bpw {self.target_bpw:g}"
        return None if self.gguf_type is None else f"--gguf-type {self.gguf_type}"

    @property
    def grid(self) -> str:
        """For report and card."""
        if self.target_bpw is not None:
            return f"{self.target_bpw:g} bits per weight"
        return self.gguf_type or f"{self.bits} bits"

    @property
    def symmetric(self) -> bool:
        return self.bits == 8 if self.sym is None else self.sym

    @property
    def split_bytes(self) -> int:
        size = self.split_max_size
        return int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]] if size else 0

    def quant_config(self) -> QuantConfig:
        return QuantConfig(
            method=self.method.value, bits=self.bits, group_size=self.group_size, symmetric=self.symmetric,
            act_order=self.act_order.value, seed=self.seed, rotate=self.rotate.value,
            head_bits=self.head_bits or 0,
        )  # fmt: skip

    def format_options(self, name: str) -> FormatOptions:
        return FormatOptions(
            name=name, gptq_version=self.gptq_version.value, gptq_names=self.gptq_names.value,
            onnx_accuracy_level=self.accuracy_level, onnx_graph=self.onnx_graph.value, onnx_dtype=self.onnx_dtype.value,
            onnx_provider=self.onnx_provider.value, mmproj_dtype=self.mmproj.value,
            mmproj_class_row=self.class_row.value, gguf_split_bytes=self.split_bytes,
            gguf_imatrix=self.emit_imatrix,
        )  # fmt: skip

    def label(self) -> str:
        """Short name of the quantization: w4g128, w3 (per channel), w8g128-sym."""
        method = self.method if self.rotate is Rotate.off else f"{self.method}-rotated"
        if self.gguf_type is not None:
            return f"{self.gguf_type}-{method}"
        if self.target_bpw is not None:
            return f"{self.target_bpw:g}bpw-{method}"
        group = "" if self.group_size == -1 else f"g{self.group_size}"
        sym = "-sym" if self.symmetric and self.bits != 8 else ""
        head = "" if self.head_bits is None else f"-head{self.head_bits}"
        return f"w{self.bits}{group}{sym}{head}-{method}"

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


class _RecipeLoader(yaml.SafeLoader):
    """Plain values without aliases, which can spell a billion items in a line, and no key twice, of which one is lost."""

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("aliases (*) are not allowed in a recipe")
        self.depth = getattr(self, "depth", 0) + 1
        if self.depth > 8:
            raise yaml.YAMLError("nested too deeply for a recipe")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        keys = [k.value for k, _ in node.value if isinstance(k, yaml.ScalarNode)]
        if twice := [k for i, k in enumerate(keys) if k in keys[:i]]:
            raise yaml.YAMLError(f"key {twice[0]} appears twice")
        return super().construct_mapping(node, deep)


def _recipe_text(path: Path) -> str:
    with path.open("rb") as f:
        raw = f.read(MAX_RECIPE_BYTES + 1)
    if len(raw) > MAX_RECIPE_BYTES:
        raise ValueError(f"over {MAX_RECIPE_BYTES} bytes")
    if raw.count(b"[") + raw.count(b"{") > 64:  # the parser's time grows with the square of the depth
        raise ValueError("too many brackets for a recipe")
    return raw.decode("utf-8-sig")


def load_recipe(path: Path | None, flags: dict[str, Any]) -> Recipe:
    """The recipe file's keys overlaid with the flags that were given. Raises UsageError with one line."""
    values: dict[str, Any] = {}
    if path is not None:
        try:
            values = yaml.load(_recipe_text(path), _RecipeLoader) or {}
        except OSError as e:
            raise UsageError(f"--recipe {path}: {e.strerror or e}") from None
        except (yaml.YAMLError, ValueError, RecursionError) as e:  # PyYAML's own constructors raise ValueError
            raise UsageError(f"--recipe {path}: not YAML: {' '.join(str(e).split())}") from None
        if not isinstance(values, dict):
            raise UsageError(f"--recipe {path}: keys and values are expected, got a {type(values).__name__}")
        values = {str(k).replace("-", "_"): v for k, v in values.items()}
        for key in values:
            if key not in Recipe.model_fields:
                close = difflib.get_close_matches(key, Recipe.model_fields, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(Recipe.model_fields)}"
                raise UsageError(f"--recipe {path}: unknown key {key}{hint}")
    try:
        return Recipe.model_validate(values | flags)
    except ValidationError as e:
        first = e.errors()[0]
        where = "--" + ".".join(str(p) for p in first["loc"]).replace("_", "-") + ": " if first["loc"] else ""
        raise UsageError(where + first["msg"].removeprefix("Value error, ")) from None
