"""The first decoder layers of a text model, quantized by a method and measured by KL.

    python -m tools.bench.text_model MODEL TEXTS.json --layers 8 --bits 2 --method exact --tune 60

MODEL is a folder of a Llama with its tokenizer. TEXTS.json has two lists of paragraphs,
`calibration` and `heldout`. The other layers stay in full precision. Calibration is 64 samples of
128 tokens; the KL divergence to full precision is over all tokens of 40 held-out paragraphs.

This is a bench for real pretrained weights that a small machine can hold. It runs the walk over the
layers itself, because the command takes vision-language models alone.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaForCausalLM

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
from vlmq_export.quantizer.model.families import DECODER, groups_of

SAMPLES, TOKENS, HELD = 64, 128, 40
AT_ONCE = 32  # samples of a batch


def main() -> None:
    """Quantize as the flags say, and print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--bits", type=int, default=2)
    parser.add_argument("--group", type=int, default=64)
    parser.add_argument("--method", default="exact", choices=METHODS)
    parser.add_argument("--damp", type=float, default=0.01)
    parser.add_argument("--tune", type=int, default=0)
    asked = parser.parse_args()
    texts = json.loads(asked.texts.read_text())
    tokenizer: Any = AutoTokenizer.from_pretrained(asked.model)
    joined = tokenizer("\n\n".join(texts["calibration"]))["input_ids"]
    samples = torch.tensor(joined[: SAMPLES * TOKENS]).view(SAMPLES, TOKENS)
    heldout = [torch.tensor(tokenizer(t)["input_ids"][:TOKENS]) for t in texts["heldout"][:HELD]]
    model: Any = LlamaForCausalLM.from_pretrained(asked.model, dtype=torch.float32).eval()
    reference = [log_probabilities(model, ids) for ids in heldout]
    config = QuantConfig(
        method=asked.method,
        bits=asked.bits,
        group_size=asked.group,
        damp=asked.damp,
        tune=asked.tune,
    )
    begun = time.process_time()
    quantize(model, samples, config, asked.layers)
    spent = time.process_time() - begun
    found = zip(reference, (log_probabilities(model, ids) for ids in heldout))
    kl = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in found])
    print(json.dumps(vars(asked) | {"kl": float(kl.mean()), "cpu_seconds": spent}, default=str))


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
        grid=lambda name, columns: grid_choice(config, name, columns),
    )
    batches = first_batches(model, samples)
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
def first_batches(model: Any, samples: torch.Tensor) -> list[Batch]:
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
                hidden,
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
