"""Memory of this machine: how much is free, how much was used, and giving it back."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import torch


def free_memory(device: torch.device, limit: float | None = None) -> tuple[int, int]:
    """(host, device): the bytes that this process may take.

    `limit`, in GB, takes the place of what the host says is available. The processes that torchrun
    started on one host share its memory.
    """
    host = int(limit * 10**9) if limit else _host_available()
    on_device = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 0
    return host // int(os.environ.get("LOCAL_WORLD_SIZE", 1)), on_device


def _host_available() -> int:
    """What the kernel would give without swapping, or what the container leaves if that is less."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
        found = next(line for line in lines if line.startswith("MemAvailable"))
        available = int(found.split()[1]) * 1024
        group = Path("/sys/fs/cgroup")
        limit, used = (group / f"memory.{kind}" for kind in ("max", "current"))
        return min(available, int(limit.read_text()) - int(used.read_text()))
    except (OSError, ValueError, StopIteration):  # not Linux, or the container has no limit
        return available


def give_back() -> None:
    """Return freed memory to the system.

    glibc keeps what it once took for tensors of up to 32 MB, and over the layers that adds up.
    """
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def peak_host() -> int:
    """The most bytes that this process has held so far (VmHWM)."""
    try:
        lines = Path("/proc/self/status").read_text("ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
