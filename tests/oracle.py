"""Slow, independent references for the quantizer's kernels.

They form explicit inverses, in float64, and work on one row or one column at a time.
"""

from __future__ import annotations

import numpy as np
import torch


def fit_group(
    values: np.ndarray, bits: int, symmetric: bool, portable: bool = False
) -> tuple[float, int]:
    """(scale, zero_point) of one group of weights, [group]. The scale is a float16 value."""
    top = 2**bits - 1
    if symmetric:
        scale, zero = 2 * np.abs(values).max() / top, 2 ** (bits - 1)
        return (float(np.float16(scale)) if scale else 1.0), zero
    low, high = min(values.min(), 0.0), max(values.max(), 0.0)
    scale = max((high - low) / top, high / (top - 0.5)) or 1.0
    if portable:
        exponent = np.floor(np.log2(scale))
        scale = np.ceil(scale / 2 ** (exponent - 6)) * 2 ** (exponent - 6)
    scale = float(np.float16(scale))
    return scale, int(np.clip(np.round(-low / scale), 1, top))


def best_range(values: np.ndarray, bits: int, importance: np.ndarray | None) -> tuple[float, int]:
    """(scale, zero_point) of one group.

    Without `importance` [group] the range is min-max. With it, it is the one of 80 shrunk ranges
    that leaves the least weighted squared error.
    """
    if importance is None:
        return fit_group(values, bits, False)
    best = (np.inf, 0.0, 0)
    for step in range(80):
        scale, zero = fit_group(values * (1 - step / 100), bits, False)
        rounded = scale * (np.clip(np.round(values / scale) + zero, 0, 2**bits - 1) - zero)
        error = float(importance @ (rounded - values) ** 2)
        best = min(best, (error, scale, zero), key=lambda b: b[0])
    return best[1:]


def nearest(value: float, scale: float, zero: int, bits: int) -> int:
    """The code of one weight, rounded to nearest."""
    return int(np.clip(np.round(value / scale) + zero, 0, 2**bits - 1))


def brain_surgeon(
    weights: np.ndarray,  # [out, in]
    hessian: np.ndarray,  # damped, [in, in]
    bits: int,
    group: int,
    *,
    order: np.ndarray | None = None,
    drift: np.ndarray | None = None,  # D [in, in]: adds GPTAQ's term (its Eq. 4)
    alpha: float = 0.0,
    # Block of columns in which GPTAQ's term multiplies the weight before it is rounded. For the
    # columns after the block it multiplies the rounded weight. None: one block.
    inside: int | None = None,
    static: bool = False,  # act_order "static"
    own: bool = False,  # VLM-PTQ's C: a column also makes up for its own drift
    # M [in], original order: each group takes the range of least weighted error. None: min-max.
    weigh: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Optimal Brain Quantization in a fixed order.

    The inverse of the remaining Hessian is computed anew at every step. Returns codes [out, in] in
    the original order of the columns, scales and zero-points [out, groups]. The groups are
    consecutive in the order of the loop, or in the original order where `static`.
    """
    rows, n = weights.shape
    order = np.arange(n) if order is None else order
    w = weights.astype(np.float64)[:, order]
    a = hessian.astype(np.float64)[np.ix_(order, order)]
    d = None if drift is None else drift.astype(np.float64)[np.ix_(order, order)]
    codes = np.zeros((rows, n), np.int64)
    groups = -(-n // group)  # the last one may be shorter
    scales, zeros = np.zeros((rows, groups)), np.zeros((rows, groups), np.int64)
    if static:
        for r in range(rows):
            for g in range(groups):
                values = weights[r, g * group : (g + 1) * group].astype(np.float64)
                scales[r, g], zeros[r, g] = fit_group(values, bits, False)
    pending = np.zeros_like(w)  # what GPTAQ's term adds after the block, once the block ends
    for q in range(n):
        if inside and q % inside == 0:
            w, pending = w + pending, np.zeros_like(w)
        inverse = np.linalg.inv(a[q:, q:])
        for r in range(rows):
            g = order[q] // group if static else q // group
            if q % group == 0 and not static:
                importance = None if weigh is None else weigh[order[q : q + group]]
                scales[r, g], zeros[r, g] = best_range(w[r, q : q + group], bits, importance)
            correction = alpha * d[q, q:] @ inverse[:, 0] if own else 0.0
            codes[r, q] = nearest(w[r, q] * (1 + correction), scales[r, g], zeros[r, g], bits)
            rounded = scales[r, g] * (codes[r, q] - zeros[r, g])
            before = w[r, q]
            w[r, q:] += (rounded - before) / inverse[0, 0] * inverse[0]
            if d is not None and q + 1 < n:
                row = alpha * d[q, q + 1 :] @ np.linalg.inv(a[q + 1 :, q + 1 :])
                end = n if inside is None else min(n, (q // inside + 1) * inside)
                w[r, q + 1 : end] += before * row[: end - q - 1]
                pending[r, end:] += rounded * row[end - q - 1 :]
    original = np.empty_like(codes)
    original[:, order] = codes
    return original, scales, zeros


def block_gradients(
    layer, block, hidden: torch.Tensor, hidden_full: torch.Tensor, kwargs: dict
) -> dict[str, torch.Tensor]:
    """Gradients of ‖B(X) − B(X̃)‖² at the outputs of the linears of a sub-block B of the layer.

    Autograd runs over the layer's own forward pass. For the attention it is what enters the MLP's
    norm. The MLP is given its input in place of what the attention made. `hidden` is X.
    """
    modules = dict(layer.named_modules())
    first = block.attends
    behind = "pre_feedforward_layernorm"  # Gemma's name of the norm before the MLP
    behind = modules[behind if behind in modules else "post_attention_layernorm"]

    def run(x):
        seen = []

        def look(_module, args):
            seen.append(args[0])

        def silent(_module, _inputs, output):  # the attention adds nothing
            if isinstance(output, torch.Tensor):
                return torch.zeros_like(output)
            return (torch.zeros_like(output[0]), *output[1:])

        handles = [behind.register_forward_pre_hook(look)]
        if not first:
            attention = getattr(layer, "self_attn", None) or layer.linear_attn
            handles.append(attention.register_forward_hook(silent))
        try:
            out = layer(x, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return seen[0] if first else out[0] if isinstance(out, tuple) else out

    return _loss_gradients(layer, block.linears, run, hidden, hidden_full)


def layer_gradients(
    layer, hidden: torch.Tensor, hidden_full: torch.Tensor, kwargs: dict
) -> dict[str, torch.Tensor]:
    """Gradients of ‖Layer(X) − Layer(X̃)‖² at the outputs of the MLP's projections.

    Autograd runs over the layer's own forward pass.
    """

    def block(x):
        out = layer(x, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return _loss_gradients(
        layer, ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"), block, hidden, hidden_full
    )


def _loss_gradients(
    layer, names, block, hidden: torch.Tensor, hidden_full: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Gradients of ‖block(X) − block(X̃)‖² at the outputs of the named modules of the layer."""
    outputs = {}

    def keep(name):
        def hook(_module, _inputs, output):
            output.retain_grad()
            outputs[name] = output

        return hook

    with torch.enable_grad():
        target = block(hidden_full).detach()
        handles = [layer.get_submodule(n).register_forward_hook(keep(n)) for n in names]
        try:
            loss = (block(hidden.detach().clone().requires_grad_()) - target).square().sum()
        finally:
            for handle in handles:
                handle.remove()
        loss.backward()
    return {n: outputs[n].grad for n in names}


def gptq_by_inverse(
    weights: torch.Tensor,  # [out, in], in loop order
    hessian: torch.Tensor,  # damped, [in, in], in loop order
    grid,
    group: int,
    *,
    drift: torch.Tensor | None = None,  # D [in, in], in loop order
    alpha: float = 0.25,
    block: int = 128,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loop as the papers of GPTQ and GPTAQ have it, in float32.

    It uses the Cholesky factor U of A⁻¹, a rank-one update for each column, and lazy blocks of one
    group or less. Returns codes [in, out] and decoded weights [out, in], both in loop order.
    """
    lower = torch.linalg.cholesky(hessian.double().flip(0, 1))
    eye = torch.eye(len(hessian), dtype=torch.float64)
    upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True).float()
    term = None if drift is None else alpha * (drift @ upper.T).triu(1) @ upper
    w, codes, rounded = weights.T.clone(), [], []
    span = min(block, group)
    for start in range(0, len(w), span):
        stop, errors = start + span, []
        for i in range(start, stop):
            if i % group == 0:
                scale, zero = grid.fit(w[i : i + group], dim=0)
            codes.append(grid.encode(w[i], scale, zero))
            rounded.append(grid.decode(codes[-1], scale, zero))
            errors.append((w[i] - rounded[-1]) / upper[i, i])
            w[i + 1 : stop] -= upper[i, i + 1 : stop, None] * errors[-1]
            if term is not None:
                w[i + 1 : stop] += term[i, i + 1 : stop, None] * w[i]
        w[stop:] -= upper[start:stop, stop:].T @ torch.stack(errors)
        if term is not None:
            w[stop:] += term[start:stop, stop:].T @ torch.stack(rounded[start:stop])
    return torch.stack(codes), torch.stack(rounded).T
