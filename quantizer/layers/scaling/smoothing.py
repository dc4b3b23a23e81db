"""Channels of a linear's inputs scaled, where what comes before the linear takes the inverse.

    x'_j = x_j / s_j        W'_ij = W_ij · s_j

`channel_scales.py` chooses s by the error that it leaves. No file grows, and no runtime does more.

1/s goes into the norm before `ins`, which is first rounded to the type that it is stored in: the
weights take the scale that is left. Before an MLP's `out` it goes into the rows of up, which is
solved by then. Its scales are divided, and no integer changes. What enters an attention's `out`
stays as it is: heads share values in most models. The sums are divided, and not collected again.
docs/methods.md §4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch

from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, put
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.grids.blocks import BlockGrid
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.grids.linears import BlockLinear, Linear
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.layers.scaling.channel_scales import Reader, least_error_scales
from vlmq_export.quantizer.layers.stack import Solved
from vlmq_export.quantizer.model.families import SubBlock
from vlmq_export.quantizer.ranks import ALONE, Ranks
from vlmq_export.quantizer.solver.hessian import pivots

CLOSE = 2**-7  # share of a row's scale that may be lost where it is divided after the solve
# A float tensor by its name in the layer → its value as the file can hold it, float32.
Stored = Callable[[str, torch.Tensor], torch.Tensor]


def divided_norm(
    name: str,  # of the norm's weight in the layer
    weight: torch.Tensor,  # [in]
    scale: torch.Tensor,  # [in]
    stored: Stored,
    offset: float,  # Family.gain
) -> tuple[torch.Tensor, torch.Tensor]:
    """A norm's weight that takes 1/s, as it is stored, and the scale that its readers take.

    That is s up to one rounding, and 1 where the gain of a channel is lost in that rounding, or
    becomes more than the type holds.
    """
    gain = weight + offset
    new = stored(name, gain / scale - offset)
    lost = (new + offset == 0) | ~torch.isfinite(new)
    return torch.where(lost, weight, new), torch.where(lost, 1.0, gain / (new + offset))


@dataclass
class Smoothing:
    """The scales of one layer, step by step, as its linears are solved."""

    walk: LayerWalk
    prefix: str  # hub name of the layer, with the dot
    job: Job
    stored: Stored
    ranks: Ranks = ALONE
    # Norms, and linears that are not quantized: parameter → float32, storable.
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    # Linear → what its columns are multiplied by, and what its rows are divided by.
    _columns: dict[str, torch.Tensor] = field(default_factory=dict)
    _rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def divide(
        self,
        step: int,
        units: Sequence[Sequence[str]],  # the linears of the step, by what they share sums with
        found: Sequence[Evidence | None],  # the sums of each unit, on the rank that owns it
        solved: list[Solved],  # the linears before, of which one may take 1/s
    ) -> torch.Tensor | None:
        """Divide what enters a step, in the layer and in the sums. Returns s, float32 [in].

        The columns of the step's linears are then to be multiplied. None where nothing that comes
        before could take 1/s.
        """
        block, closing = self.walk.step(step)
        if closing and block.kind != "mlp":
            return None
        readers = [r for i, names in enumerate(units) for r in self._readers(i, names, found[i])]
        scale = self.ranks.broadcast(least_error_scales(readers), 0)
        scale = (
            self._into_carrier(block, scale, solved) if closing else self._into_norm(block, scale)
        )
        for evidence in found:
            if evidence is not None:
                evidence.divide(scale)
        self._columns |= dict.fromkeys((block.out,) if closing else block.ins, scale)
        return scale

    def _readers(
        self, unit: int, names: Sequence[str], evidence: Evidence | None
    ) -> Iterator[Reader]:
        """The linears of a unit. What is told of their inputs comes from the rank with the sums."""
        weights = {name: self.walk.layer.get_parameter(f"{name}.weight") for name in names}
        choices = {n: self.job.grid(self.prefix + n, w.shape[1]) for n, w in weights.items()}
        first = weights[names[0]]
        told = torch.zeros(2, first.shape[1], device=first.device)
        if evidence is not None:
            told = _told(evidence.fitted, choices[names[0]], self.job.config.damp)
        own, energy = self.ranks.broadcast(told, self.ranks.owner(unit))
        for name, matrix in weights.items():
            choice = choices[name]
            yield Reader(
                matrix, own, energy, choice.stepped, choice.grid.top, choice.rounded_inputs
            )

    def scaled(self, name: str, weights: torch.Tensor) -> torch.Tensor:
        """What a linear's source weights [out, in] have become in the smoothed layer."""
        columns, rows = self._columns.get(name), self._rows.get(name)
        weights = weights if columns is None else weights * columns
        return weights if rows is None else weights / rows[:, None]

    def _into_norm(self, block: SubBlock, scale: torch.Tensor) -> torch.Tensor:
        """Divide a norm. Returns the scale that is left for its readers.

        That is s where the norm can be stored so.
        """
        layer, name = self.walk.layer, f"{block.norm}.weight"
        weight, gain = layer.get_parameter(name).detach(), self.job.family.gain
        self.floats[name], scale = divided_norm(name, weight, scale, self.stored, gain)
        for name in (f"{kept}.weight" for kept in block.kept):
            self.floats[name] = self.stored(name, layer.get_parameter(name) * scale)
        for name in (f"{n}.weight" for n in (block.norm, *block.kept)):
            self.walk.put_float(name, self.floats[name])
        return scale

    def _into_carrier(
        self, block: SubBlock, scale: torch.Tensor, solved: list[Solved]
    ) -> torch.Tensor:
        """Divide the rows of a solved linear. Returns s, with 1 where float16 would lose a row."""
        name = self.prefix + block.carrier
        index = next(i for i, (linear, _) in enumerate(solved) if linear.name == name)
        linear, metrics = solved[index]
        grid = self.job.grid(name, linear.in_features).grid
        scale = self._rows[block.carrier] = torch.where(_holds(linear, scale, grid), scale, 1.0)
        solved[index] = divided(linear, scale, grid), metrics
        put(self.walk.layer, block.carrier, solved[index][0])
        self.walk.forget_mixed()
        return scale


def _told(sums: Statistics, choice: GridChoice, damp: float) -> torch.Tensor:
    """Pivots, and mean squares of the inputs: of g²·x², float32 [2, in]."""
    if not sums.weight:
        return torch.zeros(2, len(sums.diagonal), device=sums.diagonal.device)
    matrix = sums.hessian
    own = pivots(
        matrix,
        sums.diagonal,
        group=choice.group,
        act_order=choice.act_order,
        damp=damp,
        together=choice.together,
    )
    return torch.stack([own, matrix.diagonal().float()]) / sums.weight


def divided(linear: Linear, scale: torch.Tensor, grid: Affine | BlockGrid) -> Linear:
    """A solved linear whose rows are divided by float32 [out]. The integers stay."""
    bias = None if linear.bias is None else (linear.bias / scale).half()
    if isinstance(linear, BlockLinear):
        return replace(linear, solution=linear.solution.divided(scale), bias=bias)
    assert isinstance(grid, Affine)
    return replace(linear, solution=linear.solution.divided(scale, grid), bias=bias)


def _holds(linear: Linear, scale: torch.Tensor, grid: Affine | BlockGrid) -> torch.Tensor:
    """Whether the grid has the scales of each divided row to within CLOSE; bool [out].

    Portable scales are rounded by up to so much. Float16 has fewer bits below 2⁻¹⁴, where scales of
    block types often are, and nothing above 65504.
    """
    held = torch.ones_like(scale, dtype=torch.bool)
    for new, old in zip(divided(linear, scale, grid).solution.units, linear.solution.units):
        held &= torch.isclose(new * scale[:, None], old.float(), rtol=CLOSE, atol=0).all(1)
    return held
