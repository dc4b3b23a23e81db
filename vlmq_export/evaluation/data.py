"""Where the rows of a benchmark come from: a folder of the user, or the hub."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vlmq_export.errors import BenchmarkError, one_line
from vlmq_export.evaluation.benchmarks import Benchmark

SAVED = "dataset_dict.json"  # of a folder that `save_to_disk` wrote


def placed(config: dict, task: str, data: Path | None) -> dict:
    """lmms-eval's settings of a task, with the place of its rows.

    data: a folder with one folder for each benchmark, which has the name of the task or of the
        dataset on the hub. It was written by `save_to_disk`, or has parquet files whose names begin
        with the split, as on the hub. None: the hub.

    Raises BenchmarkError for a folder that is not there, or has no such files.
    """
    if data is None:
        return config
    folder = _folder(config, task, data)
    if (folder / SAVED).is_file():
        local = {"dataset_path": str(folder), "dataset_kwargs": {"load_from_disk": True}}
    else:
        files = list(_parquet(folder, config))
        if not files:
            raise BenchmarkError(
                f"{task}: {folder} has neither {SAVED} nor {split_of(config)}*.parquet; save the"
                " dataset with save_to_disk, or copy the hub's parquet files"
            )
        found = {split_of(config): [str(file) for file in files]}
        local = {"dataset_path": "parquet", "dataset_kwargs": {"data_files": found}}
    return config | local | {"dataset_name": None}


def split_of(config: dict) -> str:
    """The split that lmms-eval asks."""
    return config.get("test_split") or config["validation_split"]


def opened(config: dict, benchmark: Benchmark) -> Any:  # a datasets.Dataset
    """The rows of a benchmark from where its settings say.

    Raises BenchmarkError where they cannot be had, and for a missing split or column.
    """
    import datasets

    options = dict(config.get("dataset_kwargs") or {})
    path, name = config["dataset_path"], config.get("dataset_name")
    try:
        if options.pop("load_from_disk", False):
            every: Any = datasets.load_from_disk(path)
        else:
            every = datasets.load_dataset(path, name, **options)
    except Exception as e:  # of the hub's client, of datasets, of pyarrow
        why = one_line(str(e).strip().splitlines()[0] if str(e).strip() else type(e).__name__)
        if path == "parquet" or "load_from_disk" in (config.get("dataset_kwargs") or {}):
            raise BenchmarkError(f"{benchmark.task}: its rows cannot be read ({why})") from None
        raise BenchmarkError(
            f"{benchmark.task}: {path} is not to be had from the hub ({why});"
            f" give --data DIR with the dataset in DIR/{benchmark.task}"
        ) from None
    split = split_of(config)
    splits = list(map(str, every)) if isinstance(every, datasets.DatasetDict) else []
    if split not in splits:
        has = ", ".join(splits) or "rows without a split"
        raise BenchmarkError(f"{benchmark.task}: no split {split}; the dataset has {has}")
    rows = every[split]
    _refuse_columns(rows, benchmark)
    return rows


def first_row(rows: Any, task: str) -> None:
    """Decode the first row, as lmms-eval does to try a task. Raises BenchmarkError."""
    try:
        rows[0]
    except Exception as e:  # of Pillow's decoders
        why = one_line(str(e) or type(e).__name__)
        raise BenchmarkError(f"{task} 0: its image cannot be read ({why})") from None


def _folder(config: dict, task: str, data: Path) -> Path:
    """The folder of one benchmark in the folder of all."""
    names = [task, config["task"], str(config["dataset_path"]).rpartition("/")[2]]
    found = [data / name for name in dict.fromkeys(names) if (data / name).is_dir()]
    if not found:
        raise BenchmarkError(
            f"{task}: no folder {' or '.join(dict.fromkeys(names))} in --data {data}"
        )
    return found[0]


def _parquet(folder: Path, config: dict) -> Iterator[Path]:
    """The files of the task's split, in the folder itself or where the hub has them."""
    split, name = split_of(config), str(config.get("dataset_name") or "default")
    for place in (folder, folder / "data", folder / name):
        files = sorted(place.glob(f"{split}*.parquet"))
        if files:
            yield from files
            return


def _refuse_columns(rows: Any, benchmark: Benchmark) -> None:
    """Raises BenchmarkError for rows without a column or without images, and where none are."""
    import datasets

    lacking = [name for name in benchmark.columns if name not in rows.column_names]
    if lacking:
        raise BenchmarkError(
            f"{benchmark.task}: no column {', '.join(lacking)};"
            f" the rows have {', '.join(rows.column_names)}"
        )
    if "image" in benchmark.columns and not isinstance(rows.features["image"], datasets.Image):
        raise BenchmarkError(f"{benchmark.task}: column image holds no images; cast it to Image()")
    if not len(rows):
        raise BenchmarkError(f"{benchmark.task}: no rows")
