"""Rows → samples, images decoded in several processes where there are enough of them to pay for starting these."""

from __future__ import annotations

import logging
import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import torch

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample, truncate

log = logging.getLogger("vlmq_export")
MANY = 128  # rows from which on worker processes are worth the seconds that they take to start
MAX_WORKERS = 8
_SHOWN = 5


def read_samples(
    folder: Path, rows: Sequence[Row], seq_len: int, *, workers: int | None = None, progress: Callable[[int], None]
) -> tuple[list[Sample], int]:
    """The samples of at most `seq_len` tokens, in the order of the rows, and how many were dropped for their images.

    `workers` 1 decodes in this process; None chooses. `progress` is told after each row, and may raise to stop. Raises
    CalibrationError once, for all rows that cannot be used.
    """
    samples, dropped, bad = [], 0, []
    for done, (row, (sample, error)) in enumerate(zip(rows, _decoded(folder, rows, seq_len, workers)), start=1):
        if error:
            bad.append(f"{row.where or row.id}: {error}")
        elif sample is None:
            dropped += 1
        else:
            samples.append(sample)
        progress(done)
    if bad:
        for line in bad[_SHOWN:]:
            log.error("%s", line)
        more = f" (and {len(bad) - _SHOWN} more, above)" if len(bad) > _SHOWN else ""
        raise CalibrationError(f"{len(bad)} of {len(rows)} samples cannot be used: " + "; ".join(bad[:_SHOWN]) + more)
    return samples, dropped


def worker_count(rows: int) -> int:
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if rows >= MANY else 1


def _decoded(folder: Path, rows: Sequence[Row], seq_len: int, workers: int | None) -> Iterator:
    workers = workers or worker_count(len(rows))
    if workers == 1:
        preprocessor = Preprocessor(folder)
        yield from (_decode(preprocessor, row, seq_len) for row in rows)
        return
    Preprocessor(folder)  # what is wrong with the folder is said here, not by a pool whose workers all died
    # Spawned, not forked: this process has threads by now.
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _start, (folder,))
    try:
        for sample, error in pool.map(_work, rows, [seq_len] * len(rows), chunksize=4):
            yield (None if sample is None else _mapped(sample, np.ndarray, torch.from_numpy)), error
    except BrokenProcessPool:
        raise CalibrationError(
            "a process that decodes images was killed, most likely for its memory; free some, or take smaller images"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _decode(preprocessor: Preprocessor, row: Row, seq_len: int) -> tuple[Sample | None, str]:
    """(the sample, or None if it was dropped; what is wrong with the row, or nothing). The images themselves are not kept."""
    try:
        sample = truncate(preprocessor.sample(row), seq_len)
    except CalibrationError as e:
        return None, str(e)
    return (None if sample is None else replace(sample, images=())), ""


def _start(folder: Path) -> None:
    global _preprocessor
    torch.set_num_threads(1)
    _preprocessor = Preprocessor(folder)


def _work(row: Row, seq_len: int) -> tuple[Sample | None, str]:
    """As `_decode`, with arrays for tensors: those would come back through a file descriptor each."""
    sample, error = _decode(_preprocessor, row, seq_len)
    return (None if sample is None else _mapped(sample, torch.Tensor, lambda t: t.numpy())), error


def _mapped(sample: Sample, kind: type, change: Callable) -> Sample:
    def one(value):
        if isinstance(value, dict):
            return {k: one(v) for k, v in value.items()}
        return change(value) if isinstance(value, kind) else value

    return replace(sample, **{f.name: one(getattr(sample, f.name)) for f in fields(sample)})
