"""AWQ and MBQ: each input channel of the weights is scaled before rounding, and the inverse goes into what comes before.

A channel's scale is s = (mean|x|)^t, normalized to √(max s · min s) = 1, and t that one of 20 whose rounded weights change
the output of the inspected module least (AWQ, arXiv 2306.00978; MBQ, arXiv 2412.19509; methods.md §4.1, §4.2):

    Σ_n c_n·|f(x_n; Q(W·s)/s) − f(x_n; W)|^p        AWQ: p = 2, c = 1     MBQ: p = 1, c = 1 at answers, ρ at image tokens

f is the attention for q, k, v, the MLP for gate and up, the linear itself for o and down. Nothing is left for a runtime to
do: 1/s goes into the norm before q, k, v and the one before gate and up, into the rows of up before down, and into those of
v before o where they fit. A norm is rounded to its stored type first and the weights take what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from vlmq_export.quantizer.distributed import ALONE, Ranks
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.model import tensor_cores
from vlmq_export.quantizer.solver import round_to_nearest
from vlmq_export.quantizer.streams import Batch
from vlmq_export.quantizer.walk import DOWN, GATE_UP, OUT, QKV, LayerWalk

POWERS = tuple(i / 20 for i in range(20))  # t
CLIPS = tuple(1 - i / 20 for i in range(10))  # AWQ: shares of a group's largest magnitude
_UNCLIPPED = ("self_attn.q_proj", "self_attn.k_proj")
_INSPECTED = {QKV: "self_attn", OUT: "self_attn.o_proj", GATE_UP: "mlp", DOWN: "mlp.down_proj"}
GridOf = Callable[[int], tuple[Affine, int]]  # a number of columns → the grid, and how many columns share a scale


@dataclass
class Scaled:
    """What a decoder layer becomes; the same function, but for the clipping."""

    weights: dict[str, torch.Tensor]  # linear → float32 [out, in]
    biases: dict[str, torch.Tensor]  # linear → float32 [out], where it has one
    norms: dict[str, torch.Tensor] = field(default_factory=dict)  # parameter of the layer → float32, storable
    powers: dict[str, float] = field(default_factory=dict)  # linear → t; absent where nothing could take 1/s


@torch.no_grad()
@tensor_cores()
def scaled_layer(
    walk: LayerWalk,  # of one stream, which stays that of full precision
    groups: Sequence[Sequence[str]],
    grid_of: GridOf,
    *,
    ratios: tuple[float, float] | None,  # MBQ's ρ of attention and MLP; None: AWQ
    stored: Callable[[str, torch.Tensor], torch.Tensor],  # a norm's new parameter as its file can hold it, float32
    norms: Sequence[tuple[str, Sequence[str]]],  # a norm, and the linears that read it
    ranks: Ranks = ALONE,
) -> Scaled:
    """Search and fold every group's scales, and for AWQ clip the ranges. Every rank ends with the same."""
    layer, modules = walk.layer, {n: walk.layer.get_submodule(n) for group in groups for n in group}
    out = Scaled(
        {n: m.weight.detach().clone() for n, m in modules.items()},
        {n: m.bias.detach().clone() for n, m in modules.items() if m.bias is not None},
    )
    clips = []
    for stage, names in enumerate(groups):
        energy = _sums(walk, stage, grid_of, clipping=ratios is None, ranks=ranks)
        scale = torch.ones_like(energy.magnitude)
        fold = _fold_of(layer, stage, names, norms)
        if fold is not None:
            weigh = None if ratios is None else ratios[stage in (GATE_UP, DOWN)]
            power = _search(walk, stage, names, energy.magnitude, grid_of, weigh, ranks)
            scale = _fold(out, layer, fold, scale_of(energy.magnitude, power), stored)
            out.powers |= dict.fromkeys(names, power)
        for name in names:
            out.weights[name] *= scale
        clips.append((names, energy.grams, scale))
    for names, grams, scale in clips if ratios is None else ():  # rows of v and up were scaled by the groups after them
        for name in (n for n in names if n not in _UNCLIPPED):
            out.weights[name] = clipped(out.weights[name], grams, scale, grid_of(len(scale))[0])
    return out


def scale_of(magnitude: torch.Tensor, power: float) -> torch.Tensor:
    """s [in] of mean|x| [in]; a channel that is never excited counts as the smallest that is told apart."""
    scale = magnitude.pow(power).clamp_min(1e-4)
    return scale / (scale.max() * scale.min()).sqrt()


@dataclass
class _Energy:
    magnitude: torch.Tensor  # mean|x|, float32 [in]
    grams: torch.Tensor | None  # Σ x xᵀ of each group, float32 [groups, group, group]


def _sums(walk: LayerWalk, stage: int, grid_of: GridOf, *, clipping: bool, ranks: Ranks) -> _Energy:
    total = grams = None
    count = 0
    for x, _ in walk.inputs(stage):
        group = grid_of(x.shape[1])[1]
        part = x.view(len(x), -1, group).transpose(0, 1)  # [groups, tokens, group]
        total = x.abs().sum(0).double() + (0 if total is None else total)
        if clipping:
            grams = (part.mT @ part).double() + (0 if grams is None else grams)
        count += len(x)
    total, count = ranks.summed(total), ranks.count(count)
    return _Energy((total / max(count, 1)).float(), ranks.summed(grams).float() if clipping else None)


def _search(
    walk: LayerWalk, stage: int, names: Sequence[str], magnitude: torch.Tensor, grid_of: GridOf, ratio: float | None,
    ranks: Ranks,
) -> float:  # fmt: skip
    """The power of least loss; the smaller one of two that are equal."""
    modules = [walk.layer.get_submodule(name) for name in names]
    source = [m.weight.detach().clone() for m in modules]
    wanted = [b.aside(_inspected(walk, stage, i)) for i, b in enumerate(walk.batches)]
    losses = []
    try:
        for power in POWERS:
            scale = scale_of(magnitude, power)
            for module, weight in zip(modules, source):
                grid, group = grid_of(weight.shape[1])
                module.weight.copy_(round_to_nearest(weight * scale, grid, group=group).decode() / scale)
            losses.append(
                sum(_loss(_inspected(walk, stage, i) - wanted[i](), b, ratio) for i, b in enumerate(walk.batches))
            )
    finally:
        for module, weight in zip(modules, source):
            module.weight.copy_(weight)
    losses = ranks.total(*losses)
    return POWERS[losses.index(min(losses))]


def _inspected(walk: LayerWalk, stage: int, index: int) -> torch.Tensor:
    module, x = walk.layer.get_submodule(_INSPECTED[stage]), walk.again(stage, index)
    return module(hidden_states=x, **walk.batches[index].kwargs)[0] if stage == QKV else module(x)


def _loss(difference: torch.Tensor, batch: Batch, ratio: float | None) -> float:
    """Σ_n c_n·mean|Δ_n|^p over the valid samples of a batch [samples, tokens, out]; the number of tokens is the same for all."""
    each = difference.square().mean(-1) if ratio is None else difference.abs().mean(-1)
    if ratio is not None:
        each = each * (batch.answer.float() + ratio * batch.image.float())
    return float(each[batch.valid].sum(dtype=torch.float64))


@dataclass(frozen=True)
class _Fold:
    """Where 1/s goes: a norm's parameter, or the rows of a linear."""

    norm: str = ""
    linear: str = ""


def _fold_of(
    layer: nn.Module, stage: int, names: Sequence[str], norms: Sequence[tuple[str, Sequence[str]]]
) -> _Fold | None:
    before = {tuple(readers): norm for norm, readers in norms}
    if tuple(names) in before:
        return _Fold(norm=f"{before[tuple(names)]}.weight")
    source = {OUT: "self_attn.v_proj", DOWN: "mlp.up_proj"}[stage]
    given, taken = layer.get_submodule(source).out_features, layer.get_submodule(names[0]).in_features
    return _Fold(linear=source) if given == taken else None  # heads that share a value do not fit


def _fold(out: Scaled, layer: nn.Module, fold: _Fold, scale: torch.Tensor, stored) -> torch.Tensor:
    """Put 1/s where it goes; the scale that the weights must then take, which is not s to the last bit."""
    if fold.linear:
        out.weights[fold.linear] /= scale[:, None]
        if fold.linear in out.biases:
            out.biases[fold.linear] /= scale
        return scale
    gain = layer.get_parameter(fold.norm)
    new = stored(fold.norm, gain / scale)
    out.norms[fold.norm] = new
    return torch.where(new == 0, torch.ones_like(gain), gain / new)


def clipped(weights: torch.Tensor, grams: torch.Tensor, scale: torch.Tensor, grid: Affine) -> torch.Tensor:
    """Weights [out, in], scaled by `scale` [in], clamped group by group to where rounding them changes the output least.

    `grams`: Σ x xᵀ of the unscaled inputs, [groups, group, group].
    """
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
