"""Greedy answers of a transformers model to prompts, those of one shape together."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.samples.sample import Sample, alike, batch_inputs

ANSWER = 16  # most tokens of a greedy answer
AT_ONCE = 16  # most prompts that are answered together


def greedy_answers(
    model: Any,  # a PreTrainedModel
    prompts: Sequence[Sample],
    stop_ids: frozenset[int],
    limit: int = ANSWER,
) -> Iterator[tuple[Sample, list[int]]]:
    """Each prompt with its greedy token ids, at most `limit`, up to and without the stop token.

    Only prompts that are `alike` share a batch, so that nothing is padded. An answer is then that
    of the prompt alone, but for the order in which products are summed. The prompts do not come in
    the order in which they were given.
    """
    groups: dict[tuple, list[Sample]] = defaultdict(list)
    for prompt in prompts:
        groups[alike(prompt)].append(prompt)
    for group in groups.values():
        length = len(group[0].input_ids)
        size = max(1, min(AT_ONCE, BATCH_TOKENS // length))
        for start in range(0, len(group), size):
            part = group[start : start + size]
            for prompt, ids in zip(part, generate(model, part, stop_ids, limit)[:, length:]):
                answer = ids.tolist()
                end = next((i for i, t in enumerate(answer) if t in stop_ids), len(answer))
                yield prompt, answer[:end]


@torch.no_grad()
def generate(
    model: Any, prompts: Sequence[Sample], stop_ids: frozenset[int], limit: int, **options: Any
) -> Any:
    """What transformers' greedy search returns after at most `limit` tokens.

    It goes by the cache whatever config.json says (that of SmolVLM2 says no). Without one, each
    step would see the images again, and a model that writes an image token would have too few.
    """
    stop = sorted(stop_ids)
    return model.generate(
        **batch_inputs(prompts),
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        eos_token_id=stop,
        pad_token_id=stop[0],
        **options,
    )
