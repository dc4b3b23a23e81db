"""Rows → samples: tokens and pixels as the model's own preprocessing makes them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vlmq_export.errors import CalibrationError, CheckpointError
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import (
    chat_template,
    load_image_processor,
    load_tokenizer,
)
from vlmq_export.quantizer.samples.image_rules import Encoded, Size, image_rule, resized
from vlmq_export.quantizer.samples.images import image_size, load_image
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Length, Sample
from vlmq_export.quantizer.samples.scaling import fitted_sizes, scaled_sizes
from vlmq_export.quantizer.storage.untrusted import read_json, third_party


class Preprocessor:
    """Tokenizer, chat template and image processor of a model folder.

    transformers' combined processors need torchvision for some families; these parts do not. Raises
    CheckpointError for a folder whose files are missing or damaged, and MissingRuntime where
    transformers cannot be imported.
    """

    def __init__(self, folder: Path):
        architecture = Architecture.of(read_json(folder / "config.json"))
        self.config, self.family = architecture.config, architecture.family
        self.tokenizer: Any = load_tokenizer(folder)
        self.image_processor = load_image_processor(folder)
        self.tokenizer.chat_template = _chat_template(folder, self.tokenizer)
        with third_party(f"{folder}: transformers cannot read its image processor"):
            self.images = image_rule(self.family, self.image_processor, self.config)
            self.fit(Image.new("RGB", (64, 64)))  # raises where its settings are no numbers
        # The token that is repeated for an image's features, and what stands for it in a prompt.
        keys = "image_token_id", "image_token_index"
        self.image_token_id, self.image_token = self._token(folder, *keys)
        own = self.family.placeholder
        _, self.placeholder = self._token(folder, *([own] if own else keys))

    def _token(self, folder: Path, *keys: str) -> tuple[int, str]:
        """Id and text of a token that stands for an image, by the first of these keys.

        Raises CheckpointError where config and tokenizer do not agree on one.
        """
        number = next((n for key in keys if (n := self.config.get(key))), None)
        if type(number) is int and 0 <= number < len(self.tokenizer):
            token = self.tokenizer.convert_ids_to_tokens(number)
            if token and self._ids(token) == [number]:
                return number, token
        raise CheckpointError(
            f"{folder}: the tokenizer has no image token of the id {number} that config.json names;"
            " copy both from the original model"
        )

    def _ids(self, text: str) -> list[int]:
        """The tokens of a text, without any that the tokenizer would add around it."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def fit(self, image: Image.Image) -> Image.Image:
        """Resize an image once, to a size that every runtime leaves alone."""
        return resized(image, self.images.size(image.size))

    def sample(self, row: Row, *, prompt_only: bool = False, seq_len: int | None = None) -> Sample:
        """One row as the model sees it.

        With `prompt_only` a last turn of the assistant is left out, and the template's opening of
        such a turn is added. With `seq_len` the images of a longer sample are scaled down, as
        `scaling.py` says; no text is cut. Raises CalibrationError that names the row, where an
        image cannot be read, and where chat template or processor refuse it.
        """
        with third_party(f"{row.id}: cannot be made a sample of this model", CalibrationError):
            return self._sample(row, prompt_only, seq_len)

    def length(self, row: Row, *, seq_len: int | None = None) -> Length:
        """How long `sample` would be, from its text and the headers of its images.

        No pixel is decoded. Raises CalibrationError as `sample` does, but for damaged pixels.
        """
        with third_party(f"{row.id}: cannot be made a sample of this model", CalibrationError):
            text = self._text(row, list(row.messages), open_turn=False)
            fitted, _ = self._sizes([image_size(image) for image in row.images], text, seq_len)
            images = [self.images.tokens(size) for size in fitted]
            ids = self._counted(text, images)
        return Length(len(ids), sum(images), self._image_end(ids))

    def _sample(self, row: Row, prompt_only: bool, seq_len: int | None) -> Sample:
        """`sample`, with the libraries' own errors."""
        messages = list(row.messages)
        if prompt_only and messages[-1]["role"] == "assistant":
            messages.pop()
        text = self._text(row, messages, open_turn=prompt_only)
        originals = [load_image(image) for image in row.images]
        fitted, scaled = self._sizes([image.size for image in originals], text, seq_len)
        images = tuple(map(resized, originals, fitted))
        encoded = self.images.encode(images, self.image_token) if images else Encoded({}, [])
        ids = torch.tensor(self.ids(text, encoded.written))
        answer = torch.zeros(len(ids), dtype=torch.bool)
        if not prompt_only and messages[-1]["role"] == "assistant":
            tail = self._ids(text[self._answer_start(messages, text) :])
            answer[len(ids) - len(tail) :] = True
        layout = dict(encoded.inputs)
        return Sample(
            id=row.id,
            input_ids=ids,
            vision=ids == self.image_token_id,
            answer=answer,
            pixel_values=layout.pop("pixel_values", None),
            image_grid_thw=layout.pop("image_grid_thw", None),
            images=images,
            scaled=scaled,
            text=text,
            row=row,
            layout=layout,
            mrope=self.family.mrope,
            marks=self.family.marks,
            packed=self.family.packed,
        )

    def _text(self, row: Row, messages: list[dict], *, open_turn: bool) -> str:
        """The text of a row's conversation, with one placeholder for each of its images.

        Raises CalibrationError where it has more or fewer of them.
        """
        for number, message in enumerate(messages, start=1):
            texts = [part.get("text", "") for part in message["content"]]
            for token in (self.placeholder, self.image_token):
                if any(token in text for text in texts):
                    raise CalibrationError(
                        f"{row.id}: the text of turn {number} has {token}, which stands for an"
                        " image; take it out"
                    )
        text = self._prompt(messages, open_turn=open_turn)
        if (kept := text.count(self.placeholder)) != len(row.images):
            raise CalibrationError(
                f"{row.id}: the chat template kept {kept} of {len(row.images)} images"
            )
        return text

    def _sizes(
        self, sizes: Sequence[Size], text: str, seq_len: int | None
    ) -> tuple[list[Size], bool]:
        """What images of these sizes are resized to, and whether `seq_len` made any smaller."""
        fitted = wanted = fitted_sizes(self.images, sizes)
        if seq_len is not None and sizes:
            ids = self._counted(text, [1] * len(sizes))
            last = self._image_end(ids)
            fitted = scaled_sizes(
                self.images,
                sizes,
                seq_len=seq_len,
                text=len(ids) - len(sizes),
                before=last - len(sizes),
            )
        return fitted, fitted != wanted

    def _image_end(self, ids: list[int]) -> int:
        """The number of tokens up to the last one of an image; 0 without images."""
        reverse = ids[::-1]
        return len(ids) - reverse.index(self.image_token_id) if self.image_token_id in ids else 0

    def _prompt(self, messages: Sequence[dict], *, open_turn: bool) -> str:
        """The text of a conversation. `open_turn` adds the opening of the assistant's next turn."""
        return self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=open_turn
        )

    def ids(self, text: str, written: Sequence[str]) -> list[int]:
        """The tokens of a prompt, with what is written for each image in place of its token."""
        texts = iter(written)
        return self._ids(re.sub(re.escape(self.placeholder), lambda _: next(texts), text))

    def _counted(self, text: str, tokens: Sequence[int]) -> list[int]:
        """`text` with so many tokens for each image, as if all of them were placeholders."""
        before, after = self.family.around
        return self.ids(text, [before + self.image_token * n + after for n in tokens])

    def _answer_start(self, messages: list[dict], text: str) -> int:
        """Where in `text` the words of the last turn begin."""
        prefix = self._prompt(messages[:-1], open_turn=True)
        if text.startswith(prefix):
            return len(prefix)
        # Some templates write other white space before an answer than after the opening of a turn.
        words = "".join(p.get("text", "") for p in messages[-1]["content"]).strip()
        return max(text.rfind(words), 0)


def _chat_template(folder: Path, tokenizer: Any) -> str:
    """The template of a model's prompts. Raises CheckpointError if there is none."""
    template = chat_template(folder, tokenizer)
    if template is None:
        raise CheckpointError(
            f"{folder}: the tokenizer has no chat template; copy chat_template.json from the model"
        )
    return template
