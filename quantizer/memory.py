"""How much memory a run takes and where its activations rest: a pure function of shapes, tokens and what is free.

Peak memory follows one decoder layer and the calibration set, never the model:

    fixed        Python, PyTorch, transformers
    images       all samples' pixels, dropped after the first pass
    first pass   vision tower and projector in float32, dropped before the first layer
    layer        its weights in float32, and the group of linears that is being solved
    solver       statistics and factorization at the widest linear, n² times a few matrices
    ranges       rows that are solved under every candidate range at once, where the method chooses by the outcome
    batch        what the layer makes of BATCH_TOKENS tokens, attention of the importance's backward pass included
    activations  both streams, and inside a layer what attention made of them; these can rest in host memory or on disk

The constants are measured (docs/scale.md); a test holds the plan against the peak of a real run.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from vlmq_export.quantizer.methods import METHODS, Method
from vlmq_export.quantizer.ranges import NEIGHBOURS
from vlmq_export.quantizer.refine import AT_ONCE
from vlmq_export.quantizer.shelf import Place
from vlmq_export.quantizer.streams import BATCH_TOKENS

FIXED = 600 * 10**6
_FLOAT = 4
_SHARE = 0.9  # of what is free that a plan may count on
_GROUP_COPIES = 4  # of the weights being solved: target, loop order, decoded, codes and scales
_RANGE_COPIES = 6  # of the rows under all ranges: target, loop order, decoded, their error, and products with it
_BATCH_HIDDEN, _BATCH_MLP, _BATCH_SCORES = 10, 4, 5  # tensors of these widths alive at once in a layer


@dataclass(frozen=True)
class Shapes:
    """Of a model, from headers alone."""

    layers: int
    hidden: int
    heads: int
    linears: tuple[tuple[int, int], ...]  # (out, in) of one decoder layer
    groups: tuple[int, ...]  # how many of them share an input, in order
    prefix: int  # weights that run before the first decoder layer, embedding rows not counted
    pixels: int  # numbers of a preprocessed image a token
    weights: int  # of the whole model


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes at the peak, part by part. `device` is what CUDA holds, 0 on the CPU."""

    place: Place
    parts: dict[str, int]
    activations: int
    host: int
    device: int
    disk: int  # for activations
    host_free: int
    device_free: int  # 0: there is none

    @property
    def fits(self) -> bool:
        return self.host <= self.host_free and self.device <= self.device_free


def memory_plan(
    shapes: Shapes,
    method: Method,
    *,
    tokens: int,  # of all samples
    seq_len: int,  # of the longest sample
    host_free: int,
    device_free: int = 0,  # 0: everything runs on the host
) -> MemoryPlan:
    """Activations rest on the device if everything fits there, else in host memory, else on disk."""
    widest = max(n for _, n in shapes.linears)
    starts = [sum(shapes.groups[:i]) for i in range(len(shapes.groups))]
    group = max(
        sum(m * n for m, n in shapes.linears[start : start + size]) for start, size in zip(starts, shapes.groups)
    )
    # A, D and P in float32, those of the samples put aside, the factorization in float64 with its result in float32, and
    # the damped matrix for what follows the loop.
    sums = (3 if method.drift != "plain" else 1) * (2 if method.holds_out else 1)
    matrices = (sums + bool(method.refine.sweeps or method.candidates) + 1) * _FLOAT + 2 * 8 if method.calibrated else 0
    batch = min(tokens, max(BATCH_TOKENS, seq_len))
    streams = (2 if method.two_streams else 1) if method.calibrated else 0
    parts = {
        "images": tokens * shapes.pixels * _FLOAT if method.calibrated else 0,
        "first pass": shapes.prefix * _FLOAT if method.calibrated else 0,
        "layer": (sum(m * n for m, n in shapes.linears) + _GROUP_COPIES * group) * _FLOAT,
        "solver": matrices * widest**2,
        "ranges": _RANGE_COPIES * min(AT_ONCE, _tries(method) * group) * _FLOAT,
        "batch": batch * (_BATCH_HIDDEN * shapes.hidden + _BATCH_MLP * widest) * _FLOAT * bool(streams)
        + (batch * seq_len * shapes.heads * _BATCH_SCORES * _FLOAT if method.importance != "none" else 0),
    }
    kept = shapes.layers if method.scaling == "mbq" else 0  # inputs of every layer, for the gradients
    activations = tokens * shapes.hidden * (2 * streams + kept) * _FLOAT
    images, first = parts["images"], parts["first pass"]
    work = sum(parts.values()) - images - first
    host_room, device_room = int(_SHARE * host_free), int(_SHARE * device_free)
    on_cuda = device_free > 0
    if on_cuda:
        place: Place = "device" if max(first, work) + activations <= device_room else "host"
        if place == "host" and FIXED + images + activations > host_room:
            place = "disk"
    else:
        place = "device" if FIXED + max(images + first, work) + activations <= host_room else "disk"
    resting = {"device": activations if not on_cuda else 0, "host": activations, "disk": 0}[place]
    host = FIXED + resting + max(images + (0 if on_cuda else first), 0 if on_cuda else work)
    device = (max(first, work) + (activations if place == "device" else 0)) if on_cuda else 0
    return MemoryPlan(
        place, {"fixed": FIXED} | parts, activations, host, device, activations if place == "disk" else 0, host_free,
        device_free,
    )  # fmt: skip


def _tries(method: Method) -> int:
    """Candidate ranges of a row, zero-points included, where a method or one that it chooses from searches by the outcome."""
    searching = [m for m in (method, *(METHODS[name] for name in method.candidates)) if m.refine.shrink]
    return max((len(m.refine.shrink) * (len(NEIGHBOURS) if m.neighbours else 1) for m in searching), default=0)


def free_memory(device: torch.device, limit: float | None = None) -> tuple[int, int]:
    """(host, device) bytes that this process may take; `limit` in GB replaces what the host says is available.

    The processes that torchrun started on one host share its memory.
    """
    device_free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return (int(limit * 10**9) if limit else _host_available()) // int(
        os.environ.get("LOCAL_WORLD_SIZE", 1)
    ), device_free


def _host_available() -> int:
    """What the kernel would give without swapping, or what the container leaves."""
    pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        pages = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
        group = Path("/sys/fs/cgroup")
        limit, used = (group / f"memory.{kind}" for kind in ("max", "current"))
        return min(pages, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError, StopIteration):  # not Linux, or no limit
        return pages


def give_back() -> None:
    """Return what was freed to the system: glibc keeps what it once took for tensors up to 32 MB, and layers add up."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_host() -> int:
    """Bytes: the most that this process has held so far (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
