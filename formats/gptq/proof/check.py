"""The proof of a GPTQ folder: three decoders, every linear, and the whole model.

    L1  every weight by our reader, by AutoGPTQ's decoder, and by gptqmodel in the loaded model
    L2  each quantized linear alone in its kernel
    L3  logits and greedy answers of transformers with gptqmodel

transformers gives every linear one width, and has all experts of a layer in one parameter. A folder
of mixed widths, or with experts, is loaded by GPTQModel.load, which builds the same modules in
transformers' model.

The model is run in float32 with the kernel gptq_torch. The kernel that the loader picks by itself
computes in float16, and is reported without a gate.
"""

from __future__ import annotations

import sys
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.proof import autogptq
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.gptq.requirements import missing
from vlmq_export.formats.in_transformers.proof import rows
from vlmq_export.formats.in_transformers.proof.rows import AtWork, Program, own_decoder, rows_of
from vlmq_export.formats.proof.checks import Check, CheckSettings, Steps, compare_weights
from vlmq_export.formats.proof.reference import Reference


def program(bits: int, *, alone: bool = False) -> Program:
    """gptqmodel on a folder of so many bits. alone: transformers cannot load it."""
    exact = {"backend": "gptq_torch"} | ({"alone": True} if alone else {"bits": bits})
    return Program(
        "gptq",
        worker="vlmq_export.formats.gptq.proof.worker",
        library="gptqmodel",
        exact="GPTQModel.load in float32" if alone else "gptq_torch in float32",
        widened="scales upcast to float32",
        exact_loading=exact,
        usual_loading={"alone": True} if alone else {},
        advice="load with backend=BACKEND.GPTQ_TORCH"
        if alone
        else f'load with GPTQConfig(bits={bits}, backend="gptq_torch")',
        # GPTQModel's C++ kernel takes about 100 s to compile on 2 cores.
        usual_seconds=420.0,
    )


def program_for(folder: GptqFolder) -> Program:
    """gptqmodel on this folder."""
    return program(folder.bits, alone=folder.mixed or folder.family.sparse)


def at_work(
    folder: Path, reference: Reference, settings: CheckSettings
) -> AbstractContextManager[AtWork]:
    """gptqmodel at work on a folder until the context ends. `check` takes what it leaves.

    Raises FormatError when the folder cannot be opened.
    """
    return rows.at_work(program_for(GptqFolder(folder)), folder, reference, settings)


def check(
    folder: Path,
    reference: Reference,
    options: FormatOptions,
    settings: CheckSettings,
    begun: AtWork | None = None,
) -> list[Check]:
    """All rows. A check that fails or cannot run is a row too.

    begun: where the runtime is at work already, because other formats were checked meanwhile.

    Raises FormatError when the folder cannot be opened.
    """
    steps = Steps(settings.tell, rows.PARTS)
    steps.begin("weights")
    opened = GptqFolder(folder)
    found = [own_decoder(opened, reference), autogptq_decoder(opened, reference)]
    if lacking := missing():
        why = f"{lacking} not installed; pip install 'vlmq-export[gptq]'"
    else:
        why = reference.too_large
    if why:
        return found + program_for(opened).not_run(why)
    return found + rows_of(program_for(opened), opened, reference, settings, steps, begun)


def autogptq_decoder(folder: GptqFolder, reference: Reference) -> Check:
    """Every quantized linear by AutoGPTQ's QuantLinear, which knows v1 only."""
    name, weights = "linears decoded by AutoGPTQ 0.7.1", reference.weights
    if folder.version != "v1":
        return Check("gptq", "L1", name, "info", detail="AutoGPTQ reads v1 only; this folder is v2")
    file = autogptq.source_file()
    if file is None and sys.version_info >= (3, 12):
        return Check("gptq", "L1", name, "info", detail="not run: its wheels end at Python 3.11")
    if file is None:
        why = "not installed; pip install --no-deps auto-gptq==0.7.1"
        return Check.not_run("gptq", "L1", name, why)
    module = autogptq.load(file)
    count = sum(weights.tensor(f"{n}.codes").numel() for n in weights.linears)
    expected = ((f"{n}.weight", weights.array(f"{n}.weight")) for n in weights.linears)

    def read(weight: str) -> np.ndarray | None:
        stored = folder.stored_name(weight.removesuffix(".weight"))
        if f"{stored}.qweight" not in folder.tensors:
            return None
        return autogptq.decode(module, folder, stored)

    # The last two are what its tensor code raises on damaged parts.
    try:
        return compare_weights("gptq", name, expected, read, count=count)
    except (FormatError, RuntimeError, IndexError) as e:
        return Check("gptq", "L1", name, "failed", detail=str(e).splitlines()[0], unit="mismatches")
