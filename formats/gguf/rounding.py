"""What 8-bit activations cost one model: the reference once more, each linear's input rounded as llama.cpp rounds it.

How far that moves the logits is the model's own matter: 2e-2 to 3e-2 where it was trained, five times as much for random
weights at two bits, whose small differences between large terms carry the answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import torch

from vlmq_export.formats.base import relative_error
from vlmq_export.formats.gguf.emulate import ACTIVATIONS, rounded
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.families import family_of
from vlmq_export.reference import Reference


@torch.no_grad()
def cost(
    reference: Reference, hub: Mapping[str, str], types: Mapping[str, str], samples: Iterable[Sample]
) -> dict[str, float]:
    """Prompt → relative error of its text positions' logits. `hub`: GGUF name → hub name, `types`: GGUF name → type."""
    samples = list(samples)
    wanted = {s.id: reference.logits(s) for s in samples}  # before anything is rounded
    hooks = [_round_inputs(module, kind) for module, kind in _linears(reference, hub, types)]
    found = {}
    try:
        for sample in samples:
            out = reference.model(**sample.model_inputs(), use_cache=False).logits[0, :, : reference.vocabulary]
            text = ~sample.vision.numpy()
            found[sample.id] = relative_error(out.numpy()[text], wanted[sample.id][text])
    finally:
        for hook in hooks:
            hook.remove()
    return found


def _linears(reference: Reference, hub: Mapping[str, str], types: Mapping[str, str]):
    """(module, kind) of every linear of the language model; a tied output matrix has the embedding's type."""
    family = family_of(reference.config)
    for name, stored in hub.items():
        module = reference.model.get_submodule(family.module_name(stored).rpartition(".")[0])
        if isinstance(module, torch.nn.Linear) and name.endswith(".weight"):
            yield module, ACTIVATIONS[types[name]]
    if "output.weight" not in hub:
        yield reference.model.get_output_embeddings(), ACTIVATIONS[types["token_embd.weight"]]


def _round_inputs(module: torch.nn.Module, kind: str):
    def action(_module, args):
        x = args[0]
        flat = rounded(x.reshape(-1, x.shape[-1]).numpy(), kind).astype(np.float32)
        return (torch.from_numpy(flat).view_as(x),)

    return module.register_forward_pre_hook(action)
