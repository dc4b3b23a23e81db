"""Rows in parquet files, and in folders that `Dataset.save_to_disk` of Hugging Face wrote.

pyarrow and datasets are an extra of the package, and are imported when such a file is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.storage.untrusted import third_party

_SAVED = ("dataset_info.json", "dataset_dict.json")  # of one split, and of several
_BATCH = 64  # rows that are decoded at a time


def is_table(path: Path) -> bool:
    """Whether a path is a parquet file, by its content, or the folder of a saved dataset."""
    if path.is_dir():
        return any((path / name).is_file() for name in _SAVED)
    if not path.is_file():
        return False
    with path.open("rb") as f:
        return f.read(4) == b"PAR1"


def table_rows(path: Path, most: int) -> Iterator[tuple[str, dict]]:
    """(place, row) of every row. Images of a dataset are {"bytes", "path"}, not decoded.

    most: bytes that the rows may have when they are decompressed. Raises CalibrationError for a
    table that has more or cannot be read, and where the extra is not installed.
    """
    number = size = 0
    batches = _dataset(path) if path.is_dir() else _parquet(path, most)
    with third_party(f"{path}: cannot be read as a table", CalibrationError):
        for batch in batches:
            size += batch.nbytes
            if size > most:
                raise CalibrationError(
                    f"{path}: over {most} bytes when decompressed; draw some thousand rows from it"
                )
            for row in batch.to_pylist():
                yield f"row {number}", row
                number += 1


def _parquet(path: Path, most: int) -> Iterator[Any]:
    """The record batches of a parquet file."""
    file = _needed("pyarrow.parquet", path).ParquetFile(path)
    groups = (file.metadata.row_group(i) for i in range(file.metadata.num_row_groups))
    if (size := sum(group.total_byte_size for group in groups)) > most:
        raise CalibrationError(
            f"{path}: {size} bytes when decompressed, over {most}; draw some thousand rows from it"
        )
    yield from file.iter_batches(batch_size=_BATCH)


def _dataset(path: Path) -> Iterator[Any]:
    """The arrow tables of a saved dataset. Raises CalibrationError for several splits."""
    datasets = _needed("datasets", path)
    datasets.disable_progress_bars()
    dataset = datasets.load_from_disk(str(path))
    if isinstance(dataset, dict):
        splits = ", ".join(sorted(map(str, dataset)))
        raise CalibrationError(f"{path}: has several splits; give the folder of one: {splits}")
    yield from dataset.with_format("arrow").iter(batch_size=_BATCH)


def _needed(module: str, path: Path) -> Any:
    """A module of the extra. Raises CalibrationError where it is not installed."""
    try:
        return import_module(module)
    except ImportError:
        name = module.partition(".")[0]
        raise CalibrationError(
            f"{path}: {name} is needed to read it; pip install 'vlmq-export[data]'"
        ) from None
