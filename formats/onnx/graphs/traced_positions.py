"""What the place of a token decides: how queries and keys are turned, and which keys are seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vlmq_export.errors import FormatError


class Rotary(nn.Module):
    """Cosines and sines of the positions, from the model's own frequencies.

    Most models have one set of frequencies. Gemma 3 has one for each kind of layer (`kinds`).

    The frequencies of type `dynamic` depend on the length of the prompt only beyond
    max_position_embeddings. The graph has the unscaled ones at every position.

    Raises FormatError for frequencies that depend on the length of every prompt.
    """

    def __init__(self, language: Any):
        super().__init__()
        # A new one is made, because that of the model has no values.
        rope: Any = type(language.rotary_emb)(config=language.config)
        types = rope.rope_type if isinstance(rope.rope_type, dict) else {"": rope.rope_type}
        for kind in sorted(set(types.values())):
            if kind not in ("default", "linear", "dynamic", "yarn", "llama3"):
                raise FormatError(
                    f"ONNX graphs have no rotary positions of type {kind}; leave out --format onnx"
                )
        # Kind of a layer → beginning of the names that its buffer and its factor have in the model.
        # A model with one set of frequencies has the kind "".
        self.kinds = {kind: f"{kind}_" if kind else "" for kind in types}
        for prefix in self.kinds.values():
            frequencies = getattr(rope, f"{prefix}inv_freq")  # [head size / 2]
            self.register_buffer(f"{prefix}inv_freq", frequencies.clone())
        self.scaling: dict[str, float] = {
            kind: getattr(rope, f"{prefix}attention_scaling") for kind, prefix in self.kinds.items()
        }
        # How many frequencies turn with the temporal, height and width position. None: positions
        # have one axis.
        self.sections: list[int] | None = getattr(rope, "mrope_section", None)

    def forward(
        self, position_ids: torch.Tensor, dtype: torch.dtype
    ) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """int64 [B, S] or [3, B, S] → cosines and sines for each kind of layer.

        They are [B, S, head size / 2] each, computed in float32 and cast to `dtype`.
        """
        found = {}
        for kind, prefix in self.kinds.items():
            angles = self._angles(position_ids, getattr(self, f"{prefix}inv_freq"))
            cosines, sines = (f * self.scaling[kind] for f in (angles.cos(), angles.sin()))
            found[kind] = cosines.to(dtype), sines.to(dtype)
        return found

    def _angles(self, position_ids: torch.Tensor, frequencies: torch.Tensor) -> torch.Tensor:
        """float32 [B, S, head size / 2]."""
        angles = position_ids[..., None].float() * frequencies  # [(3,) B, S, head size / 2]
        if not self.sections:
            return angles
        # The axes are interleaved: frequency 3j + 1 turns with the height and 3j + 2 with the
        # width, as far as their sections reach. All others turn with the temporal position.
        _, height, width = self.sections
        index = torch.arange(frequencies.numel())
        by_height = (index % 3 == 1) & (index < 3 * height)
        by_width = (index % 3 == 2) & (index < 3 * width)
        return torch.where(by_height, angles[1], torch.where(by_width, angles[2], angles[0]))


def seen_keys(
    attention_mask: torch.Tensor,  # int64 [B, past + S]
    image: torch.Tensor,  # bool [B, S]: which of the new tokens are an image's
    window: int,  # of the layers that see the last tokens alone
) -> dict[str, torch.Tensor]:
    """Which keys each of the new tokens sees, by the kind of layer: bool [B, 1, S, past + S].

    A token sees itself and those before it. The tokens of an image also see those of the same image
    behind them: image tokens that follow each other are one image. A layer with a window shows the
    last `window` tokens of these, the token itself included, and all that lie behind it.
    """
    length, total = image.shape[1], attention_mask.shape[1]
    past = total - length
    key = torch.arange(total)[None]  # [1, past + S]
    query = torch.arange(length)[:, None] + past  # [S, 1]
    before = torch.cat([torch.zeros_like(image[:, :1]), image[:, :-1]], dim=1)
    number = (image & ~before).long().cumsum(1) * image  # [B, S]: from 1; 0 for a word
    # Images of the past lie before every query, and count as words.
    of_keys = torch.cat([torch.zeros_like(attention_mask[:, :past]), number], dim=1)
    same = (number[:, :, None] == of_keys[:, None]) & image[:, :, None]  # [B, S, past + S]
    full = ((key <= query) | same) & attention_mask.bool()[:, None]
    full = full[:, None]
    return {"full_attention": full, "sliding_attention": full & (key > query - window)}
