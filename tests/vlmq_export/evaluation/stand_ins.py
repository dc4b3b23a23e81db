"""Small stand-ins of the papers' benchmarks, with the columns that lmms-eval's code reads.

Their pictures are the bundled held-out ones. What a row asks is no matter to the scoring, and
`right` has the answer that must get full marks.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path

import datasets

from vlmq_export import bundled

_KINDS = (
    "Regular Text Recognition",
    "Scene Text-centric VQA",
    "Doc-oriented VQA",
    "Handwritten Mathematical Expression Recognition",
)
_AREAS = ("Perception/Remote Sensing", "Reasoning/Monitoring", "Perception/Diagram and Table")


def held_out(task: str, count: int) -> list[tuple[str, str, Path]]:
    """(question, answer, image file) of bundled held-out rows of one kind."""
    rows = json.loads(bundled.HELDOUT.read_text("utf-8"))
    return [
        (
            row["conversations"][0]["value"].removeprefix("<image>\n"),
            row["conversations"][1]["value"],
            bundled.HELDOUT.parent / row["image"],
        )
        for row in rows
        if row["task"] == task
    ][:count]


def _letters(n: int, answer: str) -> tuple[list[str], str]:
    """Four options, of which one is the answer, and its letter."""
    options = [f"not {answer} {k}" for k in range(4)]
    options[n % 4] = answer
    return options, "ABCD"[n % 4]


def _chart(n: int, question: str, answer: str, file: Path) -> dict:
    kind = "human_test" if n % 2 else "augmented_test"
    return {"type": kind, "question": question, "answer": answer, "image": str(file)}


def _document(n: int, question: str, answer: str, file: Path) -> dict:
    row = {"questionId": str(n), "question": question, "answers": [answer, f"{answer} "]}
    return row | {"image": str(file)}


def _realworld(n: int, question: str, answer: str, file: Path) -> dict:
    options, letter = _letters(n, answer)
    return {
        "index": n,
        "question": question,
        "multi-choice options": [f"({x}) {o}" for x, o in zip("ABCD", options)],
        "answer": letter,
        "category": _AREAS[n % 3],
        "l2-category": "color",
        "bytes": base64.b64encode(file.read_bytes()).decode(),
    }


def _ocr(n: int, question: str, answer: str, file: Path) -> dict:
    dataset = "HME100k" if n % 4 == 3 else "IIIT5K"
    row = {"dataset": dataset, "question": question, "question_type": _KINDS[n % 4]}
    return row | {"answer": [answer], "image": str(file)}


def _science(n: int, question: str, answer: str, file: Path) -> dict:
    options, letter = _letters(n, answer)
    image = None if n % 3 == 2 else str(file)  # a third of the rows are text alone
    row = {"question": question, "choices": options, "answer": "ABCD".index(letter)}
    return row | {"hint": "It is drawn." if n % 2 else "", "image": image}


def _seed(n: int, question: str, answer: str, file: Path) -> dict:
    options, letter = _letters(n, answer)
    row = {f"choice_{x}": o for x, o in zip("ABCD", options)} | {"answer": letter}
    kind = ("chart", "map", "web")[n % 3]
    row |= {"question": question, "question_id": str(n), "question_image_type": kind}
    return row | {"image": str(file)}


def _scene(n: int, question: str, answer: str, file: Path) -> dict:
    row = {"question": question, "question_id": n, "answers": [answer] * 10}
    return row | {"ocr_tokens": [answer], "image": str(file)}


# name of the folder → (split, kind of held-out rows, one row)
LAYOUTS: dict[str, tuple[str, str, Callable[[int, str, str, Path], dict]]] = {
    "chartqa": ("test", "bars", _chart),
    "docvqa_val": ("validation", "form", _document),
    "mmerealworld": ("train", "shapes", _realworld),
    "mmerealworld_cn": ("train", "shapes", _realworld),
    "ocrbench": ("test", "read", _ocr),
    "ScienceQA": ("test", "shapes", _science),
    "seedbench_2_plus": ("test", "bars", _seed),
    "textvqa_val": ("validation", "digits", _scene),
}


def rows(name: str, count: int) -> datasets.Dataset:
    """The rows of a stand-in."""
    _, kind, row = LAYOUTS[name]
    made = [row(n, *each) for n, each in enumerate(held_out(kind, count))]
    found = datasets.Dataset.from_list(made)
    if "image" not in found.column_names:
        return found
    found = found.cast_column("image", datasets.Image())
    # With the pictures themselves in the files, as on the hub.
    return found.map(lambda row: row, features=found.features, load_from_cache_file=False)


def write(folder: Path, name: str, count: int = 6, *, parquet: bool = False) -> None:
    """Write a stand-in into `folder`, as `save_to_disk` does, or as the hub has parquet files."""
    split, made = LAYOUTS[name][0], rows(name, count)
    if not parquet:
        datasets.DatasetDict({split: made}).save_to_disk(str(folder / name))
        return
    place = folder / name / "data"
    place.mkdir(parents=True)
    made.to_parquet(str(place / f"{split}-00000-of-00001.parquet"))


def write_all(folder: Path, count: int = 6) -> None:
    """All eight, half of them as parquet files."""
    for n, name in enumerate(LAYOUTS):
        write(folder, name, count, parquet=bool(n % 2))


def right(name: str, row: dict) -> str:
    """The answer to a row of a task that must get full marks."""
    if name.startswith("scienceqa"):
        return "ABCD"[row["answer"]]
    answer = row.get("answers", row.get("answer"))
    return answer[0] if isinstance(answer, list) else str(answer)


def damaged(file: Path) -> bytes:
    """An image file that ends too early."""
    whole = file.read_bytes()
    return whole[: len(whole) // 2]
