"""The methods, as rows of one table.

A row says which statistics are needed, which target is rounded, how tokens are weighed, and what
follows the column loop. All rows share one solver, `quantizer/solver/`. Three kinds of target take
the drift between the two streams into account, or do not:

    plain      rounds toward W under A
    columns    adds GPTAQ's column term; the papers' numbers come from it
    exact      rounds toward W' = W + α·W·D·(A+λI)⁻¹, the true solution of the same objective

docs/methods.md has the equations, and §5.1 says why `exact` differs from `columns`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmq_export.errors import UsageError


@dataclass(frozen=True)
class Refinement:
    """What the papers' methods do not do: ranges judged by the outcome, and descent on integers."""

    sweeps: int = 0  # of coordinate descent (solver/descent.py)
    refit: bool = False  # the scales, between the sweeps
    shrink: tuple[float, ...] = ()  # shares of min-max that are tried for each row


@dataclass(frozen=True)
class Method:
    """One row of the table."""

    about: str = ""  # one line for the command's help
    calibrated: bool = True  # whether it looks at samples
    drift: Literal["plain", "columns", "exact"] = "plain"
    # The gradient that weighs a token: VLMQ's local one, by its norm, or that of the answers' loss.
    importance: Literal["none", "l1", "l2", "answers"] = "none"
    power: float = 1.0  # of g; with .5 a token counts g times where it would count g² times
    per_sample: bool = False  # whether every sample weighs the same (D2)
    weighs: Literal["qkvo", "qkv", "all"] = "qkvo"  # the projections that importance is for
    effective: float = 0.0  # effective tokens that must be left, as a multiple of `in`; 0: any (D5)
    clip: float = 0.0  # g² is cut off at this multiple of its mean; 0: nowhere
    # Factor on the exact target's shift. None: the recipe's; "held-out": the best for samples that
    # were put aside.
    alpha: float | Literal["held-out"] | None = None
    residual: bool = False  # o and down also make up for the residual stream's own drift (LoaQ)
    own: bool = False  # VLM-PTQ's C: a column also makes up for its own drift
    ranges: Literal["minmax", "modality"] = "minmax"  # `modality`: VLM-PTQ's M
    neighbours: bool = False  # up to 3 bits, zero-points next to a range's own are tried too
    scaling: Literal["", "awq", "mbq"] = ""  # rounding to nearest after scaling input channels
    # Whether input channels are scaled for the least error where the recipe says nothing of it.
    smooths: bool = False
    refine: Refinement = field(default=Refinement())
    # `held-out`: each stack finds its own, on samples that were put aside (layers/damping.py).
    damping: Literal["recipe", "held-out"] = "recipe"
    tuned: bool = False  # by gradients after the solve; the recipe asks for it, and no row does
    candidates: tuple[str, ...] = ()  # other rows, the best of which is taken for each linear

    @property
    def two_streams(self) -> bool:
        """Whether the full-precision stream is needed at all."""
        return self.drift != "plain" or self.importance != "none"

    def sums_outputs(self, rows: int, columns: int) -> bool:
        """Whether the drift of a linear [rows, columns] is summed where it leaves the linear.

        That takes two products as wide as the weights, and D one that is square.
        """
        return self.drift == "exact" and 2 * rows < columns

    @property
    def asks_answers(self) -> bool:
        """Whether it starts from gradients of the answers' loss (calibration/answer_loss.py)."""
        return self.importance == "answers" or self.scaling == "mbq"

    @property
    def solves(self) -> bool:
        """Whether it solves linears by the sums of their inputs."""
        return self.calibrated and not self.scaling

    @property
    def affine_only(self) -> bool:
        """Whether its ranges are made for affine grids, so that block types cannot be solved."""
        return bool(self.scaling) or self.ranges != "minmax"

    @property
    def holds_out(self) -> bool:
        """Whether some samples are kept out of the statistics, to judge choices by."""
        chooses = self.candidates or "held-out" in (self.alpha, self.damping)
        return bool(chooses) or self.tuned

    @property
    def tunable(self) -> bool:
        """Whether gradients can go on from its integers: `--tune` (docs/methods.md §5.7).

        They need both streams, and samples that no solve has seen.
        """
        return self.two_streams and not self.candidates


_OURS = Refinement(sweeps=3, shrink=tuple(0.9**i for i in range(10)))
METHODS = {
    "rtn": Method("round to nearest, without samples", calibrated=False),
    "gptq": Method("GPTQ"),
    "gptaq": Method("GPTAQ: GPTQ with a term for the drift between the streams", drift="columns"),
    "vlmq": Method(
        "VLMQ's objective solved exactly: exact, with tokens weighed by what the answers need",
        drift="exact",
        importance="answers",
        weighs="all",
        effective=4.0,
        clip=10.0,
        alpha=1.0,
        neighbours=True,
        damping="held-out",
        smooths=True,
        refine=_OURS,
    ),
    "vlmq-paper": Method(
        "the paper's algorithm to the letter: GPTAQ with tokens weighed by importance",
        drift="columns",
        importance="l1",
    ),
    "vlmq-l2": Method(  # the paper's †, inferred: docs/methods.md §1.2
        "vlmq-paper with the l2 norm as importance", drift="columns", importance="l2"
    ),
    "vlmq-gptq": Method("vlmq-paper on GPTQ instead of GPTAQ (the paper's ‡)", importance="l1"),
    "vlmq-qkv": Method(
        "vlmq-paper without importance at o_proj (the paper's ablation)",
        drift="columns",
        importance="l1",
        weighs="qkv",
    ),
    "vlm-ptq": Method(
        "VLM-PTQ: ranges chosen by modality", drift="columns", own=True, ranges="modality"
    ),
    "awq": Method("AWQ: input channels scaled by activation size", scaling="awq"),
    "mbq": Method("MBQ: AWQ with image and answer tokens balanced", scaling="mbq"),
    "gptaq-exact": Method("gptaq with the exact target", drift="exact", alpha=1.0),
    "vlmq-exact": Method(
        "vlmq-paper with the exact target", drift="exact", importance="l1", alpha=1.0
    ),
    "exact": Method(
        "ours: exact target, ranges and damping by outcome, coordinate descent",
        drift="exact",
        alpha=1.0,
        neighbours=True,
        damping="held-out",
        refine=_OURS,
    ),
    "exact-held": Method(
        "exact with the target's shift chosen on held-out samples",
        drift="exact",
        alpha="held-out",
        neighbours=True,
        refine=_OURS,
    ),
    "auto": Method(
        "ours: per linear the better of gptq and exact-held, by held-out samples",
        drift="exact",
        candidates=("gptq", "exact-held"),
    ),
}


def method_named(name: str) -> Method:
    """Raises UsageError listing the names."""
    if name not in METHODS:
        raise UsageError(f"method {name} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]
