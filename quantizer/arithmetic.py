"""Where the quantizer computes, and in which precision float32 matrices are multiplied."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vlmq_export.errors import UsageError

TENSOR_CORES = True  # tools/checks/gpu.py compares devices with and without them


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one; under torchrun each process takes its own.

    Raises UsageError where CUDA was asked for and is not there.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device} is not known; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    if device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


@contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Multiply float32 matrices in float32.

    TensorFloat-32 is switched off, which the convolutions of vision towers use on CUDA by default.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(
            enabled=True, benchmark=False, deterministic=True, allow_tf32=False
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def threads(count: int) -> Iterator[None]:
    """PyTorch computes on the CPU with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def tensor_cores() -> Iterator[None]:
    """Multiply float32 matrices in TensorFloat-32 (11 significant bits) where there is CUDA.

    This is for statistics and for the forward passes of the walk, whose inputs every runtime rounds
    far more coarsely. It is never for the column loop or the factorization. docs/performance.md has
    what it costs.
    """
    if not (TENSOR_CORES and torch.cuda.is_available()):
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
