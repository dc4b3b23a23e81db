"""SmolLM2's decoder layers on text alone, quantized by a method and measured by KL.

    make reference-smolvlm
    python -m tools.bench.text_model --layers 30 --method exact

The model is the decoder of the third reference VLM, which is SmolLM2-135M-Instruct. Layers behind
`--layers` stay in full precision. The text is Python's own reference: one half of its topics for
calibration, and the other half held out. Calibration is 64 samples of 128 tokens; the KL divergence
to full precision is over all tokens of every fifth held-out paragraph.

This is a bench for real pretrained weights that a small machine can hold. It runs the walk over the
layers itself, because the command takes vision-language models alone.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from pydoc_data.topics import topics
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from tools.bench.ablations import ABLATIONS, listed
from tools.bench.peers.peers import write_decoder
from tools.reference_vlm.smolvlm import BUILT
from vlmq_export.quantizer.calibration.batches import HELD_OUT, Batch
from vlmq_export.quantizer.calibration.collect import TokenFactors
from vlmq_export.quantizer.calibration.hooks import Stop, before, leaf_output
from vlmq_export.quantizer.calibration.importance import per_sample, token_factors
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.choice import grid_choice
from vlmq_export.quantizer.job import method_of
from vlmq_export.quantizer.layers.decoder_layer import quantize_layer
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import DECODER, groups_of
from vlmq_export.quantizer.model.rotation import rotated

SAMPLES, TOKENS = 64, 128
AT_ONCE = 32  # samples of a batch
SHORTEST = 250  # characters of a paragraph
EVERY = 5  # of so many held-out paragraphs one is read


def main() -> None:
    """Quantize as the flags say, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--method", default="exact", choices=[*METHODS, *ABLATIONS])
    parser.add_argument("--rotate", default="off", choices=("off", "folded"))
    parser.add_argument("--tune", type=int, default=0)
    asked = parser.parse_args()
    with TemporaryDirectory() as scratch:
        folder = Path(scratch) / "decoder"
        write_decoder(rotated(Checkpoint(BUILT), asked.rotate, seed=0), folder)
        tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        model: Any = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    calibration, others = paragraphs()
    joined = tokenizer("\n\n".join(calibration))["input_ids"]
    samples = torch.tensor(joined[: SAMPLES * TOKENS]).view(SAMPLES, TOKENS)
    heldout = [torch.tensor(tokenizer(text)["input_ids"][:TOKENS]) for text in others[::EVERY]]
    reference = [log_probabilities(model, ids) for ids in heldout]
    grid = {"bits": asked.bits, "group_size": asked.group, "tune": asked.tune}
    begun = time.process_time()
    with listed(asked.method) as changes:
        smooth = METHODS[asked.method].smooths
        config = QuantConfig(method=asked.method, smooth=smooth, **grid | changes)
        quantize(model, samples, config, asked.layers)
    spent = time.process_time() - begun
    found = zip(reference, (log_probabilities(model, ids) for ids in heldout))
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in found])
    print(json.dumps(vars(asked) | {"kl": float(kl.mean()), "cpu_seconds": spent}), flush=True)


def paragraphs() -> tuple[list[str], list[str]]:
    """Prose of every second topic of Python's reference, and of the others. None is there twice."""
    halves: tuple[list[str], list[str]] = ([], [])
    seen: set[str] = set()
    for place, name in enumerate(sorted(topics)):
        for block in re.split(r"\n\s*\n", topics[name]):
            text = " ".join(block.split())
            prose = len(text) >= SHORTEST and "::=" not in text and ">>>" not in text
            if prose and text not in seen:
                halves[place % 2].append(text)
                seen.add(text)
    return halves


@torch.no_grad()
def log_probabilities(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Of what follows each token but the last, [tokens − 1, vocabulary]."""
    return model(ids[None]).logits[0, :-1].log_softmax(-1)


def quantize(model: Any, samples: torch.Tensor, config: QuantConfig, layers: int) -> None:
    """Give the first layers the decoded weights that a recipe leaves."""
    method = method_of(config)
    job: Any = SimpleNamespace(
        config=config,
        method=method,
        smooth=config.smooth,
        family=SimpleNamespace(gain=0.0),
        grid=lambda name, columns: grid_choice(config, name, columns),
    )
    batches = first_batches(model, samples, two_streams=method.two_streams)
    answers: list[TokenFactors | None] = [None] * layers
    if method.importance == "answers":
        answers = [*token_factors_of(model, batches, layers)]
    for index, layer in enumerate(model.model.layers[:layers]):
        walk = LayerWalk(layer, DECODER, batches, two_streams=method.two_streams)
        quantize_layer(walk, f"model.layers.{index}.", job, answers=answers[index])
        walk.advance()


def token_factors_of(model: Any, batches: list[Batch], layers: int) -> list[TokenFactors]:
    """What `answer_factors` gives of a vision-language model, by autograd over the whole model."""
    names = [name for group in groups_of(DECODER) for name in group]
    found: list[TokenFactors] = [{name: [] for name in names} for _ in range(layers)]
    for batch in batches:
        outputs: dict[tuple[int, str], torch.Tensor] = {}
        with ExitStack() as hooks:
            for index, layer in enumerate(model.model.layers[:layers]):
                for name in names:
                    place = layer.get_submodule(name), outputs, (index, name)
                    hooks.enter_context(leaf_output(*place, cut=False))
            loss = model(batch.ids, labels=batch.ids, use_cache=False).loss
        for (index, name), p in zip(outputs, torch.autograd.grad(loss, [*outputs.values()])):
            found[index][name].append(per_sample(token_factors(p, "l1")))
    return found


@torch.no_grad()
def first_batches(model: Any, samples: torch.Tensor, *, two_streams: bool) -> list[Batch]:
    """The samples at the input of the first layer."""
    caught: list[tuple[torch.Tensor, dict]] = []

    def catch(args: tuple, kwargs: dict) -> None:
        caught.append(
            (
                args[0],
                {k: v for k, v in kwargs.items() if k not in ("past_key_values", "use_cache")},
            )
        )
        raise Stop

    batches = []
    places = torch.arange(len(samples))
    for ids, place in zip(samples.split(AT_ONCE), places.split(AT_ONCE)):
        with before(model.model.layers[0], catch), suppress(Stop):
            model.model(ids, use_cache=False)
        hidden, kwargs = caught.pop()
        batches.append(
            Batch(
                hidden,
                hidden if two_streams else None,
                kwargs,
                torch.ones(len(ids), dtype=torch.bool),
                image=torch.zeros_like(ids, dtype=torch.bool),
                answer=torch.ones_like(ids, dtype=torch.bool),
                ids=ids,
                held=place % HELD_OUT == HELD_OUT // 2,
            )
        )
    return batches


if __name__ == "__main__":
    main()
