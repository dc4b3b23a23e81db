"""Rows of a calibration or held-out file → samples that the model can run.

Two layouts are read: the LLaVA/ShareGPT4V JSON list (`image`, `conversations`) and chat `messages` JSONL with image
paths. Every bad row is reported at once, by row or line number, before any weight is loaded.
"""

from __future__ import annotations

import codecs
import json
import logging
import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from vlmq_export.errors import CalibrationError, CheckpointError, MissingRuntime, one_line
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.images import Encoded, image_rule
from vlmq_export.quantizer.untrusted import read_json, third_party

log = logging.getLogger("vlmq_export")
MAX_PIXELS = 64 * 2**20  # an image larger than this is refused, not decoded
MAX_IMAGE_BYTES = 256 * 2**20
MAX_RATIO = 200  # of an image's sides: what Qwen's own preprocessing allows
MAX_ROWS_BYTES = 2 * 2**30  # of a file of rows: LLaVA's 665 000 take half
MAX_TEXT = 2**18  # characters of a row
MAX_IMAGES = 64  # of a row
IMAGE_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow knows more, and starts programs for some
_ARCHIVES = (b"PK\x03\x04", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"(\xb5/\xfd", b"PAR1", b"Rar!", b"7z\xbc\xaf")
_ERRORS_SHOWN = 5
_LONGEST_WHY, _LONGEST_ID = 300, 200  # characters


@dataclass(frozen=True)
class Row:
    """One conversation, whichever layout it came from. `messages` holds text and image parts in order."""

    id: str
    messages: tuple[dict, ...]  # {"role", "content": [{"type": "text", "text"} | {"type": "image"}]}
    images: tuple[Path, ...]
    task: str = ""
    where: str = ""  # row or line number in its file

    @property
    def answer(self) -> str:
        """Text of the last assistant turn, or empty."""
        last = self.messages[-1]
        return "".join(p.get("text", "") for p in last["content"]) if last["role"] == "assistant" else ""


@dataclass(frozen=True)
class Sample:
    """One tokenized row with its image patches, unpadded."""

    id: str
    input_ids: torch.Tensor  # int64 [S]
    vision: torch.Tensor  # bool [S], true at image tokens
    answer: torch.Tensor  # bool [S], true at the last assistant turn, its end token included
    pixel_values: torch.Tensor | None  # float32 [patches, channels·temporal·patch²] or [tiles, 3, side, side]
    image_grid_thw: torch.Tensor | None  # int64 [images, 3], of the former
    images: tuple[Image.Image, ...] = ()  # as fed, after resizing
    text: str = ""  # the prompt, one image placeholder an image
    row: Row | None = None
    layout: dict[str, torch.Tensor] = field(default_factory=dict)  # what else the model must know of the images
    mrope: bool = True

    def image_inputs(self) -> dict[str, torch.Tensor]:
        """Keyword arguments of the Hugging Face model's get_image_features; empty without images."""
        if self.pixel_values is None:
            return {}
        grid = {} if self.image_grid_thw is None else {"image_grid_thw": self.image_grid_thw}
        return {"pixel_values": self.pixel_values} | grid | self.layout

    def model_inputs(self, device: str | torch.device = "cpu") -> dict[str, torch.Tensor]:
        """Keyword arguments of the Hugging Face model, batch of one."""
        ids = self.input_ids[None]
        kwargs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)} | self.image_inputs()
        if self.mrope:
            kwargs["mm_token_type_ids"] = self.vision[None].long()
        return {k: v.to(device) for k, v in kwargs.items()}


def read_rows(path: Path, image_root: Path | None = None) -> list[Row]:
    """All rows of a file. Raises CalibrationError with the first few bad rows and their count."""
    _refuse_other_files(path)
    root = image_root or path.parent
    rows, errors = [], []
    for where, raw in _raw_rows(path):
        try:
            rows.append(_row(raw, root, where))
        except (ValueError, KeyError, TypeError, OSError) as e:
            why = e.args[0] if isinstance(e, ValueError) else f"malformed ({e!r})"
            errors.append(f"{where}: {one_line(why)[:_LONGEST_WHY]}")
    _refuse(path, "bad rows", errors)
    if not rows:
        raise CalibrationError(f"{path}: no rows")
    if twice := len(rows) - len({(str(row.messages), row.images) for row in rows}):
        log.warning("%s: %d of %d rows are in the file twice; the copies count as samples of their own",
                    path.name, twice, len(rows))  # fmt: skip
    return rows


def refuse_unreadable(path: Path, rows: Sequence[Row]) -> None:
    """Decode every image of `rows` once: what cannot be read is better known before hours of work than after.

    Raises CalibrationError with the first few and their count.
    """
    errors = []
    for image in dict.fromkeys(image for row in rows for image in row.images):
        try:
            load_image(image)
        except CalibrationError as e:
            errors.append(str(e))
    _refuse(path, "bad images", errors)


def _refuse(path: Path, what: str, errors: Sequence[str]) -> None:
    """Raises CalibrationError with the first few of `errors` and their count, if there are any."""
    if errors:
        more = f" (and {len(errors) - _ERRORS_SHOWN} more)" if len(errors) > _ERRORS_SHOWN else ""
        raise CalibrationError(f"{path}: {len(errors)} {what}: " + "; ".join(errors[:_ERRORS_SHOWN]) + more)


def _refuse_other_files(path: Path) -> None:
    """Raises CalibrationError for what is no file of rows, saying what to do with it."""
    if path.is_dir():
        raise CalibrationError(f"{path}: a folder; give the .json or .jsonl file in it")
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    if path.stat().st_size > MAX_ROWS_BYTES:
        raise CalibrationError(f"{path}: over {MAX_ROWS_BYTES} bytes; draw some thousand rows from it")
    with path.open("rb") as f:
        head = f.read(262)
    if head.startswith(_ARCHIVES) or head[257:] == b"ustar":
        raise CalibrationError(f"{path}: an archive; unpack it and give the .json or .jsonl file in it")


def _raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    """(where, row as JSON) of either layout; for a line that is no JSON, the error instead of the row."""
    if path.suffix == ".jsonl":
        with path.open("rb") as f:
            for number, line in enumerate(f, start=1):
                if line := line.removeprefix(codecs.BOM_UTF8 if number == 1 else b"").strip():
                    try:
                        yield f"line {number}", json.loads(line.decode("utf-8"))
                    except (ValueError, RecursionError) as e:
                        yield f"line {number}", ValueError(f"not JSON ({e})")
        return
    try:
        rows = json.loads(path.read_text("utf-8-sig"))
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    except (ValueError, RecursionError) as e:
        raise CalibrationError(f"{path}: not JSON ({e}); a file of one object a line must end in .jsonl") from None
    if not isinstance(rows, list):
        raise CalibrationError(f"{path}: a JSON list of rows is expected, got {type(rows).__name__}")
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def _row(raw: object, root: Path, where: str) -> Row:
    if isinstance(raw, ValueError):
        raise raw
    if not isinstance(raw, dict):
        raise ValueError("not an object")
    images = raw.get("image", raw.get("images", []))
    images = [images] if isinstance(images, str) else list(images or [])
    if "conversations" in raw:
        messages = [_llava_turn(turn) for turn in raw["conversations"]]
    elif "messages" in raw:
        messages = [_chat_turn(turn, images) for turn in raw["messages"]]
    else:
        raise ValueError("neither conversations nor messages")
    if not messages:
        raise ValueError("no turns")
    _check_text(messages)
    placeholders = sum(p["type"] == "image" for m in messages for p in m["content"])
    if placeholders != len(images):
        raise ValueError(f"{placeholders} image placeholders for {len(images)} images")
    if len(images) > MAX_IMAGES:
        raise ValueError(f"{len(images)} images; {MAX_IMAGES} in one row is the limit")
    paths = [_image_path(i, root) for i in images]
    identity, task = (one_line(raw.get(key, "") or "")[:_LONGEST_ID] for key in ("id", "task"))
    return Row(identity or where, tuple(messages), tuple(paths), task, where)


def _check_text(messages: list[dict]) -> None:
    texts = [p["text"] for m in messages for p in m["content"] if p["type"] == "text"]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a text that is no string")
    if any(0xD800 <= ord(c) < 0xE000 for text in texts if not text.isascii() for c in text):
        raise ValueError("a text with half a surrogate pair")  # which no tokenizer takes
    for number, message in enumerate(messages, start=1):
        if not any(p["type"] == "image" or p["text"].strip() for p in message["content"]):
            raise ValueError(f"turn {number} is empty")
    if (characters := sum(map(len, texts))) > MAX_TEXT:
        raise ValueError(f"{characters} characters of text; {MAX_TEXT} is the limit")


def _llava_turn(turn: dict) -> dict:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if turn["from"] not in roles:
        raise ValueError(f"unknown speaker {turn['from']!r}")
    # `<image>\n` stands for the image alone: the newline belongs to the layout, not to the prompt.
    parts = re.split(r"(<image>\n?|\n<image>$)", turn["value"])
    content = [{"type": "image"} if "<image>" in p else {"type": "text", "text": p} for p in parts if p]
    return {"role": roles[turn["from"]], "content": content}


def _chat_turn(turn: dict, images: list[str]) -> dict:
    role, content = turn["role"], turn["content"]
    if role not in ("system", "user", "assistant"):
        raise ValueError(f"unknown role {role!r}")
    if isinstance(content, str):
        return {"role": role, "content": [{"type": "text", "text": content}]}
    parts = []
    for p in content:
        if p["type"] == "text":
            parts.append({"type": "text", "text": p["text"]})
        elif p["type"] == "image":
            if path := p.get("image") or p.get("path"):
                images.append(path)
            parts.append({"type": "image"})
        else:
            raise ValueError(f"content of type {p['type']!r} is not supported")
    return {"role": role, "content": parts}


def _image_path(name: object, root: Path) -> Path:
    """A file under `root`, by its name alone: links that whoever made the folder put there are followed."""
    if not isinstance(name, str):
        raise ValueError(f"image {name!r} is no path")
    if "://" in name or name.startswith(("data:", "file:", "//", "\\\\")):
        raise ValueError(f"image {name} is a URL or a network path; download it and give a path")
    path, top = Path(os.path.abspath(root / name)), Path(os.path.abspath(root))  # noqa: PTH100 (links stay as they are)
    if not path.is_relative_to(top) or not path.is_file():
        raise ValueError(f"image {name} is not under {root}; set --image-root")
    return path


def load_image(path: Path) -> Image.Image:
    """RGB, upright by its EXIF tag, the first frame of several. Raises CalibrationError for what cannot be decoded, is
    too large or too narrow.
    """
    try:
        if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
            raise ValueError(f"{size} bytes; {MAX_IMAGE_BYTES} is the limit")
        # Pillow warns of sizes, which are checked here, and of damage that it can read past.
        with warnings.catch_warnings(action="ignore"), Image.open(path, formats=IMAGE_FORMATS) as image:
            w, h = image.size
            if w * h > MAX_PIXELS:
                raise ValueError(f"{w}×{h} pixels; {MAX_PIXELS} is the limit")
            if max(w, h) > MAX_RATIO * min(w, h):
                raise ValueError(f"{w}×{h} pixels; a side of {MAX_RATIO} times the other is the limit")
            return _eight_bits(ImageOps.exif_transpose(image)).convert("RGB")
    except MemoryError:
        raise
    except Exception as e:  # Pillow's plugins raise whatever a damaged file leads them to
        why = one_line(str(e).replace(str(path), "it"))[:_LONGEST_WHY]
        raise CalibrationError(f"{path}: cannot be read as an image ({why}); replace it or drop its row") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    """Pillow clips 16-bit grey to 255 where it should divide."""
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}; save it with 8 bits a channel")
    return image


class Preprocessor:
    """Tokenizer, chat template and image processor of a model folder, loaded apart.

    The combined Hugging Face processor needs torchvision for Qwen models; these two pieces do not.
    """

    def __init__(self, folder: Path):
        with third_party(
            "transformers cannot be imported; where torchvision is named, install the build for your torch or remove it",
            MissingRuntime,
        ):
            from transformers import AutoImageProcessor, AutoTokenizer

        self.config = read_json(folder / "config.json")
        for file in ("tokenizer_config.json", "preprocessor_config.json"):
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: {file} is missing; copy it from the original model")
        self.family = family_of(self.config)
        with third_party(f"{folder}: transformers cannot read its tokenizer"):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        self.tokenizer.chat_template = self.tokenizer.chat_template or _chat_template(folder)
        with third_party(f"{folder}: transformers cannot read its image processor"):
            try:
                self.image_processor = AutoImageProcessor.from_pretrained(
                    folder, backend="pil", trust_remote_code=False
                )
            except (TypeError, ImportError):  # transformers before the backend argument
                self.image_processor = AutoImageProcessor.from_pretrained(
                    folder, use_fast=False, trust_remote_code=False
                )
            self.images = image_rule(self.family.images, self.image_processor, self.config, self.family.newline)
            self.fit(Image.new("RGB", (64, 64)))  # raises where its settings are no numbers
        self.image_token_id, self.image_token = self._image_token(folder)

    def _image_token(self, folder: Path) -> tuple[int, str]:
        """Id and text of the placeholder. Raises CheckpointError where config and tokenizer do not agree on one."""
        number = self.config.get("image_token_id") or self.config.get("image_token_index")
        known = type(number) is int and 0 <= number < len(self.tokenizer)
        token = self.tokenizer.convert_ids_to_tokens(number) if known else None
        if not token or self.tokenizer(token, add_special_tokens=False)["input_ids"] != [number]:
            raise CheckpointError(
                f"{folder}: the tokenizer has no image token of the id {number} that config.json names; "
                "copy both from the original model"
            )
        return number, token

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize once to a size that every runtime leaves alone."""
        return self.images.fit(image)

    def sample(self, row: Row, *, prompt_only: bool = False) -> Sample:
        """One row as the model sees it. With `prompt_only` the last assistant turn becomes the generation prompt.

        Raises CalibrationError naming the row where an image cannot be read, or template or processor refuse it.
        """
        with third_party(f"{row.id}: cannot be made a sample of this model", CalibrationError):
            return self._sample(row, prompt_only)

    def _sample(self, row: Row, prompt_only: bool) -> Sample:
        messages = list(row.messages)
        if prompt_only and messages[-1]["role"] == "assistant":
            messages.pop()
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt_only)
        images = tuple(self.fit(load_image(p)) for p in row.images)
        encoded = self.images.encode(images) if images else Encoded({}, [])
        if text.count(self.image_token) != len(images):
            raise CalibrationError(
                f"{row.id}: the chat template kept {text.count(self.image_token)} of {len(images)} images"
            )
        counts, (before, after) = iter(encoded.tokens), self.family.around
        expanded = re.sub(re.escape(self.image_token), lambda m: before + m.group() * next(counts) + after, text)
        ids = torch.tensor(self.tokenizer(expanded, add_special_tokens=False)["input_ids"])
        answer = torch.zeros(len(ids), dtype=torch.bool)
        if not prompt_only and messages[-1]["role"] == "assistant":
            tail = self.tokenizer(text[self._answer_start(messages, text) :], add_special_tokens=False)["input_ids"]
            answer[len(ids) - len(tail) :] = True
        layout = {k: v for k, v in encoded.inputs.items() if k not in ("pixel_values", "image_grid_thw")}
        return Sample(
            row.id, ids, ids == self.image_token_id, answer, encoded.inputs.get("pixel_values"),
            encoded.inputs.get("image_grid_thw"), images, text, row, layout, self.family.mrope,
        )  # fmt: skip

    def _answer_start(self, messages: list[dict], text: str) -> int:
        """Where in `text` the last turn's words begin. Templates differ in the white space before them."""
        prefix = self.tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        if text.startswith(prefix):
            return len(prefix)
        words = "".join(p.get("text", "") for p in messages[-1]["content"]).strip()
        return max(text.rfind(words), 0)


def _chat_template(folder: Path) -> str:
    """The template of chat_template.json, where some models keep it. Raises CheckpointError if there is none."""
    file = folder / "chat_template.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, str) and template:
        return template
    raise CheckpointError(f"{folder}: the tokenizer has no chat template; copy chat_template.json from the model")


def truncate(sample: Sample, seq_len: int) -> Sample | None:
    """The first `seq_len` tokens, or None when that would cut an image's tokens (the paper drops such samples)."""
    if len(sample.input_ids) <= seq_len:
        return sample
    if bool(sample.vision[seq_len:].any()):
        return None
    cut = {name: getattr(sample, name)[:seq_len] for name in ("input_ids", "vision", "answer")}
    return replace(sample, **cut)
