"""The VLMQ paper's calibration set: 512 pairs of ShareGPT4V's COCO captions.

    python -m tools.replication.pairs sharegpt4v_instruct_gpt4-vision_cap100k.json \
        --images data/ --model Qwen/Qwen2.5-VL-7B-Instruct --out pairs.json

The JSON is what ShareGPT4V published: rows with `image`, such as coco/train2017/000000000009.jpg,
and `conversations`. Its rows about COCO are drawn by a seed. As in the paper (appendix D), a sample
is cut to the length of the family, and one whose image would be cut is left out and replaced by the
next. Which pairs the paper drew is not known.

`pairs.json` goes to `--calibration`, and the folder of the images to `--image-root`.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

from vlmq_export.errors import CalibrationError, VlmqError
from vlmq_export.quantizer.samples.layouts import conversation
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.sources.locate import locate_model

COCO = "coco/"  # what the path of an image of COCO begins with


def draw(
    rows: list[dict],
    images: Path,
    preprocessor: Preprocessor,
    *,
    samples: int,
    seq_len: int,
    seed: int,
) -> list[dict]:
    """As many rows about COCO as asked for, whose images are not cut at `seq_len` tokens.

    Raises CalibrationError where there are not as many, and for an image that is not there.
    """
    about = [row for row in rows if str(row.get("image", "")).startswith(COCO)]
    random.Random(seed).shuffle(about)
    kept = []
    for row in about:
        if len(kept) == samples:
            break
        length = preprocessor.length(_row(row, images))
        if length.cut(seq_len) is not None:
            kept.append(row)
    if len(kept) < samples:
        raise CalibrationError(
            f"{len(about)} rows are about {COCO}, and the images of {len(kept)} fit into {seq_len}"
            f" tokens; {samples} are asked for"
        )
    return kept


def _row(raw: dict, images: Path) -> Row:
    """A published row with its image file."""
    messages, named = conversation(raw)
    files = [images / str(name) for name in named]
    for file in files:
        if not file.is_file():
            raise CalibrationError(f"{file}: not there; --images is the folder that holds {COCO}")
    return Row(str(raw.get("id", "")), tuple(messages), tuple(files))


def _read(path: Path) -> list[Any]:
    """The published rows. Raises CalibrationError for a file that holds something else."""
    try:
        rows = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise CalibrationError(f"{path}: cannot be read ({e})") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise CalibrationError(f"{path}: a list of rows is expected")
    return rows


def _options(words: list[str] | None) -> argparse.Namespace:
    as_written = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_written)
    parser.add_argument("json", type=Path, help="ShareGPT4V's captions")
    parser.add_argument("--images", type=Path, required=True, help=f"folder that holds {COCO}")
    parser.add_argument("--model", help="MODEL whose tokens are counted; default: the bundled one")
    parser.add_argument("--out", type=Path, default=Path("pairs.json"))
    parser.add_argument("--samples", type=int, default=512)
    parser.add_argument("--seq-len", type=int, help="default: the paper's for the family")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(words)


def main(words: list[str] | None = None) -> int:
    """Write the drawn rows. Returns the exit code."""
    asked = _options(words)
    try:
        preprocessor = Preprocessor(locate_model(asked.model))
        kept = draw(
            _read(asked.json),
            asked.images,
            preprocessor,
            samples=asked.samples,
            seq_len=asked.seq_len or preprocessor.family.seq_len,
            seed=asked.seed,
        )
    except VlmqError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    asked.out.write_text(json.dumps(kept, indent=1) + "\n", "utf-8")
    print(f"{asked.out}: {len(kept)} pairs")
    return 0


if __name__ == "__main__":
    sys.exit(main())
