"""AWQ and MBQ: input channels are scaled before rounding. What comes before takes the inverse.

The scale of a channel is s = (mean|x|)^t, normalized to √(max s · min s) = 1. Of 20 values of t
that one is taken whose rounded weights change the output of the inspected module f least (AWQ,
arXiv 2306.00978; MBQ, arXiv 2412.19509):

    Σ_n c_n·|f(x_n; Q(W·s)/s) − f(x_n; W)|^p

    AWQ    p = 2, c = 1
    MBQ    p = 1, c = 1 at answer tokens and ρ at image tokens

A layer is a chain of sub-blocks, x ← x + post(out(mix(ins(norm(x))))). f is out(mix(ins(·))) for
`ins`, which is the attention for q, k and v, and the MLP for gate and up; it is the linear itself
for `out`. Nothing is left for a runtime to do. 1/s goes into the norm before `ins`. Before `out` it
goes into the rows of the linear in which the mix is linear: into those of up, and into those of v
where they fit. A norm is first rounded to the type that it is stored in, and the weights take the
scale that is left. Linears that read the norm and stay floats take it too, and are rounded to the
type that they are stored in.
docs/methods.md §4.1 and §4.2.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.batches import Batch
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk
from vlmq_export.quantizer.calibration.sub_blocks import inner
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.layers.scaling.smoothing import Stored, divided_norm
from vlmq_export.quantizer.model.families import groups_of
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.solver.nearest import round_to_nearest

POWERS = tuple(i / 20 for i in range(20))  # values of t that are tried
CLIPS = tuple(1 - i / 20 for i in range(10))  # AWQ: shares of a group's largest magnitude
_UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj", "linear_attn.in_proj_qkv")
# Linear and its columns → its grid, and the columns per scale.
GridOf = Callable[[str, int], tuple[Affine, int]]


@dataclass
class Scaled:
    """What a decoder layer becomes: the same function, up to the clipping of weights."""

    weights: dict[str, torch.Tensor]  # linear → float32 [out, in]
    biases: dict[str, torch.Tensor]  # linear → float32 [out], where it has one
    # Norms, and linears that are not quantized: parameter → float32, storable.
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    powers: dict[str, float] = field(default_factory=dict)  # linear → t, where something took 1/s


@torch.no_grad()
@tensor_cores()
def scaled_layer(
    walk: LayerWalk,  # of one stream, which stays that of full precision
    grid_of: GridOf,
    *,
    ratios: Sequence[float] | None,  # MBQ's ρ, one for each sub-block; None: AWQ
    stored: Stored,
    offset: float = 0.0,  # Family.gain
    ranks: Ranks = ALONE,
) -> Scaled:
    """Search and fold the scales of every step, and for AWQ clip the ranges.

    Every rank ends with the same.
    """
    layer, groups = walk.layer, groups_of(walk.blocks)
    modules = {n: layer.get_submodule(n) for names in groups for n in names}
    out = Scaled(
        {n: m.weight.detach().clone() for n, m in modules.items()},
        {n: m.bias.detach().clone() for n, m in modules.items() if m.bias is not None},
    )
    clips = []
    for step, names in enumerate(groups):
        _, group = grid_of(names[0], modules[names[0]].in_features)
        energy = _energy(walk, step, group, clipping=ratios is None, ranks=ranks)
        scale = torch.ones_like(energy.magnitude)
        fold = _fold_of(walk, step)
        if fold is not None:
            weigh = None if ratios is None else ratios[step // 2]
            power = _search(walk, step, names, energy.magnitude, grid_of, weigh, ranks)
            scale = _fold(out, layer, fold, scale_of(energy.magnitude, power), stored, offset)
            out.powers |= dict.fromkeys(names, power)
        for name in names:
            out.weights[name] *= scale
        block, closing = walk.step(step)
        for name in () if closing else (f"{kept}.weight" for kept in block.kept):
            out.floats[name] = stored(name, layer.get_parameter(name) * scale)
        clips.append((names, energy.grams, scale))
    # Only now, because the rows of v and up have been scaled by the steps after them.
    for names, grams, scale in clips:
        for name in (n for n in names if n not in _UNCLIPPED):
            if grams is not None:
                grid, _ = grid_of(name, len(scale))
                out.weights[name] = clipped(out.weights[name], grams, scale, grid)
    return out


def scale_of(magnitude: torch.Tensor, power: float) -> torch.Tensor:
    """s [in] of mean|x| [in].

    A channel that is never excited counts as the smallest that is told apart.
    """
    scale = magnitude.pow(power).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


@dataclass
class _Energy:
    magnitude: torch.Tensor  # mean|x|, float32 [in]
    grams: torch.Tensor | None  # Σ x xᵀ of each group, float32 [groups, group, group]


def _energy(walk: LayerWalk, step: int, group: int, *, clipping: bool, ranks: Ranks) -> _Energy:
    """What enters the linears of a step, over all samples of all ranks."""
    total = grams = None
    count = 0
    for entering in walk.inputs(step):
        x = entering.quantized
        part = x.view(len(x), -1, group).transpose(0, 1)  # [groups, tokens, group]
        total = x.abs().sum(0).double() + (0 if total is None else total)
        if clipping:
            grams = (part.mT @ part).double() + (0 if grams is None else grams)
        count += len(x)
    assert total is not None, "a rank without samples is refused by Ranks.share"
    total, count = ranks.summed(total), ranks.count(count)
    magnitude = (total / max(count, 1)).float()
    return _Energy(magnitude, None if grams is None else ranks.summed(grams).float())


def _search(
    walk: LayerWalk,
    step: int,
    names: Sequence[str],
    magnitude: torch.Tensor,
    grid_of: GridOf,
    ratio: float | None,
    ranks: Ranks,
) -> float:
    """The power of least loss; of two with the same loss the smaller one."""
    modules = [walk.layer.get_submodule(name) for name in names]
    source = [m.weight.detach().clone() for m in modules]
    wanted = [b.aside(_inspected(walk, step, i)) for i, b in enumerate(walk.batches)]
    losses = []
    try:
        for power in POWERS:
            scale = scale_of(magnitude, power)
            for name, module, weight in zip(names, modules, source):
                grid, group = grid_of(name, weight.shape[1])
                rounded = round_to_nearest(weight * scale, grid, group=group).decode()
                module.weight.copy_(rounded / scale)
            losses.append(
                sum(
                    _loss(_inspected(walk, step, i) - wanted[i](), batch, ratio)
                    for i, batch in enumerate(walk.batches)
                )
            )
    finally:
        for module, weight in zip(modules, source):
            module.weight.copy_(weight)
    losses = ranks.total(*losses)
    return POWERS[losses.index(min(losses))]


def _inspected(walk: LayerWalk, step: int, index: int) -> torch.Tensor:
    """f of one batch, with the weights that the layer has now."""
    (block, closing), x = walk.step(step), walk.again(step, index)
    if closing:
        return walk.layer.get_submodule(block.out)(x)
    return inner(walk.layer, block, x, walk.batches[index].kwargs)


def _loss(difference: torch.Tensor, batch: Batch, ratio: float | None) -> float:
    """Σ_n c_n·mean|Δ_n|^p over the valid samples of a batch, for Δ [samples, tokens, out].

    The number of tokens is the same for all powers, so that it need not be divided by.
    """
    if ratio is None:
        each = difference.square().mean(-1)
    else:
        each = difference.abs().mean(-1) * (batch.answer.float() + ratio * batch.image.float())
    return float(each[batch.valid].sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Fold:
    """Where 1/s goes: the parameter of a norm, or the rows of a linear."""

    norm: str = ""
    linear: str = ""


def _fold_of(walk: LayerWalk, step: int) -> _Fold | None:
    """None where no linear is the carrier, and where heads share a value.

    The rows of v do not fit the columns of o then.
    """
    block, closing = walk.step(step)
    if not closing:
        return _Fold(norm=f"{block.norm}.weight")
    if not block.carrier:
        return None
    given, taken = (walk.layer.get_submodule(name) for name in (block.carrier, block.out))
    return _Fold(linear=block.carrier) if given.out_features == taken.in_features else None


def _fold(
    out: Scaled, layer: Any, fold: _Fold, scale: torch.Tensor, stored: Stored, offset: float
) -> torch.Tensor:
    """Put 1/s where it goes. Returns the scale for the weights, which is s up to one rounding."""
    if fold.linear:
        out.weights[fold.linear] /= scale[:, None]
        if fold.linear in out.biases:
            out.biases[fold.linear] /= scale
        return scale
    weight = layer.get_parameter(fold.norm).detach()
    out.floats[fold.norm], scale = divided_norm(fold.norm, weight, scale, stored, offset)
    return scale


def clipped(
    weights: torch.Tensor,  # float32 [out, in], scaled by `scale`
    grams: torch.Tensor,  # Σ x xᵀ of the unscaled inputs, [groups, group, group]
    scale: torch.Tensor,  # [in]
    grid: Affine,
) -> torch.Tensor:
    """Weights clamped, group by group, to where rounding them changes the output least."""
    rows, (groups, group, _) = len(weights), grams.shape
    parts, inverse = weights.view(rows, groups, group), 1 / scale.view(groups, group)
    grams = grams * inverse[:, :, None] * inverse[:, None, :]
    largest = parts.abs().amax(-1, keepdim=True)
    best, least = parts, torch.full((rows, groups), torch.inf, device=weights.device)
    for share in CLIPS:
        tried = parts.clamp(-share * largest, share * largest)
        step, zero = (p[..., None] for p in grid.fit(tried))
        error = grid.decode(grid.encode(tried, step, zero), step, zero) - parts
        error = error.transpose(0, 1)  # [groups, out, group]
        loss = ((error @ grams) * error).sum(-1).T
        better = loss < least
        least, best = torch.where(better, loss, least), torch.where(better[..., None], tried, best)
    return best.reshape(rows, -1)
