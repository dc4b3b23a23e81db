"""What each block type or width of each matrix would cost: the KL divergence of the answers.

To second order, a change ΔW of one matrix moves the distribution of the answers by

    KL ≈ ½ E ⟨∂ (vᵀz) / ∂W, ΔW⟩²

    z   the logits
    v   random, with the covariance E vvᵀ = diag(p) − ppᵀ of a token that is drawn from p

This is the Fisher information along ΔW (Gauss-Newton: the Hessian of KL where ΔW = 0). The vector
v = √p∘ε − p·(√pᵀε), with ε = ±1, has that covariance. (The one-hot vector of a token drawn from p,
minus p, has it too. But where the model is sure of a token, it is almost always near zero.) So one
backward pass for each sample, and one inner product for each matrix and type, measure the cost at
the end of the network with the whole covariance of inputs and gradients, which is never formed.

ΔW is the solver's error, from statistics of one half of the samples. Its cost is measured on the
other half. That of a lattice follows from that of a K type (likeness.py). The costs of the matrices
are taken to add up; `knapsack.choose` then chooses. docs/gguf.md says how well this works for block
types, docs/widths.md for widths.

On a block type ΔW is that of the plain column loop. At two bits the range matters most, and so a
width is solved with the ranges and the descent that the recipe's method has.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.calibration.hooks import before
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.blocks import GRIDS, BlockGrid
from vlmq_export.quantizer.grids.choice import grid_choice
from vlmq_export.quantizer.layers.attempt import attempt, prepared
from vlmq_export.quantizer.layers.stack import Matrix as Source
from vlmq_export.quantizer.layers.stack import Stack
from vlmq_export.quantizer.methods import Method, method_named
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.solver.block_loop import solve_blocks
from vlmq_export.quantizer.solver.hessian import Hessian, prepare
from vlmq_export.quantizer.solver.nearest import nearest_in_blocks
from vlmq_export.quantizer.type_budget import likeness
from vlmq_export.quantizer.type_budget.likeness import Kind

SAMPLES = 128  # of each half; the relative error of a cost is about √(2 / samples)
_ROWS = 4096  # rows of an embedding that are rounded at once
Matrix = nn.Linear | nn.Embedding
Errors = Mapping[str, Mapping[Kind, torch.Tensor]]  # matrix → kind → ΔW, bfloat16 [out, in]


def measured(
    model: nn.Module,  # the whole model, float32
    modules: Mapping[str, Matrix],  # matrix → the module that has it; a tied matrix stands once
    kinds: Mapping[str, Iterable[Kind]],  # matrix → types or widths to try
    solved: Container[str],  # matrices that will be solved; the others are rounded to nearest
    samples: Sequence[Sample],
    config: QuantConfig,
    *,
    memory: int | None = None,  # bytes for what is held besides the model; None: any number
    progress: Callable[[int, int], None] = lambda *_: None,
) -> dict[str, dict[Kind, float]]:
    """matrix → kind → KL per answer token, in nats, that this one matrix at that kind would cost.

    Raises CalibrationError where no sample has a finite gradient.
    """
    usable = [s for s in samples if bool(_predicted(s).any())][: 2 * SAMPLES]
    fitted, held_out = usable[::2], usable[1::2] or usable  # one sample must do for both
    tried = {name: likeness.quick(each) for name, each in kinds.items()}
    probes, ratios = likeness.probes(kinds, solved), []
    parts = _parts(modules, tried, memory)
    costs: dict[str, dict[Kind, float]] = {}
    model.requires_grad_(False)
    for done, part in enumerate(parts):
        here = {name: modules[name] for name in part}
        sums = _statistics(model, {n: m for n, m in here.items() if n in solved}, fitted)
        ratios += [_ratios(here[n].weight, kinds[n], sums[n], config) for n in probes if n in here]
        errors = {
            name: _errors(module.weight, tried[name], sums.pop(name, None), config)
            for name, module in here.items()
        }
        draws = torch.Generator().manual_seed(config.seed)

        def told(sample: int, first: int = done * len(held_out)) -> None:
            progress(first + sample, len(parts) * len(held_out))

        costs |= _costs(model, here, errors, held_out, draws, told)
        model.requires_grad_(False)
    return likeness.completed(costs, kinds, ratios)


def _parts(
    modules: Mapping[str, Matrix], kinds: Mapping[str, Iterable[Kind]], memory: int | None
) -> list[list[str]]:
    """The matrices, in parts that are measured at the same time: as many as fit, at least one.

    Each part takes two passes, one over each half of the samples.
    """
    parts: list[list[str]] = [[]]
    room = memory
    for name, module in modules.items():
        weight = module.weight
        errors, gradient = 2 * len(list(kinds[name])), 4  # bytes of each weight
        sums = 8 * weight.shape[1] ** 2
        size = weight.numel() * (errors + gradient) + sums
        if room is not None and parts[-1] and size > room:
            parts.append([])
            room = memory
        parts[-1].append(name)
        room = None if room is None else room - size
    return parts


def _statistics(
    model: nn.Module, modules: Mapping[str, Matrix], samples: Sequence[Sample]
) -> dict[str, Statistics]:
    """The sums of each linear's inputs in the full-precision model. All tokens count alike."""
    sums: dict[str, Statistics] = {}
    with ExitStack() as hooks, torch.no_grad():
        for name, module in modules.items():
            weight = module.weight
            sums[name] = Statistics.empty(weight.shape[1], drift=False, device=weight.device)
            hooks.enter_context(before(module, _adds_to(sums[name])))
        for sample in samples if sums else ():
            model(**sample.model_inputs(next(model.parameters()).device), use_cache=False)
    return sums


def _adds_to(sums: Statistics) -> Callable[[tuple, dict], None]:
    """What adds a linear's input [batch, tokens, in] to its sums."""
    return lambda args, _kwargs: sums.add(args[0].flatten(0, -2))


@torch.no_grad()
def _errors(
    weight: torch.Tensor,  # W, [out, in]
    kinds: Iterable[Kind],
    sums: Statistics | None,  # of the inputs; None: there are none, and W is rounded to nearest
    config: QuantConfig,
) -> dict[Kind, torch.Tensor]:
    """kind → Ŵ − W, bfloat16 [out, in], where Ŵ is W solved on that kind."""
    weight = weight.detach().float()
    types = [kind for kind in kinds if isinstance(kind, str)]
    if sums is None:
        return {kind: (_rounded(weight, GRIDS[kind]) - weight).bfloat16() for kind in types}
    sums = sums.to_float32()
    widths = [kind for kind in kinds if isinstance(kind, int)]
    return _on_types(weight, types, sums, config) | _at_widths(weight, widths, sums, config)


def _at_widths(
    weight: torch.Tensor, widths: Iterable[int], sums: Statistics, config: QuantConfig
) -> dict[Kind, torch.Tensor]:
    """width → Ŵ − W, where Ŵ is solved with the ranges and the descent of the recipe's method."""
    own = method_named(config.method)
    method = Method(refine=own.refine, neighbours=own.neighbours)
    found: dict[Kind, torch.Tensor] = {}
    for bits in widths:
        choice = grid_choice(config.at(bits), "", weight.shape[1])
        stack = Stack.of([Source("", weight)], choice)
        (solved,) = attempt(stack, prepared(stack, sums, config), None, method, config)
        found[bits] = (solved.solution.decode() - weight).bfloat16()
    return found


def _on_types(
    weight: torch.Tensor, types: Iterable[str], sums: Statistics, config: QuantConfig
) -> dict[Kind, torch.Tensor]:
    """type → Ŵ − W, where Ŵ is solved by the plain column loop."""
    order = "off" if config.act_order == "off" else "gar"
    found: dict[Kind, torch.Tensor] = {}
    hessians: dict[tuple[int, int], Hessian] = {}  # by the columns of a block and of a point
    for kind in types:
        grid = GRIDS[kind]
        key = grid.block, grid.together
        if key not in hessians:
            hessians[key] = prepare(
                sums.hessian,
                sums.diagonal,
                group=grid.block,
                act_order=order,
                damp=config.damp,
                together=grid.together,
            )
        solution = solve_blocks(weight, hessians[key], grid, block=config.block_size)
        found[kind] = (solution.decode() - weight).bfloat16()
    return found


def _ratios(
    weight: torch.Tensor, kinds: Iterable[Kind], sums: Statistics, config: QuantConfig
) -> likeness.Ratios:
    """What lattices err on this matrix, over what the types err that they are likened to."""
    lattices = [kind for kind in kinds if isinstance(kind, str) and kind in likeness.LIKE]
    both = dict.fromkeys([*lattices, *(likeness.LIKE[kind] for kind in lattices)])
    return likeness.ratios(_errors(weight, both, sums, config), sums.to_float32().hessian)


def _rounded(weight: torch.Tensor, grid: BlockGrid) -> torch.Tensor:
    """The weights rounded to nearest, some rows at a time, float32 [out, in]."""
    return torch.cat([nearest_in_blocks(rows, grid).decode() for rows in weight.split(_ROWS)])


def _costs(
    model: nn.Module,
    modules: Mapping[str, Matrix],
    errors: Errors,
    samples: Sequence[Sample],
    draws: torch.Generator,
    progress: Callable[[int], None],
) -> dict[str, dict[Kind, float]]:
    """matrix → kind → KL per answer token over these samples.

    A sample whose gradients are not finite is left out.
    """
    total = {name: dict.fromkeys(kinds, 0.0) for name, kinds in errors.items()}
    weights = [module.weight.requires_grad_(True) for module in modules.values()]
    tokens = 0
    for i, sample in enumerate(samples):
        progress(i)
        gradients = _gradients(model, weights, sample, draws)
        if not all(bool(torch.isfinite(g).all()) for g in gradients):
            continue
        tokens += int(_predicted(sample).sum())
        for name, gradient in zip(modules, gradients):
            for kind, error in errors[name].items():
                slope = float(torch.dot(gradient.flatten(), error.float().flatten()))
                total[name][kind] += slope**2 / 2
    if not tokens:
        raise CalibrationError(
            "--target-bpw: no sample has finite gradients; the model or the images are damaged"
        )
    return {
        name: {kind: cost / tokens for kind, cost in kinds.items()} for name, kinds in total.items()
    }


def _gradients(
    model: Any,
    weights: Sequence[torch.Tensor],
    sample: Sample,
    draws: torch.Generator,
) -> tuple[torch.Tensor, ...]:
    """∂ (vᵀz) / ∂W of each matrix, summed over the answer's tokens, with a v drawn for each."""
    device = weights[0].device
    with torch.enable_grad():
        logits = model(**sample.model_inputs(device), use_cache=False).logits[0, :-1]
        logits = logits[_predicted(sample).to(device)].float()
        p = logits.detach().softmax(-1)
        signs = torch.randint(2, p.shape, generator=draws).to(device) * 2 - 1
        scattered = p.sqrt() * signs
        v = scattered - p * scattered.sum(-1, keepdim=True)
        return torch.autograd.grad((v * logits).sum(), weights)


def _predicted(sample: Sample) -> torch.Tensor:
    """bool [S − 1]: the positions whose next token is part of the answer.

    Of a sample without an answer, those whose next token is text.
    """
    return sample.answer[1:] if bool(sample.answer[1:].any()) else ~sample.vision[1:]
