"""The proof of a GGUF export in llama.cpp itself, on the CPU.

    L1  every weight of both files by three readers, bit for bit; metadata and names complete
    L2  every product of the real run against the emulated activation rounding
    L3  the float32 twin of the shipped file, on text and on the reference's own vision features;
        and the shipped files with images through mtmd

llama.cpp rounds activations to 8 bits. The logits of a perfect file are 1e-2 away from those of a
float32 model for that, and a wrong scale moves them by 1e-5. So no bound on the logits of the
shipped file could find a fault. L1, L2 and the twin carry the proof.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from vlmq_export.errors import FormatError, MissingRuntime
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.proof.float_twin import float_twin
from vlmq_export.formats.gguf.proof.rows import Exported, failed
from vlmq_export.formats.gguf.proof.shipped import shipped
from vlmq_export.formats.gguf.proof.weights import completeness, weights_read_back
from vlmq_export.formats.gguf.requirements import missing
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.proof.checks import Check, CheckSettings
from vlmq_export.formats.proof.reference import Reference

# The rows of a step that cannot run, by level and name.
_SHIPPED = (("L2", "every product"), ("L3", "shipped file through mtmd"))
_TWIN = (("L3", "float32 twin"),)


def check(
    folder: Path, reference: Reference, options: FormatOptions, settings: CheckSettings
) -> list[Check]:
    """All rows. A step that cannot run says so.

    A file that llama.cpp refuses is a failed row, and never an exception.
    """
    if absent := missing():
        why = f"{absent} not installed; pip install 'vlmq-export[gguf]'"
        names = (("L1", "weights"), *_SHIPPED, *_TWIN)
        return [Check.not_run("gguf", level, name, why) for level, name in names]
    try:
        export = Exported.open(Path(folder), reference, settings)
        export.steps.begin("weights")
        rows = [completeness(export), *weights_read_back(export)]
    except FormatError as e:
        return [failed("L1", "files", str(e))]
    why = reference.too_large
    if not why and not export.pictured:
        why = "no held-out prompt has an image; give --verify-data with images"
    if why:
        names = (*_SHIPPED, *_TWIN)
        return [*rows, *(Check.not_run("gguf", level, name, why) for level, name in names)]
    with tempfile.TemporaryDirectory(prefix="vlmq-gguf-") as scratch:
        for step, names in ((shipped, _SHIPPED), (float_twin, _TWIN)):
            place = Path(scratch) / step.__name__
            place.mkdir()
            try:
                rows += [*step(export, place)]
            except MissingRuntime as e:
                rows += [Check.not_run("gguf", level, name, str(e)) for level, name in names]
            except (runner.RunFailed, FormatError) as e:
                rows += [failed(level, name, str(e)) for level, name in names]
    return rows
