"""Greedy answers of a GPTQ folder, in transformers with gptqmodel."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.errors import MissingRuntime
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.proof.check import program_for
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.gptq.requirements import missing
from vlmq_export.formats.in_transformers.proof import answer
from vlmq_export.formats.proof.answers import Answerer
from vlmq_export.formats.proof.reference import Reference


def answerer(folder: Path, reference: Reference, options: FormatOptions, threads: int) -> Answerer:
    """Answers by the kernel gptq_torch.

    Raises MissingRuntime, and FormatError for a folder that cannot be read.
    """
    if lacking := missing():
        raise MissingRuntime(f"{lacking} not installed; pip install 'vlmq-export[gptq]'")
    return answer.answerer(program_for(GptqFolder(folder)), folder, reference, threads)
