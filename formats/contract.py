"""What a format is: the functions of its package, and what they are given and return."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmq_export.formats import NAMES

if TYPE_CHECKING:
    from vlmq_export.formats.model_plan import LinearSpec, ModelPlan
    from vlmq_export.formats.proof.answers import Answerer
    from vlmq_export.formats.proof.checks import Check, CheckSettings
    from vlmq_export.formats.proof.reference import Reference
    from vlmq_export.quantizer.artifact.read import Artifact
    from vlmq_export.quantizer.config import QuantConfig

# What an option may be, each with a few words for the command's help.
GPTQ_VERSIONS = {"v1": "zero-points stored minus one", "v2": "zero-points stored as they are"}
GPTQ_NAMES = {"hub": "as published", "module": "as GPTQModel.load wants them"}
ONNX_GRAPHS = {
    "fused": "ONNX Runtime's decoder operators",
    "single": "the same for one prompt at a time",
    "plain": "standard operators",
}
ONNX_DTYPES = {"float32": "32 bits", "float16": "16 bits"}
ONNX_PROVIDERS = {"cpu": "ONNX Runtime on the CPU", "cuda": "ONNX Runtime on CUDA"}
MMPROJ_TYPES = {"f16": "float16", "f32": "float32", "q8_0": "8 bits"}
CLASS_ROWS = {"last": "as llama.cpp b11549 reads it", "first": "as on the hub"}


@dataclass(frozen=True)
class FormatOptions:
    """Choices that belong to one format, from the recipe."""

    name: str = "model"  # base of file names
    gptq_version: str = "v1"  # a key of GPTQ_VERSIONS
    gptq_names: str = "hub"  # a key of GPTQ_NAMES
    # Most bytes in a file of a folder that transformers loads; this is its own default.
    shard_bytes: int = 5 * 10**9
    onnx_accuracy_level: int = 0  # attribute of MatMulNBits
    onnx_graph: str = "fused"  # a key of ONNX_GRAPHS
    onnx_dtype: str = "float32"  # a key of ONNX_DTYPES
    onnx_provider: str = "cpu"  # a key of ONNX_PROVIDERS
    gguf_split_bytes: int = 0  # of tensors in a file of the text model; 0: one file
    gguf_imatrix: bool = False  # whether to write imatrix.gguf beside it
    mmproj_dtype: str = "f16"  # a key of MMPROJ_TYPES
    mmproj_class_row: str = "last"  # where InternVL's class token has its position: CLASS_ROWS

    @property
    def onnx_fused(self) -> bool:
        """Whether the decoder gets ONNX Runtime's operators for the CPU."""
        return self.onnx_graph != "plain" and self.onnx_provider == "cpu"


@dataclass(frozen=True)
class FormatPlan:
    """What a format would write."""

    bits_per_weight: float  # of the quantized linears, scales and zero-points included
    size_bytes: int  # of all files together, estimated
    # One line each: what cannot be, and which option to change.
    refusals: list[str] = field(default_factory=list)
    # What the user should know, such as a dearer container or a dropped fast path.
    notes: list[str] = field(default_factory=list)
    # Part of the model → its bytes, which are `size_bytes` together. Those of a refused format may
    # be missing.
    parts: dict[str, int] = field(default_factory=dict)


@dataclass
class TensorRow:
    """One tensor of a file, as `inspect` shows it."""

    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass
class Inspection:
    """What `vlmq-export inspect` prints."""

    kind: str  # "GGUF v3", "GPTQ v1 safetensors", "ONNX IR 10", "artifact", …
    metadata: dict[str, str]
    tensors: list[TensorRow]
    bits_per_weight: float  # over the tensors that look quantized


class Format:
    """A format by its name. Its modules are imported when they are asked for.

    A package in this folder is a format if it has these modules with these functions:

        plan.py            plan(model, options), linear_bits(linear, config, options)
        write.py           write(artifact, folder, options)
        inspect.py         inspect(path)
        proof/check.py     check(folder, reference, options, settings); at_work(folder, reference,
                           settings) too where the runtime has a process of its own
        proof/answer.py    answerer(folder, reference, options, threads)
        requirements.py    WRITES_WITH and missing()
    """

    def __init__(self, name: str):
        self.name = name

    @property
    def folder(self) -> str:
        """The package that it is. Python's names have no hyphen."""
        return self.name.replace("-", "_")

    def _module(self, part: str) -> Any:
        return import_module(f"vlmq_export.formats.{self.folder}.{part}")

    @property
    def writes_with(self) -> tuple[str, ...]:
        """The packages without which nothing can be written."""
        return self._module("requirements").WRITES_WITH

    def missing(self) -> str | None:
        """The packages that checking needs and that are not installed, or None."""
        return self._module("requirements").missing()

    def plan(self, model: ModelPlan, options: FormatOptions) -> FormatPlan:
        """What would be written, from headers alone. Refusals come first."""
        return self._module("plan").plan(model, options)

    def linear_bits(
        self, linear: LinearSpec, config: QuantConfig, options: FormatOptions
    ) -> int | None:
        """Bits of a linear's weight in the files, with scales and zero-points.

        None where the format cannot hold it.

        config: the recipe of this one linear.
        """
        return self._module("plan").linear_bits(linear, config, options)

    def write(self, artifact: Artifact, folder: Path, options: FormatOptions) -> list[str]:
        """Write the files into an empty folder. Returns notes for the log and the card."""
        return self._module("write").write(artifact, folder, options)

    def at_work(
        self, folder: Path, reference: Reference, settings: CheckSettings
    ) -> AbstractContextManager | None:
        """The runtime at work in a process of its own, for `check`; None if it has no process."""
        begin = getattr(self._module("proof.check"), "at_work", None)
        return begin and begin(folder, reference, settings)

    def check(
        self,
        folder: Path,
        reference: Reference,
        options: FormatOptions,
        settings: CheckSettings,
        begun: Any = None,
    ) -> list[Check]:
        """Levels L1 to L3 in the real runtime. `begun` is what the context `at_work` gave."""
        given = (folder, reference, options, settings, *([] if begun is None else [begun]))
        return self._module("proof.check").check(*given)

    def answerer(
        self, folder: Path, reference: Reference, options: FormatOptions, threads: int
    ) -> Answerer:
        """What answers prompts in the real runtime, with images as that runtime prepares them."""
        return self._module("proof.answer").answerer(folder, reference, options, threads)

    def inspect(self, path: Path) -> Inspection:
        """What is in a file or folder of this format."""
        return self._module("inspect").inspect(path)


FORMATS = {name: Format(name) for name in NAMES}
