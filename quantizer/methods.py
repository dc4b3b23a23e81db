"""The methods as rows of one table: which statistics, which target, which weights on the tokens, what follows the loop.

All share the solver (solver.py). `plain` rounds toward W under A; `columns` adds GPTAQ's column term for the drift
between the two streams (the papers' numbers come from it); `exact` rounds toward W' = W + α·W·D·(A+λI)⁻¹, the true
solution of the same asymmetric objective (methods.md §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from vlmq_export.errors import UsageError


@dataclass(frozen=True)
class Refinement:
    """What the papers' methods do not do: ranges judged by the outcome, and integers improved after the loop."""

    sweeps: int = 0  # of coordinate descent on the integers (refine.py)
    refit: bool = False  # of the scales, between the sweeps
    shrink: tuple[float, ...] = ()  # shares of min-max tried for each row, the best by the error after the loop


@dataclass(frozen=True)
class Method:
    """One row. `importance` weighs the tokens of the attention projections; in the papers the MLP's never (Algorithm 1)."""

    calibrated: bool = True
    drift: Literal["plain", "columns", "exact"] = "plain"
    importance: Literal["none", "l1", "l2"] = "none"
    weighs: Literal["qkvo", "qkv", "all"] = "qkvo"  # the projections that importance is for
    effective: float = 0.0  # effective tokens that importance must leave, a multiple of `in`; 0: as it comes (D5)
    clip: float = 0.0  # g² is cut off at this many times its mean; 0: nowhere
    alpha: float | Literal["held-out"] | None = None  # None: the recipe's; "held-out": best for samples put aside
    residual: bool = False  # o and down also make up for the residual stream's own drift (LoaQ)
    own: bool = False  # VLM-PTQ's C: a column also makes up for its own drift
    ranges: Literal["minmax", "modality"] = "minmax"  # `modality`: VLM-PTQ's M (ranges.py)
    neighbours: bool = False  # ranges are searched with the zero-points next to their own, too, up to 3 bits
    scaling: Literal["", "awq", "mbq"] = ""  # round to nearest after scaling input channels (scaling.py)
    refine: Refinement = field(default=Refinement())
    candidates: tuple[str, ...] = ()  # other rows, of which each linear takes the best for samples put aside

    @property
    def two_streams(self) -> bool:
        """Whether the full-precision stream is needed at all."""
        return self.drift != "plain" or self.importance != "none"

    @property
    def holds_out(self) -> bool:
        """Whether some samples are kept out of the statistics, to choose by."""
        return bool(self.candidates) or self.alpha == "held-out"


_OURS = Refinement(sweeps=3, shrink=tuple(0.9**i for i in range(10)))
METHODS = {
    "rtn": Method(calibrated=False),
    "gptq": Method(),
    "gptaq": Method(drift="columns"),
    "vlmq": Method(drift="columns", importance="l1"),
    "vlmq-l2": Method(drift="columns", importance="l2"),  # the paper's †: inferred, methods.md §1.2
    "vlmq-gptq": Method(importance="l1"),  # the paper's ‡
    "vlmq-qkv": Method(drift="columns", importance="l1", weighs="qkv"),  # the paper's ablation without o
    "vlm-ptq": Method(drift="columns", own=True, ranges="modality"),
    "awq": Method(scaling="awq"),
    "mbq": Method(scaling="mbq"),
    "gptaq-exact": Method(drift="exact", alpha=1.0),
    "vlmq-exact": Method(drift="exact", importance="l1", alpha=1.0),
    "exact": Method(drift="exact", alpha=1.0, neighbours=True, refine=_OURS),
    "exact-held": Method(drift="exact", alpha="held-out", neighbours=True, refine=_OURS),
    "auto": Method(drift="exact", candidates=("gptq", "exact-held")),
}


def method_named(name: str) -> Method:
    """Raises UsageError listing the names."""
    if name not in METHODS:
        raise UsageError(f"method {name} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]
