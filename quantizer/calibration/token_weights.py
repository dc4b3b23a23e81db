"""What a report shows of the token weights (VLMQ's Figure 4).

That is a few numbers per projection, and a picture of one image's weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt

import torch

from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.samples.sample import Sample

LOW = 0.1  # a token is of low importance where g² is below this share of the mean
OCTAVE = 32  # levels, of 256, for a factor of two: level 0 is 2⁻⁸ of the image's largest weight


def importance_facts(
    factors: Mapping[str, Sequence[torch.Tensor]],  # g with mean(g²) = 1, one tensor a batch
    batches: Sequence[Batch],
    ranks: Ranks = ALONE,
) -> dict[str, dict]:
    """projection → what its factors say of image and text tokens, for the manifest.

    `low_vision`, `low_text`: the share of these tokens that is of low importance.
    `vision_tokens`, `vision_weight`: the share of the tokens, and of Σg², that belongs to images.
    `image`: the levels of one image's tokens, two hexadecimal digits each.
    """
    if not factors or not all(batch.knows_images for batch in batches):
        return {}
    masks = [batch.tokens(batch.image) for batch in batches]
    place = _first_image(batches)
    facts, images = {}, {}
    for name, parts in factors.items():
        sums = torch.zeros(6, dtype=torch.float64, device=masks[0].device)
        for g, mask in zip(parts, masks):
            square = g.double().square()
            # Of image and of text tokens: how many, how many of low importance, Σg².
            found = [
                (which.sum(), (which & (square < LOW)).sum(), torch.where(which, square, 0).sum())
                for which in (mask, ~mask)
            ]
            sums += torch.stack([each.double() for row in found for each in row])
        totals = torch.tensor(ranks.total(*sums.tolist())).view(2, 3).tolist()
        (tokens, low, weight), (texts, low_text, text_weight) = totals
        facts[name] = {
            "low_vision": _share(low, tokens),
            "low_text": _share(low_text, texts),
            "vision_tokens": _share(tokens, tokens + texts),
            "vision_weight": _share(weight, weight + text_weight),
        }
        images[name] = levels(parts[place[0]][place[1]]).hex() if place else ""
    for name, image in ranks.broadcast_json(images if ranks.first else None, 0).items():
        facts[name] |= {"image": image} if image else {}
    return facts


def levels(g: torch.Tensor) -> bytes:
    """Factors on a logarithmic scale of 8 bits. The largest factor is 255."""
    ratio = (g.double() / g.max().clamp_min(1e-300)).clamp_min(2.0**-16)
    return bytes((255 + OCTAVE * ratio.log2()).round().clamp(0, 255).to(torch.uint8).tolist())


def _first_image(batches: Sequence[Batch]) -> tuple[int, torch.Tensor] | None:
    """The first image of the longest samples that have one.

    Returns the number of its batch, and the places of its tokens among the batch's valid tokens.
    """
    masks = [batch.image & batch.valid[:, None] for batch in batches]
    with_image = [index for index, mask in enumerate(masks) if bool(mask.any())]
    if not with_image:
        return None
    index = max(with_image, key=lambda i: masks[i].shape[1])
    mask, valid = masks[index], batches[index].valid
    row = int(mask.any(1).nonzero()[0])
    before = int(valid[:row].sum()) * mask.shape[1]
    return index, before + torch.tensor(_first_run(mask[row]), device=mask.device)


def image_shape(samples: Sequence[Sample]) -> dict:
    """{"pictured": [rows, columns]} of the image that `importance_facts` takes of these samples."""
    with_image = [s for s in samples if bool(s.vision.any())]
    if not with_image:
        return {}
    sample = max(with_image, key=lambda s: len(s.input_ids))  # the first of them, as in the walk
    count = len(_first_run(sample.vision))
    if sample.packed:  # a token stands behind each row
        columns = len(_runs(sample.vision)[0])
        return {"pictured": [count // columns, columns]}
    if sample.image_grid_thw is None:
        return {"pictured": [isqrt(count)] * 2}
    _, high, wide = sample.image_grid_thw[0].tolist()
    merged = isqrt(high * wide // count)
    return {"pictured": [high // merged, wide // merged]}


def _first_run(mask: torch.Tensor) -> list[int]:
    """The places of the tokens of the first image.

    They follow each other, or are rows of one length with one other token behind each.
    """
    first, *others = _runs(mask)
    step, taken = len(first) + 1, list(first)
    for row, run in enumerate(others, start=1):
        if run.start != first.start + row * step or len(run) != len(first):
            break
        taken += run
    return taken


def _runs(mask: torch.Tensor) -> list[range]:
    """The places of marks that follow each other. There is at least one mark."""
    found = mask.nonzero().flatten().cpu()
    cuts = (found.diff() > 1).nonzero().flatten() + 1
    return [range(int(run[0]), int(run[-1]) + 1) for run in found.tensor_split(cuts)]


def _share(part: float, whole: float) -> float:
    return round(part / whole, 4) if whole else 0.0
