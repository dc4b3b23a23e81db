"""The proof of an ONNX folder in ONNX Runtime and onnxruntime-genai.

L1  every weight by our reader and by the runtime; rotary tables at every position; the place of
    each expert
L2  each MatMulNBits node alone
L3  the whole model, and the answers of onnxruntime-genai from image files
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmq_export.errors import VlmqError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.proof.experts import expert_places
from vlmq_export.formats.onnx.proof.genai import genai_rows
from vlmq_export.formats.onnx.proof.nodes import linear_rows
from vlmq_export.formats.onnx.proof.rotary import rotary_tables
from vlmq_export.formats.onnx.proof.runner import PROVIDERS, available
from vlmq_export.formats.onnx.proof.weights import own_reader, runtime_reader
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE, whole_model_rows
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.onnx.requirements import missing
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps
from vlmq_export.formats.proof.reference import Reference

# The steps, and their shares of the time. The last is onnxruntime-genai.
_PARTS = {"weights": 5, "each linear": 5, "whole model": 20, "image files": 70}


@dataclass(frozen=True)
class _Stage:
    """A part of the proof."""

    part: str  # of _PARTS
    level: str
    rows: Callable[[], list[Check]]
    whole: str = ""  # what needs the whole reference model, in words; empty if nothing does


def check(
    folder: Path, reference: Reference, options: FormatOptions, settings: CheckSettings
) -> list[Check]:
    """All rows. What ONNX Runtime refuses becomes a failed row with its own words.

    Raises FormatError for a folder that is damaged.
    """
    if lacking := missing():
        why = f"{lacking} not installed"
        return [Check.not_run("onnx", f"L{n}", "ONNX Runtime", why) for n in (1, 2, 3)]
    rows: list[Check] = []
    provider = options.onnx_provider
    steps = Steps(settings.tell, _PARTS)
    for stage in _stages(folder, reference, settings, provider, steps):
        steps.begin(stage.part)
        if reference.too_large and stage.whole:
            rows.append(Check.not_run("onnx", stage.level, stage.whole, reference.too_large))
        elif stage.level != "L1" and not available(provider):
            name, why = f"ONNX Runtime on {provider}", f"no {PROVIDERS[provider]} here"
            rows.append(Check.not_run("onnx", stage.level, name, why))
        else:
            rows += _rows_of(stage, folder)
    return rows


def _stages(
    folder: Path, reference: Reference, settings: CheckSettings, provider: str, steps: Steps
) -> list[_Stage]:
    """The proof from the weights to the whole model."""
    written = OnnxFolder(folder)
    level = max(written.accuracy_levels)
    own = partial(own_reader, written, reference)
    runtime = partial(runtime_reader, written, reference, settings)
    tables = partial(rotary_tables, written, reference)
    places = partial(expert_places, written, reference)
    nodes = partial(linear_rows, written, reference, settings, provider)
    model = partial(whole_model_rows, folder, written, reference, settings, provider, steps)
    genai = partial(genai_rows, folder, reference, settings, level, FORMAT_GATE, steps)
    return [
        _Stage("weights", "L1", own),
        _Stage("weights", "L1", runtime),
        _Stage("weights", "L1", places),
        _Stage("weights", "L1", tables, whole="tables"),
        _Stage("each linear", "L2", nodes),
        _Stage("whole model", "L3", model, whole="whole model"),
        _Stage("image files", "L3", genai, whole="whole model"),
    ]


def _rows_of(stage: _Stage, folder: Path) -> list[Check]:
    """The rows of a stage, or a failed row for what the runtime raises."""
    try:
        return stage.rows()
    except VlmqError:
        raise
    # onnxruntime exports no common class of its errors.
    except Exception as e:
        # The row names files without the folders of this machine.
        said = " ".join(str(e).replace(f"{folder}/", "").split())[:200]
        return [Check("onnx", stage.level, "ONNX Runtime", "failed", detail=f"stopped: {said}")]
