"""What the manifest records of a solved linear."""

from __future__ import annotations

import math

import torch

from vlmq_export.quantizer.arithmetic import tensor_cores
from vlmq_export.quantizer.calibration.statistics import Statistics
from vlmq_export.quantizer.grids.choice import GridChoice
from vlmq_export.quantizer.layers.attempt import Prepared
from vlmq_export.quantizer.layers.stack import Rounded, nearest
from vlmq_export.quantizer.solver.hessian import weighted_loss


def ratio(difference: torch.Tensor, whole: torch.Tensor) -> float:
    """‖difference‖ / ‖whole‖, in float64."""
    return float(difference.double().norm() / whole.double().norm().clamp_min(1e-300))


def weight_error(rounded: Rounded, weights: torch.Tensor) -> dict:
    """‖Ŵ − W‖ / ‖W‖."""
    return {"weight_error": ratio(rounded.decode() - weights, weights)}


def of_stack(known: Prepared) -> dict:
    """What holds for every linear that was solved on the same statistics."""
    sums, hessian = known.sums, known.hessian
    found = {
        "damp": hessian.damp,
        "fallback": hessian.fallback,
        "dead_columns": int(hessian.dead.sum()),
        "tokens": sums.tokens,
        "effective_tokens": round(sums.effective_tokens, 1),
    }
    ignored = sums.two_streams and known.shift is None
    return found | ({"drift_ignored": True} if ignored else {})


@tensor_cores()
def losses(
    rounded: Rounded,
    weights: torch.Tensor,  # W, [out, in]
    aim: torch.Tensor,  # W' of the method's objective, [out, in]
    sums: Statistics,
    choice: GridChoice,
) -> dict:
    """The weighted loss against W', and its square root relative to that of W' itself.

    Beside it stands what rounding W to nearest would have left. Sums beyond float32 have nothing to
    report.
    """
    plain = nearest(weights, choice).decode()
    tried = rounded.decode(), plain, torch.zeros_like(aim)
    loss, near, energy = (weighted_loss(w, aim, sums.hessian) for w in tried)
    if not all(map(math.isfinite, (loss, near, energy))):
        return {}
    relative = [(max(x, 0.0) / energy) ** 0.5 if energy > 0 else 0.0 for x in (loss, near)]
    return {"loss": loss, "relative_error": relative[0], "nearest_error": relative[1]}
