"""The methods as rows of one table: which statistics, which target, which weights on the tokens.

All share the solver (solver.py). `plain` rounds toward W under A; `columns` adds GPTAQ's column term for the drift
between the two streams (the papers' numbers come from it); `exact` rounds toward W' = W + α·W·D·(A+λI)⁻¹, the true
solution of the same asymmetric objective (methods.md §5.1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmq_export.errors import UsageError


@dataclass(frozen=True)
class Method:
    """One row. `importance` weighs the tokens of the attention projections; the MLP's never (Algorithm 1)."""

    calibrated: bool = True
    drift: Literal["plain", "columns", "exact"] = "plain"
    importance: Literal["none", "l1", "l2"] = "none"
    alpha: float | None = None  # None: the recipe's
    own: bool = False  # VLM-PTQ's C: a column also makes up for its own drift
    ranges: Literal["minmax", "modality"] = "minmax"  # `modality`: VLM-PTQ's M (ranges.py)
    scaling: Literal["", "awq", "mbq"] = ""  # round to nearest after scaling input channels (scaling.py)
    sweeps: int = 0  # of coordinate descent after the loop (refine.py)
    refit: bool = False  # of the scales, between the sweeps

    @property
    def two_streams(self) -> bool:
        """Whether the full-precision stream is needed at all."""
        return self.drift != "plain" or self.importance != "none"


METHODS = {
    "rtn": Method(calibrated=False),
    "gptq": Method(),
    "gptaq": Method(drift="columns"),
    "vlmq": Method(drift="columns", importance="l1"),
    "vlmq-l2": Method(drift="columns", importance="l2"),  # the paper's †: inferred, methods.md §1.2
    "vlmq-gptq": Method(importance="l1"),  # the paper's ‡
    "vlm-ptq": Method(drift="columns", own=True, ranges="modality"),
    "awq": Method(scaling="awq"),
    "mbq": Method(scaling="mbq"),
    "gptaq-exact": Method(drift="exact", alpha=1.0),
    "vlmq-exact": Method(drift="exact", importance="l1", alpha=1.0),
}


def method_named(name: str) -> Method:
    """Raises UsageError listing the names."""
    if name not in METHODS:
        raise UsageError(f"method {name} is not known; choose one of {', '.join(METHODS)}")
    return METHODS[name]
