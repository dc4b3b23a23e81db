"""Greedy answers of a transformers model to prompts, those of one shape together."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import torch

from vlmq_export.quantizer.calibration.batches import BATCH_TOKENS
from vlmq_export.quantizer.samples.sample import Sample

ANSWER = 16  # most tokens of a greedy answer
AT_ONCE = 16  # most prompts that are answered together
Inputs = Mapping[str, torch.Tensor]  # keyword arguments of the model, as a batch of one prompt
Told = Callable[[int], None]  # is given the number of prompts that are done; may raise to stop


class Answerer(Protocol):
    """Answers prompts greedily in one runtime, as often as it is asked."""

    def __call__(self, prompts: Sequence[Sample], limit: int, tell: Told) -> list[list[int]]:
        """The token ids of each answer, at most `limit`, up to and without the stop token."""
        ...


def stop_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer of the model in a folder.

    A chat model has its own in generation_config.json. The tokenizer may name another.
    """
    file = folder / "generation_config.json"
    eos = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    eos = tokenizer.eos_token_id if eos is None else eos
    return frozenset(eos if isinstance(eos, list) else [eos])


def greedy_answers(
    model: Any,  # a PreTrainedModel
    prompts: Sequence[Inputs],
    stop_ids: frozenset[int],
    limit: int = ANSWER,
) -> Iterator[tuple[int, list[int]]]:
    """Each prompt's place with its greedy token ids, at most `limit`, without the stop token.

    Only prompts whose inputs have the same shapes share a batch, so that nothing is padded. An
    answer is then that of the prompt alone, but for the order in which products are summed. The
    prompts do not come in the order in which they were given.
    """
    groups: dict[tuple, list[int]] = defaultdict(list)
    for place, inputs in enumerate(prompts):
        groups[tuple((name, tuple(value.shape)) for name, value in inputs.items())].append(place)
    for places in groups.values():
        names = list(prompts[places[0]])
        length = prompts[places[0]]["input_ids"].shape[1]
        size = 1 if _packed(names) else max(1, min(AT_ONCE, BATCH_TOKENS // length))
        for start in range(0, len(places), size):
            part = places[start : start + size]
            batch = {name: torch.cat([prompts[place][name] for place in part]) for name in names}
            for place, ids in zip(part, generate(model, batch, stop_ids, limit)[:, length:]):
                answer = ids.tolist()
                end = next((i for i, t in enumerate(answer) if t in stop_ids), len(answer))
                yield place, answer[:end]


def _packed(names: Collection[str]) -> bool:
    """Whether prompts with these inputs go one by one, as `Family.packed` says.

    Together they would be right too, and their tower would attend over the images of all of them.
    Of the families whose model is told the sizes of images, LLaVA-OneVision is told more.
    """
    return "image_sizes" in names and "batch_num_images" not in names


@torch.no_grad()
def generate(
    model: Any, inputs: Inputs, stop_ids: frozenset[int], limit: int, **options: Any
) -> Any:
    """What transformers' greedy search returns after at most `limit` tokens.

    It goes by the cache whatever config.json says (that of SmolVLM2 says no). Without one, each
    step would see the images again, and a model that writes an image token would have too few.
    A penalty for repetition, which some models ask for in generation_config.json, is left out: the
    runtimes take the most likely token, and nothing else.
    """
    stop = sorted(stop_ids)
    # The first transformers 5 find the image tokens themselves, and refuse to be told them.
    told = "mm_token_type_ids" in signature(model.forward).parameters
    return model.generate(
        **{k: v for k, v in inputs.items() if told or k != "mm_token_type_ids"},
        max_new_tokens=limit,
        do_sample=False,
        num_beams=1,
        use_cache=True,
        repetition_penalty=1.0,
        eos_token_id=stop,
        pad_token_id=stop[0],
        **options,
    )
