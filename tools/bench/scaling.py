"""A copy of a model whose channels are scaled, which computes the same as the source.

What enters q, k, v, gate and up is divided channel by channel, in the gain of the norm before, and
their columns are multiplied. What enters down_proj is divided in the rows of up_proj. A channel's
scale is AWQ's, s = (mean|x|)^POWER over the calibration samples. It costs no byte and no time in
any runtime. AWQ searches a power for each step by rounding to nearest (docs/methods.md §4.1); here
it is one for the whole model, and any method may solve the copy.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from vlmq_export.quantizer.layers.awq_mbq import scale_of
from vlmq_export.quantizer.model.checkpoint import Checkpoint

POWER = 0.5
SUFFIXES = (".safetensors", ".safetensors.index.json")
READS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}


def scaled_copy(
    checkpoint: Checkpoint,  # of a plain decoder: a norm before the attention and the MLP each
    magnitudes: Mapping[str, torch.Tensor],  # linear's hub name → mean|x|, [in]
    folder: Path,
    power: float = POWER,
) -> None:
    """Write the scaled model into a new folder, in float32."""
    tensors = {name: checkpoint.tensor(name).float() for name in checkpoint.tensors}
    layers = checkpoint.architecture.family.layers
    for prefix in sorted({name.removesuffix("q_proj") for name in magnitudes if "q_proj" in name}):
        layer = prefix.removesuffix("self_attn.")
        assert layer.startswith(layers)
        for norm, readers in READS.items():
            scale = scale_of(magnitudes[layer + readers[0]], power)
            tensors[f"{layer}{norm}.weight"] /= scale
            _multiply(tensors, [layer + name for name in readers], scale)
        scale = scale_of(magnitudes[f"{layer}mlp.down_proj"], power)
        tensors[f"{layer}mlp.up_proj.weight"] /= scale[:, None]
        _multiply(tensors, [f"{layer}mlp.down_proj"], scale)
    folder.mkdir(parents=True)
    for file in checkpoint.path.iterdir():
        if file.is_file() and not file.name.endswith(SUFFIXES):
            shutil.copy(file, folder)
    save_file(tensors, folder / "model.safetensors")


def _multiply(tensors: dict[str, torch.Tensor], names: Sequence[str], scale: torch.Tensor) -> None:
    """Multiply the columns of linears."""
    for name in names:
        tensors[f"{name}.weight"] *= scale
