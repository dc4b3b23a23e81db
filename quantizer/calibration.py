"""Rows of a calibration or held-out file → samples that the model can run.

Two layouts are read: the LLaVA/ShareGPT4V JSON list (`image`, `conversations`) and chat `messages` JSONL with image
paths. Every bad row is reported at once, by row or line number, before any weight is loaded.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from vlmq_export.errors import CalibrationError, CheckpointError
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.images import Encoded, image_rule

MAX_PIXELS = 64 * 2**20  # an image larger than this is refused, not decoded
_ERRORS_SHOWN = 5


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
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    root = image_root or path.parent
    rows, errors = [], []
    for where, raw in _raw_rows(path):
        try:
            rows.append(_row(raw, root, where))
        except (ValueError, KeyError, TypeError) as e:
            errors.append(f"{where}: {e.args[0] if isinstance(e, ValueError) else f'malformed ({e!r})'}")
    if errors:
        more = f" (and {len(errors) - _ERRORS_SHOWN} more)" if len(errors) > _ERRORS_SHOWN else ""
        raise CalibrationError(f"{path}: {len(errors)} bad rows: " + "; ".join(errors[:_ERRORS_SHOWN]) + more)
    if not rows:
        raise CalibrationError(f"{path}: no rows")
    return rows


def _raw_rows(path: Path) -> Iterator[tuple[str, object]]:
    try:
        text = path.read_text("utf-8-sig")
    except UnicodeDecodeError as e:
        raise CalibrationError(f"{path}: not UTF-8 text ({e.reason} at byte {e.start})") from None
    if path.suffix == ".jsonl":
        for number, line in enumerate(text.splitlines(), start=1):
            if line.strip():
                try:
                    yield f"line {number}", json.loads(line)
                except (json.JSONDecodeError, RecursionError) as e:
                    raise CalibrationError(f"{path}: line {number} is not JSON ({e})") from None
        return
    try:
        rows = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as e:
        raise CalibrationError(f"{path}: not JSON ({e}); a file of one object a line must end in .jsonl") from None
    if not isinstance(rows, list):
        raise CalibrationError(f"{path}: a JSON list of rows is expected, got {type(rows).__name__}")
    yield from ((f"row {i}", row) for i, row in enumerate(rows))


def _row(raw: object, root: Path, where: str) -> Row:
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
    placeholders = sum(p["type"] == "image" for m in messages for p in m["content"])
    if placeholders != len(images):
        raise ValueError(f"{placeholders} image placeholders for {len(images)} images")
    paths = [_image_path(str(i), root) for i in images]
    return Row(str(raw.get("id", where)), tuple(messages), tuple(paths), str(raw.get("task", "")), where)


def _llava_turn(turn: dict) -> dict:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    if turn["from"] not in roles:
        raise ValueError(f"unknown speaker {turn['from']!r}")
    # `<image>\n` stands for the image alone: the newline belongs to the layout, not to the prompt.
    parts = re.split(r"(<image>\n?|\n<image>$)", turn["value"])
    content = [{"type": "image"} if "<image>" in p else {"type": "text", "text": p} for p in parts if p]
    return {"role": roles[turn["from"]], "content": content}


def _chat_turn(turn: dict, images: list[str]) -> dict:
    content = turn["content"]
    if isinstance(content, str):
        return {"role": turn["role"], "content": [{"type": "text", "text": content}]}
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
    return {"role": turn["role"], "content": parts}


def _image_path(name: str, root: Path) -> Path:
    if "://" in name:
        raise ValueError(f"image {name} is a URL; download it and give a path")
    path = root / name
    if not path.is_file():
        raise ValueError(f"image {name} is not under {root}; set --image-root")
    return path


def load_image(path: Path) -> Image.Image:
    """RGB, upright by its EXIF tag. Raises CalibrationError for what cannot be decoded or is too large."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise CalibrationError(f"{path}: {image.width}×{image.height} pixels is over the limit of {MAX_PIXELS}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as e:
        raise CalibrationError(f"{path}: cannot be read as an image ({e}); replace it or drop its row") from None


class Preprocessor:
    """Tokenizer, chat template and image processor of a model folder, loaded apart.

    The combined Hugging Face processor needs torchvision for Qwen models; these two pieces do not.
    """

    def __init__(self, folder: Path):
        from transformers import AutoImageProcessor, AutoTokenizer

        self.config = json.loads((folder / "config.json").read_text("utf-8"))
        for file in ("tokenizer_config.json", "preprocessor_config.json"):
            if not (folder / file).is_file():
                raise CheckpointError(f"{folder}: {file} is missing; copy it from the original model")
        self.family = family_of(self.config)
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.tokenizer.chat_template = self.tokenizer.chat_template or _chat_template(folder)
        try:
            self.image_processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
        except (TypeError, ImportError):  # transformers before the backend argument
            self.image_processor = AutoImageProcessor.from_pretrained(folder, use_fast=False)
        self.images = image_rule(self.family.images, self.image_processor, self.config, self.family.newline)
        self.image_token_id: int = self.config.get("image_token_id") or self.config["image_token_index"]
        self.image_token: str = self.tokenizer.convert_ids_to_tokens(self.image_token_id)

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize once to a size that every runtime leaves alone."""
        return self.images.fit(image)

    def sample(self, row: Row, *, prompt_only: bool = False) -> Sample:
        """One row as the model sees it. With `prompt_only` the last assistant turn becomes the generation prompt."""
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
    if file.is_file():
        return json.loads(file.read_text("utf-8"))["chat_template"]
    raise CheckpointError(f"{folder}: the tokenizer has no chat template; copy chat_template.json from the model")


def truncate(sample: Sample, seq_len: int) -> Sample | None:
    """The first `seq_len` tokens, or None when that would cut an image's tokens (the paper drops such samples)."""
    if len(sample.input_ids) <= seq_len:
        return sample
    if bool(sample.vision[seq_len:].any()):
        return None
    cut = {name: getattr(sample, name)[:seq_len] for name in ("input_ids", "vision", "answer")}
    return replace(sample, **cut)
