"""A block type for each matrix under a budget of bits: bits go where the model's answers notice them most.

To second order, a change ΔW of one matrix moves the distribution of the answers by

    KL ≈ ½ E ⟨∂ (vᵀz) / ∂W, ΔW⟩²        z the logits, v random with E vvᵀ = diag(p) − ppᵀ

(the Fisher information along ΔW: Gauss-Newton, the Hessian of KL at zero). v = √p∘ε − p·(√pᵀε), ε = ±1, has that
covariance; an answer drawn from p would have it too, but says nothing until the model errs. So one backward pass a sample and one inner
product for each matrix and type measure what a type would cost at the very end of the network, in KL a token, with
the whole covariance of inputs and gradients and without ever forming it. ΔW is the error of the solver, on half of the
samples, and the cost is measured on the other half. Costs are taken to add up over the matrices; then the choice is a
knapsack, solved on the lower convex hulls.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import nn

from vlmq_export.errors import CalibrationError, UsageError
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.kquants import GRIDS
from vlmq_export.quantizer.solver import nearest_in_blocks, prepare, solve_blocks
from vlmq_export.quantizer.statistics import Statistics

SAMPLES = 128  # of each half; the relative error of a cost is about √(2 / samples)
_ROWS = 4096  # of an embedding, rounded at once


def choose(costs: Mapping[str, Mapping[str, tuple[int, float]]], budget: int) -> dict[str, str]:
    """matrix → type, of least total cost within `budget` bits. costs: matrix → type → (bits, cost).

    Every matrix starts with its smallest type; steps along the hulls are taken by gain a bit while they fit, which is
    optimal wherever the budget is used up exactly. Raises UsageError where not even the smallest types fit.
    """
    chosen, steps, left = {}, [], budget
    for name, kinds in costs.items():
        hull = _hull(kinds)
        chosen[name] = hull[0]
        left -= kinds[hull[0]][0]
        for before, after in pairwise(hull):
            bits, gain = kinds[after][0] - kinds[before][0], kinds[before][1] - kinds[after][1]
            steps.append((gain / bits, name, before, after, bits))
    if left < 0:
        raise UsageError(
            f"--target-bpw: the smallest types take {(budget - left) / budget:.3f} times as much; raise it"
        )
    for _, name, before, after, bits in sorted(steps, key=lambda s: -s[0]):
        if chosen[name] == before and bits <= left:
            chosen[name] = after
            left -= bits
    return chosen


def _hull(kinds: Mapping[str, tuple[int, float]]) -> list[str]:
    """Types on the lower convex hull from the smallest on, as long as more bits cost less."""
    hull: list[str] = []
    for kind, (bits, cost) in sorted(kinds.items(), key=lambda item: item[1]):
        if hull and cost >= kinds[hull[-1]][1]:
            continue
        while len(hull) > 1:
            (b0, c0), (b1, c1) = (kinds[k] for k in hull[-2:])
            if (c0 - c1) * (bits - b1) > (c1 - cost) * (b1 - b0):  # the last step gains more a bit than this one
                break
            hull.pop()
        hull.append(kind)
    return hull


def measured(
    model: nn.Module,  # float32, whole
    modules: Mapping[str, nn.Module],  # matrix → the module that has it; a tied one once
    kinds: Mapping[str, Iterable[str]],  # matrix → types to try
    solved: Container[str],  # matrices that will be solved; the others are rounded to nearest
    samples: Sequence[Sample],
    config: QuantConfig,
    *,
    memory: int | None = None,  # bytes for what is held of a matrix besides the model; None: any number
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, dict[str, float]]:
    """matrix → type → KL an answer token, in nats, that this one matrix at that type would cost.

    Raises CalibrationError where no sample has a finite gradient.
    """
    usable = [s for s in samples if bool(_predicted(s).any())][: 2 * SAMPLES]
    fitted, held_out = usable[::2], usable[1::2] or usable  # one sample must do for both
    parts = _parts(modules, kinds, memory)
    total = {name: dict.fromkeys(kinds[name], 0.0) for name in modules}
    model.requires_grad_(False)
    for done, part in enumerate(parts):
        sums = _statistics(model, {name: modules[name] for name in part if name in solved}, fitted)
        changes = {name: _errors(modules[name].weight, kinds[name], sums.pop(name, None), config) for name in part}
        weights = [modules[name].weight.requires_grad_(True) for name in part]
        draws, tokens = torch.Generator().manual_seed(config.seed), 0
        for i, sample in enumerate(held_out):
            progress(done * len(held_out) + i, len(parts) * len(held_out))
            gradients = _gradients(model, weights, sample, draws)
            if not all(bool(torch.isfinite(g).all()) for g in gradients):
                continue
            tokens += int(_predicted(sample).sum())
            for name, gradient in zip(part, gradients):
                for kind, change in changes[name].items():
                    total[name][kind] += float(torch.dot(gradient.flatten(), change.float().flatten())) ** 2 / 2
        if not tokens:
            raise CalibrationError("--target-bpw: no sample has finite gradients; the model or the images are damaged")
        for name in part:
            total[name] = {kind: cost / tokens for kind, cost in total[name].items()}
        model.requires_grad_(False)
    return total


def _predicted(sample: Sample) -> torch.Tensor:
    """bool [S − 1]: the positions whose next token is answered; of a sample without an answer, is text."""
    return sample.answer[1:] if bool(sample.answer[1:].any()) else ~sample.vision[1:]


def _statistics(model: nn.Module, modules: Mapping[str, nn.Module], samples: Sequence[Sample]) -> dict[str, Statistics]:
    """The sums of each linear's inputs in the full-precision model, all tokens alike."""
    sums = {n: Statistics.empty(m.in_features, drift=False, device=m.weight.device) for n, m in modules.items()}
    hooks = [
        m.register_forward_pre_hook(lambda _, args, part=sums[n]: part.add(args[0].flatten(0, -2)))
        for n, m in modules.items()
    ]
    try:
        with torch.no_grad():
            for sample in samples if hooks else ():
                model(**sample.model_inputs(next(model.parameters()).device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return sums


def _gradients(model: nn.Module, weights: list[nn.Parameter], sample: Sample, draws: torch.Generator) -> tuple:
    """∂ (vᵀz) / ∂W of each matrix, v drawn for each token that is answered."""
    device = weights[0].device
    with torch.enable_grad():
        logits = model(**sample.model_inputs(device), use_cache=False).logits[0, :-1]
        logits = logits[_predicted(sample).to(device)].float()
        p = logits.detach().softmax(-1)
        scattered = p.sqrt() * (torch.randint(2, p.shape, generator=draws).to(device) * 2 - 1)
        v = scattered - p * scattered.sum(-1, keepdim=True)
        return torch.autograd.grad((v * logits).sum(), weights)


@torch.no_grad()
def _errors(
    weight: torch.Tensor, kinds: Iterable[str], sums: Statistics | None, config: QuantConfig
) -> dict[str, torch.Tensor]:
    """type → Ŵ − W, bfloat16 [out, in]: solved on these inputs, or rounded to nearest where there are none."""
    weight, order = weight.detach().float(), "off" if config.act_order == "off" else "gar"
    sums, found, ready = sums and sums.rounded(), {}, {}
    for kind in kinds:
        grid = GRIDS[kind]
        if sums is None:
            rounded = torch.cat([nearest_in_blocks(part, grid).decode() for part in weight.split(_ROWS)])
        else:
            if grid.block not in ready:
                ready[grid.block] = prepare(
                    sums.hessian, sums.diagonal, group=grid.block, act_order=order, damp=config.damp
                )
            rounded = solve_blocks(weight, ready[grid.block], grid, block=config.block_size).decode()
        found[kind] = (rounded - weight).bfloat16()
    return found


def _parts(modules: Mapping[str, nn.Module], kinds: Mapping[str, Iterable[str]], memory: int | None) -> list[list[str]]:
    """Matrices that are measured at the same time: as many as fit, at least one. Each part is two passes over samples."""
    parts: list[list[str]] = [[]]
    room = memory
    for name, module in modules.items():
        weight = module.weight
        size = weight.numel() * (2 * len(list(kinds[name])) + 4) + 8 * weight.shape[1] ** 2  # errors, gradient, sums
        if room is not None and parts[-1] and size > room:
            parts.append([])
            room = memory
        parts[-1].append(name)
        room = None if room is None else room - size
    return parts
