"""Prompts of the reference as the child process takes them: requests, and arrays beside them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.samples.image_rules import TOKENS
from vlmq_export.quantizer.samples.rows import Row
from vlmq_export.quantizer.samples.sample import Sample

MARKER = "<__media__>"  # where mtmd puts an image


@dataclass(frozen=True)
class Prompts:
    """Requests for prompts of one model. Their arrays are written into `folder`."""

    reference: Reference
    layout: Layout
    folder: Path

    def exact(self, sample: Sample, tag: str, **wanted: Any) -> dict:
        """A prompt in segments, with nothing that llama.cpp would compute from an image.

        Text is given as token ids. Images are given as the reference's own vision features, with
        their positions. What a model adds to its image tokens behind its first layers stands beside
        the features in the same rows.

        tag: start of the names of the arrays.
        wanted: what the child shall return, as keys of the request.
        """
        ids, vision = sample.input_ids.numpy(), sample.vision.numpy()
        sections = self.layout.text_params.graph.sections
        if sections and vision.any():
            positions = self.reference.position_ids(sample)[:, 0]  # [3, S]
        else:
            positions = np.tile(np.arange(len(ids)), (3 if sections else 1, 1))
        rows = image_rows(self.reference, sample) if vision.any() else np.zeros((0, 0))
        segments: list[dict] = []
        taken = 0
        for run_ids, is_image, where in _runs(ids, vision, positions):
            if not is_image:
                segments.append({"tokens": run_ids.tolist(), "start": int(where[0, 0])})
                continue
            start = f"{tag}-{len(segments)}"
            embeddings = rows[taken : taken + len(run_ids)].astype(np.float32)
            axes = np.concatenate([where, np.zeros_like(where[:1])]) if sections else where[0]
            arrays = {"embeddings": f"{start}.rows.npy", "positions": f"{start}.pos.npy"}
            np.save(self.folder / arrays["embeddings"], embeddings)
            np.save(self.folder / arrays["positions"], axes.astype(np.int32))
            segments.append({**arrays, "both ways": bool(sample.marks)})
            taken += len(run_ids)
        return {
            "id": sample.id,
            "segments": segments,
            "next": int(positions.max()) + 1,
            "length": len(ids),
            **wanted,
        }

    def mtmd(self, sample: Sample, tag: str, **wanted: Any) -> dict:
        """The same prompt as an application gives it: text with a marker an image, and pixels."""
        names = [f"{tag}-{i}.pixels.npy" for i in range(len(sample.images))]
        for name, image in zip(names, sample.images):
            np.save(self.folder / name, np.asarray(image.convert("RGB"), np.uint8))
        graph = self.layout.vision_params.graph
        newline = None
        if graph.newline:
            newline = f"{tag}.newline.npy"
            row = self.reference.weights.array(self.layout.vision[graph.newline].hub)
            np.save(self.folder / newline, row[None].astype(np.float32))
        return {
            "id": sample.id,
            "image tokens": TOKENS[1] if graph.most else None,
            # mtmd itself writes the tokens around an image, but for what `around` says.
            "text": re.sub(graph.image, graph.around + MARKER + graph.around, sample.text),
            "images": names,
            "newline": newline,
            "length": len(sample.input_ids),
            **wanted,
        }


def image_rows(reference: Reference, sample: Sample) -> np.ndarray:
    """float32 [image tokens, width]: what stands in the place of a sample's image tokens.

    These are the vision features, and beside them what is added after decoder layers 0, 1, ….
    """
    parts = [reference.vision_features(sample), *reference.added_features(sample)]
    return np.concatenate(parts, axis=1)


def as_rows(reference: Reference, layout: Layout, sample: Sample) -> np.ndarray:
    """bool [S]: the tokens that mtmd gives as rows of an image, and not as tokens of text."""
    row_end = layout.vision_params.graph.row_end
    if not row_end:
        return sample.vision.numpy()
    vision, ids = sample.vision.numpy(), sample.input_ids.numpy()
    return vision | (ids == reference.preprocessor.tokenizer.convert_tokens_to_ids(row_end))


def mtmd_rows(reference: Reference, layout: Layout, sample: Sample) -> np.ndarray:
    """float32 [rows, width]: `image_rows` as mtmd gives them, with what stands behind each line."""
    features, rows = image_rows(reference, sample), as_rows(reference, layout, sample)
    # A picture that is not resized here may have more features than the prompt has tokens for.
    if not layout.vision_params.graph.row_end:
        return features
    embedding = reference.model.get_input_embeddings().weight.detach()
    found = embedding[sample.input_ids].numpy()  # [S, width]
    found[sample.vision.numpy()] = features
    return found[rows]


def text_only(reference: Reference, sample: Sample) -> Sample:
    """The prompt's conversation without its images."""
    row = sample.row
    assert row is not None, "the prompts of the reference are made from rows"
    messages = tuple(
        {**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages
    )
    plain = Row(f"{row.id}-text", messages, (), row.task)
    return reference.preprocessor.sample(plain, prompt_only=True)


def _runs(
    ids: np.ndarray, vision: np.ndarray, positions: np.ndarray
) -> Iterator[tuple[np.ndarray, bool, np.ndarray]]:
    """Maximal runs of text or of image tokens: (ids [n], whether images, positions [axes, n])."""
    cuts = [0, *(np.flatnonzero(np.diff(vision.astype(np.int8))) + 1), len(ids)]
    for start, end in pairwise(cuts):
        yield ids[start:end], bool(vision[start]), positions[:, start:end]
