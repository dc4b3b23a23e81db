"""Greedy answers of a compressed-tensors folder, in transformers."""

from __future__ import annotations

from pathlib import Path

from vlmq_export.errors import MissingRuntime
from vlmq_export.formats.compressed_tensors.proof.check import NEEDS, program
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.compressed_tensors.requirements import missing
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.in_transformers.proof import answer
from vlmq_export.formats.proof.answers import Answerer
from vlmq_export.formats.proof.reference import Reference


def answerer(folder: Path, reference: Reference, options: FormatOptions, threads: int) -> Answerer:
    """Answers with the weights that the library decodes.

    Raises MissingRuntime, and FormatError for a folder that cannot be read.
    """
    if lacking := missing():
        raise MissingRuntime(f"{lacking} not installed; {NEEDS}")
    return answer.answerer(program(CompressedFolder(folder)), folder, reference, threads)
