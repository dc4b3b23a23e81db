"""What the card is: versions, and the speed of products, copies, launches and factorizations."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from importlib.util import find_spec

import torch
import transformers

from tools.checks.first_contact.report import Report, Setting
from vlmq_export.quantizer.calibration.statistics import Precision, product
from vlmq_export.quantizer.solver import kernels

TIME = 0.2  # seconds of repetitions
Call = Callable[[], object]


def seconds(call: Call, device: torch.device) -> float:
    """Wall seconds of one call, after one that warms up."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    call()
    wait()
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < TIME:
        call()
        count += 1
        if count % 16 == 0:
            wait()
    wait()
    return (time.perf_counter() - start) / count


def card(report: Report, at: Setting) -> None:
    """Versions first, so that they are known whatever fails after them."""
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    if find_spec("triton"):
        import triton  # pyright: ignore[reportMissingImports]

        versions["triton"] = triton.__version__
    memory = torch.cuda.mem_get_info(at.device)[1] if at.device.type == "cuda" else 0
    said = ", ".join(f"{name} {version}" for name, version in versions.items())
    report.tell(f"{at.name}, {memory / 1e9:.0f} GB; {said}", **versions, card=at.name)
    _products(report, at)
    _copies(report, at)
    _small_calls(report, at)
    _kernel(report, at)


def _products(report: Report, at: Setting) -> None:
    """xᵀ·y of the statistics in every precision, with its error."""
    tokens, size = (256, 128) if at.small else (4096, 3584)
    draws = torch.Generator().manual_seed(0)
    x, y = (torch.randn(tokens, size, generator=draws).to(at.device) for _ in range(2))
    exact = x.double().T @ y.double()
    precisions: tuple[Precision, ...] = ("float32", "tf32", "bf16x3", "bf16")
    for precision in precisions:
        taken = seconds(lambda p=precision: product(x, y, p), at.device)
        speed = 2 * tokens * size**2 / taken / 1e12
        error = float((product(x, y, precision) - exact).norm() / exact.norm())
        line = f"product in {precision}: {speed:.2f} TFLOP/s, relative error {error:.1e}"
        report.tell(line, precision=precision, tflops=speed, error=error)
    wide = exact @ exact.T + size * torch.eye(size, dtype=torch.float64, device=at.device)
    for kind in (torch.float64, torch.float32):
        matrix = wide.to(kind)
        taken = seconds(lambda m=matrix: torch.linalg.cholesky_ex(m), at.device)
        line = f"factorization of {size} columns in {kind}: {taken * 1000:.1f} ms"
        report.tell(line, columns=size, kind=str(kind), seconds=taken)


def _copies(report: Report, at: Setting) -> None:
    """A batch to the host and back: pageable and pinned."""
    size = 2**20 if at.small else 2**26
    value = torch.ones(size, device=at.device)
    pins = (False, True) if at.device.type == "cuda" else (False,)
    for pinned in pins:
        host = torch.empty(size, pin_memory=pinned)
        out = seconds(lambda h=host: h.copy_(value), at.device)
        back = seconds(lambda h=host: value.copy_(h, non_blocking=True), at.device)
        kind = "pinned" if pinned else "pageable"
        speeds = [4 * size / each / 1e9 for each in (out, back)]
        line = f"{kind} copies: {speeds[0]:.1f} GB/s to the host, {speeds[1]:.1f} GB/s back"
        report.tell(line, pinned=pinned, to_host=speeds[0], back=speeds[1])


def _small_calls(report: Report, at: Setting) -> None:
    """What one launch and one answer to the host cost: the column loops are made of them."""
    small = torch.ones(4096, device=at.device)
    launch = seconds(lambda: small.add_(0), at.device)
    answer = seconds(lambda: bool(small[0] > 2), at.device)
    line = f"a launch takes {launch * 1e6:.1f} µs, an answer to the host {answer * 1e6:.1f} µs"
    report.tell(line, launch=launch, answer=answer)


def _kernel(report: Report, at: Setting) -> None:
    """The first launch of the fused kernel compiles it, which needs a C compiler."""
    if at.device.type != "cuda":
        return
    columns, rows = 128, 4096
    target = torch.randn(columns, rows, device=at.device)
    shift, ones = torch.zeros_like(target), torch.ones(1, rows, device=at.device)
    codes = torch.empty(columns, rows, dtype=torch.uint8, device=at.device)
    groups = torch.zeros(columns, dtype=torch.int32, device=at.device)
    factor = torch.eye(columns, device=at.device)
    arguments = (target, shift, codes, ones, 8 * ones, groups, factor, None, 15)
    start = time.perf_counter()
    kernels.round_block(*arguments)
    torch.cuda.synchronize()
    compiled = time.perf_counter() - start
    taken = seconds(lambda: kernels.round_block(*arguments), at.device)
    line = (
        f"fused kernel: compiled in {compiled:.1f} s, {taken * 1e6:.0f} µs a block of {rows} rows"
    )
    report.tell(line, compiled=compiled, seconds=taken)
