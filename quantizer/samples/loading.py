"""Rows → samples. For many rows, images are decoded in several processes."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, allowed, leave_out
from vlmq_export.quantizer.samples.sample import Lengths, Sample, truncate

log = logging.getLogger("vlmq_export")
MANY = 128  # number of rows from which on worker processes are worth the time to start them
MAX_WORKERS = 8
START = 6.0  # seconds until a worker process has imported PyTorch and transformers, roughly
COUNTED = 512  # rows that are counted for a plan, at most
CHUNK = 4  # rows that a worker process takes at once
_SHOWN = 5  # bad rows that the error names; the log has the others


@dataclass(frozen=True)
class Limit:
    """How long a sample may be, and what is done to get there."""

    seq_len: int  # tokens
    scale: bool = True  # scale the images of a longer one down before anything is cut


@dataclass(frozen=True)
class Loaded:
    """What became of the rows."""

    samples: list[Sample]  # in the order of their rows
    scaled: int  # how many of them have images that were made smaller to fit
    dropped: int  # rows whose images would have been cut
    longest: int  # tokens of the longest dropped sample, which a longer limit would keep whole
    skipped: int = 0  # bad rows that were left out


def read_samples(
    folder: Path,
    rows: Sequence[Row],
    limit: Limit,
    *,
    bad: float = 0.0,
    workers: int | None = None,
    preprocessor: Preprocessor | None = None,  # the folder's own, where it was read already
    progress: Callable[[int], None],
) -> Loaded:
    """The samples of the rows, none of them longer than the limit.

    Samples are cut, and dropped where that would cut an image's tokens. `workers` is the number of
    processes: 1 decodes in this one, None chooses. `progress` is given the number of rows that are
    done, after each row, and may raise to stop. Raises CalibrationError once, for all rows that
    cannot be used, if they are more than the share `bad`.
    """
    samples: list[Sample] = []
    lengths: list[int] = []  # of dropped samples
    errors: list[str] = []
    decoded = _decoded(preprocessor or Preprocessor(folder), folder, rows, limit, workers)
    for done, (row, (sample, length, error)) in enumerate(zip(rows, decoded), start=1):
        if error:
            errors.append(f"{row.where or row.id}: {error}")
        elif sample is None:
            lengths.append(length)
        else:
            samples.append(sample)
        progress(done)
    if len(errors) > allowed(len(rows), bad):
        raise CalibrationError(_refusal(errors, len(rows)))
    leave_out("of the samples", "bad rows", errors, len(rows), bad)
    scaled = sum(sample.scaled for sample in samples)
    return Loaded(samples, scaled, len(lengths), max(lengths, default=0), len(errors))


def count_samples(
    preprocessor: Preprocessor, rows: Sequence[Row], limit: Limit, bad: float = 0.0
) -> tuple[Lengths, str]:
    """The lengths of the samples that `read_samples` would make of the rows, and why it would not.

    Texts are tokenized, and the headers of images are read, but no pixel is. Of many rows a share
    is counted, in equal steps. Rows are refused as `read_samples` refuses them, but for damaged
    pixels; the refusal is empty where there is none.
    """
    counted = rows[:: -(-len(rows) // COUNTED) or 1]
    found, errors = [], []
    for row in counted:
        try:
            length = preprocessor.length(row, seq_len=limit.seq_len if limit.scale else None)
        except CalibrationError as e:
            errors.append(f"{row.where or row.id}: {e}")
            continue
        if (kept := length.cut(limit.seq_len)) is not None:
            found.append(kept)
    refused = len(errors) > allowed(len(rows), bad)
    why = _refusal(errors, len(counted)) if refused else ""
    return Lengths(tuple(found), len(counted) / max(1, len(rows))), why


def _refusal(bad: Sequence[str], rows: int) -> str:
    """What is said of the bad ones of so many rows. The log has those that are too many for it."""
    for line in bad[_SHOWN:]:
        log.error("%s", line)
    more = f" (and {len(bad) - _SHOWN} more, above)" if len(bad) > _SHOWN else ""
    return f"{len(bad)} of {rows} samples cannot be used: " + "; ".join(bad[:_SHOWN]) + more


def worker_count(rows: int) -> int:
    """The number of processes for so many rows, by the CPUs that this process may use."""
    return min(MAX_WORKERS, len(os.sched_getaffinity(0))) if rows >= MANY else 1


# A row's sample, or None if it was dropped; the length before it was cut; what is wrong with the
# row, or an empty text.
_Decoded = tuple[Sample | None, int, str]


def _decoded(
    preprocessor: Preprocessor,
    folder: Path,
    rows: Sequence[Row],
    limit: Limit,
    workers: int | None,
) -> Iterator[_Decoded]:
    """The samples of the rows, in their order. Raises CalibrationError if a process was killed."""
    workers = workers or worker_count(len(rows))
    if workers == 1:
        yield from (_decode(preprocessor, row, limit) for row in rows)
        return
    with TemporaryDirectory(prefix="vlmq-samples-") as made:
        # The model's folder is readable by now: a pool would only say that its processes died. They
        # are spawned and not forked, because this process has threads.
        spawned = multiprocessing.get_context("spawn")
        pool = ProcessPoolExecutor(workers, spawned, _start, (folder, Path(made)))
        try:
            with _deaf_to_ctrl_c():
                places = range(len(rows))
                worked = pool.map(_work, places, rows, [limit] * len(rows), chunksize=CHUNK)
            for place in worked:
                file = Path(made) / str(place)
                found = torch.load(file, weights_only=False)  # of our own process
                file.unlink()
                yield found
        except BrokenProcessPool:
            raise CalibrationError(
                "a process that decodes images was killed, most likely for its memory;"
                " free some, or take smaller images"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started inside never see Ctrl-C, which a terminal sends to all of a session.

    This process answers it. One that comes meanwhile is seen afterwards.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _decode(preprocessor: Preprocessor, row: Row, limit: Limit) -> _Decoded:
    """One row. The sample does not keep the images themselves, which are large."""
    try:
        whole = preprocessor.sample(row, seq_len=limit.seq_len if limit.scale else None)
    except CalibrationError as e:
        return None, 0, str(e)
    sample = truncate(replace(whole, images=()), limit.seq_len)
    return sample, len(whole.input_ids), ""


# Of a worker process, since it started.
_preprocessor: Preprocessor
_folder: Path  # where its samples are put


def _start(model: Path, folder: Path) -> None:
    """Prepare a worker process."""
    global _preprocessor, _folder
    logging.disable(logging.WARNING)  # of libraries: ours come back with the samples
    torch.set_num_threads(1)
    _preprocessor, _folder = Preprocessor(model), folder


def _work(place: int, row: Row, limit: Limit) -> int:
    """`_decode` in a worker process. What it gives is in the file of that place.

    A sample does not go through the pool's pipe. A process that is killed there would leave half a
    message, for the rest of which the pool waits for ever.
    """
    torch.save(_decode(_preprocessor, row, limit), _folder / str(place))
    return place
