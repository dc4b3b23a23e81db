"""Exact match per task of a checkpoint folder on the bundled held-out questions.

    python -m tools.reference_vlm.score MODEL_DIR --rows N

Decoding is greedy, and the weights run in float32.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from PIL import Image

from tools.reference_vlm import model as qwen
from tools.reference_vlm import onevision, smolvlm
from tools.reference_vlm.model import BUNDLED, load_model, load_tokenizer

Question = tuple[Image.Image, str]  # image, question
Asked = tuple[str, Question, str]  # task, question, answer
BATCHES = {"llava_onevision": onevision.make_batch, "idefics3": smolvlm.make_batch}
HELDOUT = BUNDLED / "data" / "heldout.json"


def load_rows(path: Path, limit: int | None = None) -> list[Asked]:
    """The first `limit` rows of a JSON file that make_data wrote; None: all."""
    rows = []
    for record in json.loads(path.read_text())[:limit]:
        human, gpt = (turn["value"] for turn in record["conversations"])
        image = Image.open(path.parent / record["image"]).convert("RGB")
        rows.append((record["task"], (image, human.removeprefix("<image>\n")), gpt))
    return rows


@torch.inference_mode()
def answer(model, tokenizer, questions: list[Question], *, batch_size: int = 32) -> list[str]:
    """The model's greedy answer to each question.

    Only prompts of one length and one image size share a batch. Nothing is padded then, and an
    answer does not depend on the other rows of its batch.
    """
    make_batch = BATCHES.get(model.config.model_type, qwen.make_batch)
    groups = defaultdict(list)
    for place, (image, question) in enumerate(questions):
        groups[image.size, len(tokenizer(question)["input_ids"])].append(place)
    answers = [""] * len(questions)
    for places in groups.values():
        for start in range(0, len(places), batch_size):
            batch = places[start : start + batch_size]
            inputs = make_batch(tokenizer, [(*questions[place], None) for place in batch])
            del inputs["labels"]
            length = inputs["input_ids"].shape[1]
            tokens = model.generate(
                **inputs,
                max_new_tokens=8,
                do_sample=False,
                eos_token_id=model.generation_config.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
            for place, row in zip(batch, tokens[:, length:]):
                answers[place] = tokenizer.decode(row, skip_special_tokens=True).strip()
    return answers


def exact_match(model, tokenizer, rows: list[Asked]) -> dict[str, float]:
    """The share of questions answered exactly: per task, and as `all` over all rows."""
    hits = defaultdict(list)
    said = answer(model, tokenizer, [question for _, question, _ in rows])
    for (task, _, expected), got in zip(rows, said):
        hits[task].append(got == expected)
        hits["all"].append(got == expected)
    hits["all"] = hits.pop("all")  # the last of the shares
    return {task: sum(good) / len(good) for task, good in hits.items()}


def main(
    model_dir: Annotated[Path, typer.Argument(help="Checkpoint folder in the hub's layout")],
    rows: Annotated[int, typer.Option(min=1, help="How many of the rows to ask")] = 512,
    data: Annotated[Path, typer.Option(help="Questions, as make_data writes them")] = HELDOUT,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads")] = 2,
) -> None:
    """Print a checkpoint's exact match per task."""
    torch.set_num_threads(threads)
    scores = exact_match(load_model(model_dir), load_tokenizer(model_dir), load_rows(data, rows))
    for task, share in scores.items():
        typer.echo(f"{task:8}{share:.3f}")


if __name__ == "__main__":
    typer.run(main)
