"""What a format is, and the rows that its proof is made of.

A format package offers five functions and a constant, found through `vlmq_export.formats.get(name)`:

    plan(model, options)            → FormatPlan      what would be written; refusals first, nothing read but headers
    write(artifact, folder, options) → list[str]      the files, into an empty folder; returns notes for log and card
    check(folder, reference, options, settings) → list[Check]   levels L1-L3 in the real runtime
    inspect(path)                   → Inspection      what is in a file or folder of this format
    missing()                       → str | None      packages that checking needs and that are not installed
    WRITES_WITH                                       packages that writing needs
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from vlmq_export.quantizer.config import QuantConfig


@dataclass(frozen=True)
class LinearSpec:
    name: str  # hub name of the module
    out_features: int
    in_features: int
    bias: bool


@dataclass(frozen=True)
class TensorSpec:
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' spelling

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class ModelPlan:
    """What is known of a run from config and headers alone, before any weight is read."""

    name: str
    model_type: str
    source_config: dict
    linears: list[LinearSpec]  # to be quantized
    floats: list[TensorSpec]  # everything else, biases of quantized linears not included
    config: QuantConfig


@dataclass(frozen=True)
class FormatOptions:
    """Choices that belong to one format, from the recipe."""

    name: str = "model"  # base of file names
    gptq_version: str = "v1"  # v1 | v2
    gptq_names: str = "hub"  # hub | module
    gptq_shard_bytes: int = 5 * 10**9  # transformers' own default
    onnx_accuracy_level: int = 0
    onnx_graph: str = "fused"  # fused | single | plain
    onnx_dtype: str = "float32"  # float32 | float16
    onnx_provider: str = "cpu"  # cpu | cuda
    gguf_split_bytes: int = 0  # of tensors in a file of the text model; 0: one file
    gguf_imatrix: bool = False  # whether to write imatrix.gguf beside it
    mmproj_dtype: str = "f16"  # f16 | f32 | q8_0
    mmproj_class_row: str = "last"  # last | first: of the class token's position, for InternVL


@dataclass(frozen=True)
class CheckSettings:
    """How much a check runs. The gates do not depend on it."""

    images: int = 32  # prompts whose logits and greedy answers are compared
    questions: int = 256  # prompts for the share of equal answers of a file that rounds activations
    threads: int = 2


@dataclass(frozen=True)
class FormatPlan:
    bits_per_weight: float  # of the quantized linears in this format, scales and zero-points included
    size_bytes: int  # of all files together, estimated
    refusals: list[str] = field(default_factory=list)  # one line each: what cannot be, and which option to change
    notes: list[str] = field(default_factory=list)  # what the user should know: a dearer container, a dropped fast path


@dataclass
class Check:
    """One row of the parity table. `status` is passed, failed, not run or info; a check without a gate is info."""

    format: str  # gptq | onnx | gguf
    level: str  # L1 | L2 | L3
    name: str  # what was compared, in words
    status: str
    value: float | None = None  # the figure that the gate is about
    gate: float | None = None
    unit: str = ""  # of value: "rel", "mismatches", "share", ...
    compared: int | None = None  # weights, linears, prompts or answers
    detail: str = ""  # where the gate comes from, or why it was not run
    worst: str = ""  # the tensor, prompt or linear that is worst, or the first that is wrong

    @classmethod
    def at_most(cls, format: str, level: str, name: str, value: float, gate: float, **kw) -> Check:
        """Passed if value ≤ gate; NaN fails."""
        return cls(format, level, name, "passed" if value <= gate else "failed", value, gate, **kw)

    @classmethod
    def not_run(cls, format: str, level: str, name: str, why: str) -> Check:
        return cls(format, level, name, "not run", detail=why)


@dataclass
class TensorRow:
    name: str
    shape: tuple[int, ...]
    type: str
    nbytes: int


@dataclass
class Inspection:
    """What `vlmq-export inspect` prints."""

    kind: str  # "GGUF v3", "GPTQ v1 safetensors", "ONNX IR 10", "artifact"
    metadata: dict[str, str]
    tensors: list[TensorRow]
    bits_per_weight: float  # over the tensors that look quantized


def compare_weights(
    format: str, name: str, expected: Iterable[tuple[str, np.ndarray]], read, *, count: int, detail: str = ""
) -> Check:
    """L1: every expected weight against what a reader finds in the file, as float32, bit for bit but for the sign of 0.

    `expected` yields (hub name, array); `read(hub name)` returns the decoded array or None. `count` is the model's own
    number of weights: comparing fewer is a failure, and so is a missing tensor or one of another shape.
    """
    compared = mismatched = 0
    bad: list[str] = []
    for tensor, want in expected:
        got = read(tensor)
        compared += want.size
        if got is None or got.shape != want.shape:
            wrong = want.size
        else:
            wrong = int((np.asarray(got, np.float32) != np.asarray(want, np.float32)).sum())
        if wrong:
            mismatched += wrong
            bad.append(f"{tensor} ({'missing' if got is None else wrong})")
    complete = compared == count
    return Check(
        format, "L1", name, "passed" if complete and not mismatched else "failed", float(mismatched), 0.0, "mismatches",
        compared, detail if complete else f"compared {compared} of the model's {count} weights", ", ".join(bad[:8]),
    )  # fmt: skip


def answers_row(
    format: str,
    name: str,
    verdicts: Mapping[str, str],
    allowed: float = 0.0,
    *,
    unit: str = "answers",
    detail: str = "",
) -> Check:
    """L3: prompt → verdict of `Reference.judge`. An answer that left the reference's at a tie is counted, and passes."""
    other, ties = ([p for p, said in verdicts.items() if said == kind] for kind in ("other", "tie"))
    tied = f"{len(ties)} more part at a tie: two tokens that the logits' gate cannot tell apart" if ties else ""
    return Check.at_most(
        format, "L3", name, float(len(other)), allowed, unit=unit, compared=len(verdicts),
        detail="; ".join(filter(None, (detail, tied))), worst=", ".join([*other, *ties][:8]),
    )  # fmt: skip


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    """‖a − b‖₂ / ‖b‖₂ over everything, in float64."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))
