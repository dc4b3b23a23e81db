"""Recipe: one validated description of a run, made from flags, from YAML, or from both."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vlmq_export.formats import NATIVE_MIX
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.quantizer.config import (
    BITS,
    EMBEDDING_TYPES,
    GROUP_SIZES,
    VISION_TYPES,
    QuantConfig,
)
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.recipes.choices import CHOICES

_WIDTHS = "the runtimes decode 2, 3, 4 or 8 bits"
_OUTSIDE = ("head_bits", "embedding_bits", "vision_bits")  # widths outside the decoder layers
OUTSIDE_BITS = 8  # what they are where nothing is said of them and every format holds them
NATIVE_TOWER_BITS = 6  # those of the vision tower beside a decoder on smaller block types
HOLD_OUTSIDE = {"gguf", "onnx"}  # formats that hold all three quantized
_CHOOSE_TYPES = ("gguf_type", "target_bpw", "target_size")  # keys that exclude each other


class Recipe(BaseModel):
    """What a run is asked to do.

    The keys are the command's long options, with underscores. Every key has a default, so that
    `Recipe(format=["gguf"])` quantizes the bundled reference VLM.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str | None = None  # folder, artifact or hub id; None: the bundled reference VLM
    format: list[str] = Field(default_factory=list)
    bits: int = 4
    # Columns per scale; −1: per output channel; None: the largest of 128, 64 and 32 that divides
    # the inputs of every linear.
    group_size: Annotated[int, Field(le=2**20)] | None = None
    sym: bool | None = None  # None: symmetric at 8 bits, asymmetric below
    method: str = "vlmq"
    act_order: str = "gar"
    # Steps of gradient descent on each solved decoder layer; 0: none.
    tune: Annotated[int, Field(ge=0, le=10**5)] = 0
    rotate: str = "off"
    smooth: bool | None = None  # whether input channels are scaled; None: as the method has it
    calibration: Path | None = None  # None: the bundled set
    image_root: Path | None = None  # folder that image paths start from; None: the file's own
    samples: Annotated[int, Field(ge=1, le=10**7)] = 512
    # Tokens of a sample; None: the paper's for the family.
    seq_len: Annotated[int, Field(ge=8, le=2**20)] | None = None
    long_images: str = "scale"
    skip_bad_rows: Annotated[float, Field(ge=0, lt=1)] = 0.0  # share of bad rows to leave out
    # What lies outside the decoder layers: 0 or `off` leaves it as it is. None: with --target-size
    # chosen by cost, else 8 bits, where every format holds them and the model allows it.
    head_bits: int | None = None  # of an output head that is not the embedding
    embedding_bits: int | None = None  # of the token embedding
    vision_bits: int | None = None  # of vision tower and projector
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    verify_data: Path | None = None  # None: what calibration leaves, or the bundled rows
    verify: bool = True
    device: str = "auto"
    max_memory: Annotated[float, Field(gt=0)] | None = None  # GB on the host; None: what is free
    out: Path | None = None  # None: named after model and recipe
    gptq_version: str = "v1"
    gptq_names: str = "hub"
    accuracy_level: Annotated[int, Field(ge=0, le=4)] = 0
    onnx_graph: str = "fused"
    onnx_dtype: str = "float32"
    onnx_provider: str = "cpu"
    mmproj: str = "f16"
    class_row: str = "last"
    split_max_size: Annotated[str, Field(pattern=r"^[1-9]\d{0,5}[MG]$")] | None = None
    emit_imatrix: bool = False  # write an imatrix.gguf for stock llama-quantize beside the GGUF
    gguf_type: str | None = None  # a mix of block types in place of the affine grid: Q4_K_M
    # Bits per weight, for types or widths chosen by measured cost: with GGUF alone over all
    # matrices, with other formats over the linears of the decoder.
    target_bpw: Annotated[float, Field(gt=0, le=16)] | None = None
    # The same for at most so many GB of 10⁹ bytes: with GGUF the package, model and mmproj; with
    # other formats what the largest of them is planned to take.
    target_size: Annotated[float, Field(gt=0, le=10**6)] | None = None
    # REGEX=TYPE on GGUF tensor names, over the mix. The first match wins.
    tensor_type: list[str] = Field(default_factory=list)

    @field_validator("model", mode="before")
    @classmethod
    def _name(cls, value: Any) -> Any:
        """A model may be given as a path, from Python."""
        return fspath(value) if isinstance(value, PathLike) else value

    @field_validator("format", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        """Formats may be given as `gguf`, `gguf,onnx`, or a list of such."""
        given = [value] if isinstance(value, str) else value
        if not isinstance(given, list) or not all(isinstance(x, str) for x in given):
            return value
        return [one.strip() for x in given for one in x.split(",")]

    @field_validator(*_OUTSIDE, mode="before")
    @classmethod
    def _or_off(cls, value: Any) -> Any:
        """`off` may be said in words. YAML reads it as false."""
        return 0 if value == "off" or value is False else value

    @field_validator(*CHOICES)
    @classmethod
    def _known(cls, value: str | list[str], info: ValidationInfo) -> str | list[str]:
        """The value, where it is one of the key's choices."""
        known = CHOICES[str(info.field_name)]
        for one in value if isinstance(value, list) else [value]:
            if one not in known:
                raise ValueError(f"{one} is not known; choose one of {', '.join(known)}")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Recipe:
        """The recipe, where its keys can be had together and its numbers are possible."""
        if self.bits not in BITS:
            raise ValueError(f"--bits {self.bits}: {_WIDTHS}")
        if self.head_bits not in (None, 0, *BITS):
            raise ValueError(f"--head-bits {self.head_bits}: {_WIDTHS}; off keeps it float")
        if self.embedding_bits not in (None, 0, *EMBEDDING_TYPES):
            raise ValueError(
                f"--embedding-bits {self.embedding_bits}: the runtimes look rows up in 4 or 8 bits;"
                " off leaves the embedding as it is"
            )
        self._check_vision()
        if self.tune:
            self._check_tuning()
        if self.smooth and not METHODS[self.method].solves:
            raise ValueError(
                f"--smooth: --method {self.method} has scales of its own or no samples;"
                " leave it out, or choose another method"
            )
        if self.group_size not in (None, -1) and (self.group_size < 16 or self.group_size % 16):
            raise ValueError(
                f"--group-size {self.group_size}: a multiple of 16,"
                " or -1 for one scale an output channel"
            )
        for key in ("model", "calibration", "image_root", "verify_data", "out"):
            if "\0" in str(getattr(self, key)):
                raise ValueError(f"--{key.replace('_', '-')}: a name with a null byte")
        if self.emit_imatrix and "gguf" not in self.format:
            raise ValueError("--emit-imatrix writes beside the GGUF; add --format gguf")
        if self.tensor_type and self.widths_by_cost:
            raise ValueError(
                f"--tensor-type names GGUF's block types; {self.by_cost} chooses widths here"
            )
        if self.tensor_type and self.block_types is None and self.asks_for_affine:
            raise ValueError(
                "--tensor-type changes a mix of GGUF's block types; give --gguf-type, --target-bpw"
                " or --target-size too, or --format gguf alone, which is a mix by itself"
            )
        chosen = [k for k in _CHOOSE_TYPES if getattr(self, k) is not None]
        if len(chosen) > 1:
            one, other = (f"--{key.replace('_', '-')}" for key in chosen[:2])
            raise ValueError(f"{one} and {other} exclude each other: both choose the types")
        if self.block_types is not None:
            self._check_types(self.block_types)
        if self.widths_by_cost:
            self._check_widths(str(self.by_cost))
        if len(set(self.format)) != len(self.format):
            raise ValueError("--format is given twice with the same value")
        return self

    def _check_vision(self) -> None:
        """Raises ValueError for a width that the vision tower cannot have."""
        bits = self.vision_bits
        if bits in (None, 0, *BITS):
            return
        if bits not in VISION_TYPES:
            raise ValueError(f"--vision-bits {bits}: {_WIDTHS}; off keeps it float")
        if self.block_types is None and self.asks_for_affine:
            raise ValueError(
                f"--vision-bits {bits}: GGUF's block types alone have 5 and 6 bits; use 8 or 4, or"
                " --format gguf without --bits"
            )

    def _check_tuning(self) -> None:
        """Raises ValueError where gradients cannot go on from what the recipe solves."""
        if not METHODS[self.method].tunable:
            able = ", ".join(name for name, method in METHODS.items() if method.tunable)
            raise ValueError(f"--tune goes on from the integers of {able}, not of {self.method}")
        if self.block_types is not None:
            raise ValueError(
                f"--tune and {self.block_types} exclude each other: affine grids alone are tuned"
            )
        if self.act_order == "dynamic":
            raise ValueError("--tune needs groups of neighbouring columns; use --act-order gar")

    def _check_types(self, given: str) -> None:
        """Raises ValueError for what `given`, the flag that asks for block types, excludes."""
        for key in ("bits", "group_size", "sym"):
            # A recipe of an earlier version names the group size that nobody asked for.
            usual = (type(self).model_fields[key].default, GROUP_SIZES[0])
            if getattr(self, key) not in (usual if key == "group_size" else usual[:1]):
                flag = "--" + key.replace("_", "-")
                raise ValueError(f"{flag} and {given} exclude each other: the type sets the grid")
        if self.act_order in ("static", "dynamic"):
            raise ValueError(
                f"--act-order {self.act_order}: with {given} a block's columns stay together;"
                " use gar or off"
            )
        if self.head_bits:
            raise ValueError(
                f"--head-bits and {given} exclude each other: the mix names the head's type; "
                "--tensor-type '^output.weight$=Q8_0' gives it another"
            )
        if self.embedding_bits:
            raise ValueError(
                f"--embedding-bits and {given} exclude each other: the mix names the embedding's"
                " type; --tensor-type '^token_embd.weight$=Q8_0' gives it another"
            )
        if METHODS[self.method].affine_only:
            raise ValueError(
                f"--method {self.method} fits the ranges of affine grids; choose another method"
                f" with {given}"
            )
        if any(f != "gguf" for f in self.format):
            raise ValueError(
                f"{given}: only GGUF holds these integers; export other formats without it"
            )

    def _check_widths(self, given: str) -> None:
        """Raises ValueError for what `given`, the flag that asks for mixed widths, excludes."""
        if self.bits != type(self).model_fields["bits"].default:
            raise ValueError(f"--bits and {given} exclude each other: the widths are chosen")

    @property
    def block_types(self) -> str | None:
        """The flag that makes llama.cpp's block types the grid, or None."""
        if self.by_cost is not None:
            return None if self.widths_by_cost else self.by_cost
        return None if self.gguf_type is None else f"--gguf-type {self.gguf_type}"

    @property
    def by_cost(self) -> str | None:
        """The flag by which types or widths are chosen by what each would cost, or None."""
        if self.target_bpw is not None:
            return f"--target-bpw {self.target_bpw:g}"
        return None if self.target_size is None else f"--target-size {self.target_size:g}"

    @property
    def types_by_cost(self) -> bool:
        """Whether block types are chosen by what each would cost."""
        return self.by_cost is not None and not self.widths_by_cost

    @property
    def widths_by_cost(self) -> bool:
        """Whether widths of affine grids are: for any format but GGUF, which has block types."""
        return self.by_cost is not None and not {*self.format} <= {"gguf"}

    @property
    def target_bytes(self) -> int | None:
        """`target_size` in bytes."""
        return None if self.target_size is None else round(self.target_size * 1e9)

    @property
    def asks_for_affine(self) -> bool:
        """Whether it names anything that only an affine grid has, or a second format."""
        named = {"bits", "group_size", "sym", "tune"} & self.model_fields_set
        outside = self.head_bits or self.embedding_bits
        ordered = self.act_order in ("static", "dynamic")
        named = named or outside or ordered or METHODS[self.method].affine_only
        return bool(named or self.format != ["gguf"])

    def with_native_types(self) -> Recipe:
        """The recipe, on llama.cpp's own block types where GGUF alone is asked for.

        They are smaller than the block type that holds an affine grid of four bits exactly, and the
        scales of their sub-blocks are finer (docs/gguf.md).
        """
        if self.block_types is not None or self.asks_for_affine:
            return self
        return self.model_copy(update={"gguf_type": NATIVE_MIX})

    @property
    def open_parts(self) -> list[str]:
        """Keys of the widths outside the decoder layers that are chosen by cost, with the others.

        A size is that of the whole package, and so takes whatever the recipe leaves open.
        """
        return [k for k in _OUTSIDE if self.target_size is not None and getattr(self, k) is None]

    @property
    def holds_outside(self) -> bool:
        """Whether every format holds vision tower, embedding and output head quantized."""
        return bool(self.format) and HOLD_OUTSIDE.issuperset(self.format)

    @property
    def vision_type(self) -> str:
        """The block type of the vision tower where the whole model is on block types, or none."""
        native = self.block_types is not None
        return VISION_TYPES.get(self.vision_bits or 0, ("",))[0] if native else ""

    @property
    def smoothing(self) -> bool:
        """`smooth`, or its default for this method."""
        return METHODS[self.method].smooths if self.smooth is None else self.smooth

    @property
    def tower_type_named(self) -> bool:
        """Whether --mmproj says what the vision tower is stored as."""
        return "gguf" in self.format and "mmproj" in self.model_fields_set

    @property
    def grid(self) -> str:
        """The grid in words, for report and card."""
        if self.target_bpw is not None:
            return f"{self.target_bpw:g} bits per weight"
        if self.target_size is not None:
            return f"{self.target_size:g} GB"
        return self.gguf_type or f"{self.bits} bits"

    @property
    def symmetric(self) -> bool:
        """`sym`, or its default for these bits."""
        return self.bits == 8 if self.sym is None else self.sym

    @property
    def split_bytes(self) -> int:
        """`split_max_size` in bytes; 0 for one file."""
        size = self.split_max_size
        return int(size[:-1]) * {"M": 10**6, "G": 10**9}[size[-1]] if size else 0

    def quant_config(self) -> QuantConfig:
        """The part that the quantizer is given. A width that is to be chosen has its most bits."""
        outside = {key: getattr(self, key) or 0 for key in _OUTSIDE}
        outside |= dict.fromkeys(self.open_parts, OUTSIDE_BITS)
        return QuantConfig(
            method=self.method,
            bits=self.bits,
            group_size=self.group_size or GROUP_SIZES[0],
            symmetric=self.symmetric,
            act_order=self.act_order,
            seed=self.seed,
            rotate=self.rotate,
            smooth=self.smoothing,
            tune=self.tune,
            head_bits=outside["head_bits"],
            embedding_bits=outside["embedding_bits"],
            vision_bits=outside["vision_bits"],
            vision_type=self.vision_type,
            vision_short=bool(outside["vision_bits"]) and self.holds_outside,
        )

    def format_options(self, name: str) -> FormatOptions:
        """The part that the formats are given. `name` is the base of their file names."""
        return FormatOptions(
            name=name,
            gptq_version=self.gptq_version,
            gptq_names=self.gptq_names,
            onnx_accuracy_level=self.accuracy_level,
            onnx_graph=self.onnx_graph,
            onnx_dtype=self.onnx_dtype,
            onnx_provider=self.onnx_provider,
            mmproj_dtype=self.mmproj,
            mmproj_class_row=self.class_row,
            gguf_split_bytes=self.split_bytes,
            gguf_imatrix=self.emit_imatrix,
        )

    def label(self) -> str:
        """A short name of the quantization: w4g128, w3 (per channel), w8g128-sym.

        Eight bits outside the decoder layers are usual, and go without saying.
        """
        method = self.method if self.rotate == "off" else f"{self.method}-rotated"
        if self.smoothing != METHODS[self.method].smooths:
            method += "-smoothed" if self.smoothing else "-unsmoothed"
        method += f"-tuned{self.tune}" if self.tune else ""
        if self.vision_bits != NATIVE_TOWER_BITS:
            method += _unusual("vision", self.vision_bits)
        if self.gguf_type is not None:
            return f"{self.gguf_type}-{method}"
        width = f"w{self.bits}" if self.target_bpw is None else f"{self.target_bpw:g}bpw"
        width = width if self.target_size is None else f"{self.target_size:g}GB"
        if self.types_by_cost:
            return f"{width}-{method}"
        group = "" if self.group_size == -1 else f"g{self.quant_config().group_size}"
        sym = "-sym" if self.symmetric and self.bits != 8 else ""
        outside = _unusual("head", self.head_bits) + _unusual("embed", self.embedding_bits)
        return f"{width}{group}{sym}{outside}-{method}"

    def to_yaml(self) -> str:
        """The recipe as a file that `load_recipe` reads: every key, defaults included."""
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def _unusual(part: str, bits: int | None) -> str:
    """The part of a label for a width outside the decoder layers."""
    return f"-{part}{bits}" if bits not in (None, 0, OUTSIDE_BITS) else ""
