"""Channels of a linear's inputs made even, by scales that what comes before takes.

    x'_j = x_j / s_j        W'_ij = W_ij · s_j        s_j = (a_j / a)^t

a_j is the mean magnitude of a channel over the calibration tokens, and a the geometric mean of
these. t is the recipe's `smooth`: with ½ half of the spread, in octaves, stays in the inputs and
half goes into the weights. Runtimes that round activations to 8 bits lose what a few large channels
leave to the others (SmoothQuant, arXiv 2211.10438), and columns that matter much are rounded on a
finer grid (AWQ, arXiv 2306.00978). No file grows, and no runtime does more.

1/s goes into the norm before `ins`, which is first rounded to the type that it is stored in: the
weights take the scale that is left. Before an MLP's `out` it goes into the rows of up, which is
solved by then. Its scales are divided, and no integer changes. What enters an attention's `out`
stays as it is: heads share values in most models. The sums are divided, and not collected again.
docs/methods.md §4.4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch

from vlmq_export.quantizer.calibration.collect import Evidence
from vlmq_export.quantizer.calibration.layer_walk import LayerWalk, put
from vlmq_export.quantizer.grids.linears import Linear
from vlmq_export.quantizer.layers.stack import Solved
from vlmq_export.quantizer.model.families import SubBlock
from vlmq_export.quantizer.ranks import ALONE, Ranks

OCTAVES = 8  # the most that a channel is scaled by, either way
CLOSE = 2**-7  # share of a row's scale that may be lost where it is divided after the solve
# A float tensor by its name in the layer → its value as the file can hold it, float32.
Stored = Callable[[str, torch.Tensor], torch.Tensor]


def scale_of(magnitude: torch.Tensor, power: float) -> torch.Tensor:
    """s, float32 [in], of Σ|x| [in]. A channel that is never excited has 1."""
    live = magnitude > 0
    level = magnitude.double().where(live, 1.0).log2()
    typical = level[live].mean() if bool(live.any()) else 0.0
    octaves = ((level - typical) * power).clamp(-OCTAVES, OCTAVES)
    return octaves.where(live, 0.0).exp2().float()


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
    power: float  # t
    stored: Stored
    offset: float = 0.0  # Family.gain
    ranks: Ranks = ALONE
    # Norms, and linears that are not quantized: parameter → float32, storable.
    floats: dict[str, torch.Tensor] = field(default_factory=dict)
    # Linear → what its columns are multiplied by, and what its rows are divided by.
    _columns: dict[str, torch.Tensor] = field(default_factory=dict)
    _rows: dict[str, torch.Tensor] = field(default_factory=dict)

    def divide(
        self,
        step: int,
        found: Sequence[Evidence | None],  # of the linears of the step
        solved: list[Solved],  # the linears before, of which one may take 1/s
        prefix: str,  # hub name of the layer, with the dot
    ) -> torch.Tensor | None:
        """Divide what enters a step, in the layer and in the sums. Returns s, float32 [in].

        The columns of the step's linears are then to be multiplied. None where nothing that comes
        before could take 1/s.
        """
        sums = [evidence for evidence in found if evidence is not None]
        block, closing = self.walk.step(step)
        if not sums or (closing and block.kind != "mlp"):
            return None
        scale = scale_of(self.ranks.summed(sums[0].magnitude), self.power)
        if closing:
            scale = self._into_carrier(block, scale, solved, prefix)
        else:
            scale = self._into_norm(block, scale)
        for evidence in sums:
            evidence.divide(scale)
        self._columns |= dict.fromkeys((block.out,) if closing else block.ins, scale)
        return scale

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
        weight = layer.get_parameter(name).detach()
        self.floats[name], scale = divided_norm(name, weight, scale, self.stored, self.offset)
        for name in (f"{kept}.weight" for kept in block.kept):
            self.floats[name] = self.stored(name, layer.get_parameter(name) * scale)
        for name in (f"{n}.weight" for n in (block.norm, *block.kept)):
            self.walk.put_float(name, self.floats[name])
        return scale

    def _into_carrier(
        self, block: SubBlock, scale: torch.Tensor, solved: list[Solved], prefix: str
    ) -> torch.Tensor:
        """Divide the rows of a solved linear. Returns s, with 1 where float16 would lose a row."""
        name = prefix + block.carrier
        index = next(i for i, (linear, _) in enumerate(solved) if linear.name == name)
        linear, metrics = solved[index]
        scale = self._rows[block.carrier] = torch.where(_holds(linear, scale), scale, 1.0)
        solved[index] = divided(linear, scale), metrics
        put(self.walk.layer, block.carrier, solved[index][0])
        self.walk.forget_mixed()
        return scale


def divided(linear: Linear, scale: torch.Tensor) -> Linear:
    """A solved linear whose rows are divided by float32 [out]. The integers stay."""
    bias = None if linear.bias is None else (linear.bias / scale).half()
    return replace(linear, solution=linear.solution.divided(scale), bias=bias)


def _holds(linear: Linear, scale: torch.Tensor) -> torch.Tensor:
    """Whether float16 has the scales of each divided row to within CLOSE; bool [out].

    It has fewer bits below 2⁻¹⁴, where scales of block types often are, and nothing above 65504.
    """
    held = torch.ones_like(scale, dtype=torch.bool)
    for new, old in zip(divided(linear, scale).solution.units, linear.solution.units):
        held &= torch.isclose(new * scale[:, None], old.float(), rtol=CLOSE, atol=0).all(1)
    return held
