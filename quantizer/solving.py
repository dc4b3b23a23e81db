"""One unit of work: linears that share their statistics, from sums to integers with their metrics."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn

from vlmq_export.errors import CheckpointError
from vlmq_export.quantizer import kquants, ranges, refine, solver
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids import grid_for
from vlmq_export.quantizer.linears import BlockLinear, Linear, QuantizedLinear
from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.model import tensor_cores
from vlmq_export.quantizer.statistics import Statistics

Solved = tuple[Linear, dict]  # with its metrics
Rounded = solver.Solution | solver.BlockSolution


@torch.no_grad()
def solve_unit(
    layer: nn.Module,
    prefix: str,
    names: Sequence[str],
    sums: Statistics | None,
    held: Statistics | None,  # of the samples put aside, where the method chooses by them
    config: QuantConfig,
    method: Method,
) -> list[Solved]:
    """Solve linears that share statistics: those of one grid together, stacked by rows."""
    kinds = {name: config.types.get(prefix + name, "") for name in names}
    energy = (sums.hessian.diagonal() / sums.weight).float() if sums and sums.weight else None  # of the inputs, [in]
    solved = {}
    for kind in dict.fromkeys(kinds.values()):
        alike = [name for name in names if kinds[name] == kind]
        stack = Stack([layer.get_submodule(name) for name in alike], sums, held, config, kind)
        for name, (part, metrics) in zip(alike, stack.solved(method)):
            bias = layer.get_submodule(name).bias
            solved[name] = (linear_of(prefix, name, bias, part, config, energy), metrics)
    return [solved[name] for name in names]


class Stack:
    """Linears of one grid on the same sums, solved together as rows of one matrix."""

    def __init__(
        self, modules: Sequence[nn.Module], sums: Statistics | None, held: Statistics | None, config: QuantConfig, kind: str
    ):  # fmt: skip
        self.weights = torch.cat([m.weight.float() for m in modules])  # [out of all, in]
        self.sizes = [m.out_features for m in modules]
        self.sums, self.held, self.config, self.kind = sums, held, config, kind
        columns = self.weights.shape[1]
        self.grid = kquants.GRIDS[kind] if kind else grid_for(config, columns)
        self.group = self.grid.block if kind else config.group_columns(columns)
        # The columns of a block stay together.
        self.order = "gar" if kind and config.act_order != "off" else config.act_order

    def solved(self, method: Method) -> list[tuple[Rounded, dict]]:
        """(solution, metrics) of each linear."""
        if self.sums is None:
            rounded = self._parts(nearest(self.weights, self.kind, self.config))
            return [(part, self._metrics(part, weights)) for part, weights in zip(rounded, self._split(self.weights))]
        self._prepare()
        if method.candidates:
            solved = self._chosen({name: self._try(METHODS[name]) for name in method.candidates})
        else:
            solved = self._try(method)
        sums = self.sums
        target = self.weights if self.shift is None else self.weights + self.shift
        common = {
            "damp": self.hessian.damp, "fallback": self.hessian.fallback, "dead_columns": int(self.hessian.dead.sum()),
            "tokens": sums.tokens, "effective_tokens": round(sums.effective_tokens, 1),
        }  # fmt: skip
        if sums.drift is not None and self.shift is None:
            common["drift_ignored"] = True
        return [
            (part, self._metrics(part, weights) | common | chosen | self._losses(part, weights, aim))
            for (part, chosen), weights, aim in zip(solved, self._split(self.weights), self._split(target))
        ]

    def _prepare(self) -> None:
        """Factorize A, and find where the exact target lies."""
        sums = self.sums
        self.hessian = solver.prepare(
            sums.hessian, sums.diagonal, group=self.group, act_order=self.order, damp=self.config.damp
        )
        self.shift = None  # of the exact target, W' − W for α = 1
        if sums.drift is not None and not self.hessian.fallback:
            shift = solver.regression(sums.mismatch(self.weights), self.hessian)
            self.shift = shift if bool(torch.isfinite(shift).all()) else None

    def _try(self, method: Method, shares: Sequence[float] | None = None) -> list[tuple[Rounded, dict]]:
        """(solution, what was chosen) of each linear by one method; `shares`: α of each linear, if it is known already."""
        aim, columns, own, fit, chosen = self.weights, None, None, None, [{} for _ in self.sizes]
        alpha = self.config.alpha if method.alpha is None else method.alpha
        if self.shift is not None and method.drift == "columns":
            columns = solver.column_term(self.hessian, self.sums.drift, alpha)
            own = solver.own_term(self.hessian, self.sums.drift, alpha) if method.own else None
        elif self.shift is not None and method.drift == "exact":
            shares = shares or ([alpha] * len(self.sizes) if alpha != "held-out" else self._shares())
            aim = torch.cat([w + a * s for w, a, s in zip(self._split(aim), shares, self._split(self.shift))])
            chosen = [{"alpha": round(share, 4)} for share in shares]
        if method.ranges == "modality" and not self.kind and not self.hessian.fallback:
            fit, mixes = self._modality_fit(self._moves(method))
            chosen = [{"mix": mix} for mix in mixes]
        solution = self._loop(aim, columns, own, fit, method)
        return list(zip(self._parts(solution), chosen))

    def _loop(self, aim: torch.Tensor, columns, own, fit, method: Method) -> Rounded:
        """The column loop and what is around it, toward `aim` [out, in]."""
        better = method.refine
        if self.kind:
            solution = solver.solve_blocks(
                aim, self.hessian, self.grid, block=self.config.block_size, columns=columns, own=own
            )
            return refine.descend(solution, aim, self.hessian, sweeps=better.sweeps)

        def solve(target: torch.Tensor, fit: solver.Fit | None) -> solver.Solution:
            return solver.solve(
                target, self.hessian, self.grid, group=self.group, act_order=self.order, block=self.config.block_size,
                columns=columns, own=own, fit=fit,
            )  # fmt: skip

        if better.shrink:
            solution = refine.best_range(solve, aim, self.hessian, self.grid, better.shrink, self._moves(method))
        else:
            solution = solve(aim, fit)
        return refine.descend(solution, aim, self.hessian, self.grid, sweeps=better.sweeps, refit=better.refit)

    def _shares(self) -> list[float]:
        """α of each linear: where W + α·(W' − W), unrounded, errs least on the samples put aside; in closed form.

        Σ‖α·s·x − (w·Δx + Δr)‖² is least at α = ⟨S, W·D + R⟩/⟨S·A, S⟩, all three of those samples.
        """
        pull, bend = (
            self._split(x * self.shift) for x in (self.held.mismatch(self.weights), self.shift @ self.held.hessian)
        )
        sums = [[float(x.sum(dtype=torch.float64)) for x in pair] for pair in zip(pull, bend)]
        return [min(max(p / b, 0.0), 1.0) if b > 0 else 0.0 for p, b in sums]

    def _moves(self, method: Method) -> Sequence[int]:
        """Of the zero-point, in a search of ranges."""
        few = self.config.bits <= 3 and not self.config.symmetric
        return ranges.NEIGHBOURS if method.neighbours and few else (0,)

    def _modality_fit(self, moves: Sequence[int]) -> tuple[solver.Fit, list[float]]:
        """VLM-PTQ's range search, each linear of the stack under its own μ."""
        mixes = [ranges.best_mix(part, self.sums, self.grid, self.group) for part in self._split(self.weights)]
        weigh = [ranges.mixed(self.sums, m)[:, None].expand(-1, n) for m, n in zip(mixes, self.sizes)]
        importance = torch.cat(weigh, 1)  # [in, out]
        return (lambda part, columns: ranges.search(self.grid, part, importance[columns], moves=moves)), mixes

    def _chosen(self, tried: dict[str, list[tuple[Rounded, dict]]]) -> list[tuple[Rounded, dict]]:
        """Of each linear the candidate with the least error on the samples put aside, solved once more from all samples.

        The first candidate is kept where others are equal, and the second solution only where it errs no more on those
        samples than the first candidate did: never worse than that one, there.
        """
        weights, held = self._split(self.weights), self.held
        errors = [
            {name: held.error(parts[i][0].decode(), w) for name, parts in tried.items()} for i, w in enumerate(weights)
        ]
        names = [min(each, key=each.__getitem__) for each in errors]
        shares = [tried[name][i][1].get("alpha", 0.0) for i, name in enumerate(names)]
        self.sums.merge(held)
        self._prepare()
        again = {name: self._try(METHODS[name], shares) for name in dict.fromkeys(names)}
        solved = []
        for i, (name, each, w) in enumerate(zip(names, errors, weights)):
            first = each[next(iter(each))]
            part, chosen = again[name][i]
            error = held.error(part.decode(), w)
            if not error <= first:
                (part, chosen), error = tried[name][i], each[name]
            energy = solver.weighted_loss(torch.zeros_like(w), w, held.hessian)
            gain = (first - each[name]) / energy if energy > 0 and math.isfinite(each[name]) else 0.0
            solved.append((part, chosen | {"method": name, "held_out_gain": gain}))
        return solved

    def _split(self, rows: torch.Tensor) -> Sequence[torch.Tensor]:
        return rows.split(self.sizes)

    def _parts(self, solution: Rounded) -> list[Rounded]:
        ends = torch.tensor(self.sizes).cumsum(0).tolist()
        return [solution.rows(end - size, end) for end, size in zip(ends, self.sizes)]

    @tensor_cores()
    def _losses(self, part: Rounded, weights: torch.Tensor, aim: torch.Tensor) -> dict:
        """The weighted loss against the target of the method's objective, and relative to that target's own energy; beside
        it what rounding `weights` to nearest would have left."""
        plain = nearest(weights, self.kind, self.config).decode()
        tried = (part.decode(), plain, torch.zeros_like(aim))
        loss, near, energy = (solver.weighted_loss(w, aim, self.sums.hessian) for w in tried)
        if not all(map(math.isfinite, (loss, near, energy))):
            return {}  # sums beyond float32: rounded to nearest, nothing to report
        relative = [(max(x, 0.0) / energy) ** 0.5 if energy > 0 else 0.0 for x in (loss, near)]
        return {"loss": loss, "relative_error": relative[0], "nearest_error": relative[1]}

    def _metrics(self, part: Rounded, weights: torch.Tensor) -> dict:
        return {"weight_error": ratio(part.decode() - weights, weights)}


def nearest(weights: torch.Tensor, kind: str, config: QuantConfig) -> Rounded:
    """Weights [out, in] rounded to nearest on the grid of the recipe, or of a block type."""
    if kind:
        return solver.nearest_in_blocks(weights, kquants.GRIDS[kind])
    columns = weights.shape[1]
    return solver.round_to_nearest(weights, grid_for(config, columns), group=config.group_columns(columns))


def ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    return float(difference.double().norm() / whole.double().norm().clamp_min(1e-300))


def linear_of(
    prefix: str,
    name: str,
    bias: torch.Tensor | None,
    part: Rounded,
    config: QuantConfig,
    energy: torch.Tensor | None = None,
) -> Linear:
    bias = None if bias is None else bias.detach().half()
    if bias is not None and not bool(torch.isfinite(bias).all()):
        raise CheckpointError(f"{prefix}{name}.bias exceeds float16's range, which every runtime format stores it in")
    if isinstance(part, solver.BlockSolution):
        return BlockLinear(prefix + name, part.codes, part.params, bias, part.grid.name, energy)
    return QuantizedLinear(
        prefix + name, part.codes, part.scales, part.zero_points, part.g_idx, bias,
        config.bits, config.group_size, config.symmetric, energy,
    )  # fmt: skip
