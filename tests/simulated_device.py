"""A CUDA device that is not there: tensors that say `cuda:0`, with their data on the CPU.

Code that runs inside `SimulatedDevice` meets what it would meet on a GPU: a tensor knows its
device, what is made of it lies there too, and an operation on tensors of both devices is an error.
Operations that would be kernels are counted, and so is all that waits for the device's answer.

It works on calls from Python (`__torch_function__`), so that autograd, which needs a real device
for its threads, computes on what the tensors are. Launches are counted one level below
(`__torch_dispatch__`), because one call can be many kernels.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
# Calls that wait for the device: their result, or its size, is known on the host afterwards.
WAITS = {
    *("item", "tolist", "__bool__", "__float__", "__int__", "__index__", "is_nonzero", "equal"),
    *("nonzero", "argwhere", "unique", "masked_select", "allclose", "isin", "bincount"),
}
# Calls that take tensors of two devices: copies, and indices, which are copied.
MIXES = {"copy_", "__setitem__", "__getitem__", "__set__", "_has_compatible_shallow_copy_type"}
# Operations without a kernel: what only makes, names or views memory.
_NO_KERNEL = {"empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "set_"}
_NO_KERNEL |= {"_local_scalar_dense", "lift_fresh", "_unsafe_view", "resize_", "view"}


class OnDevice(torch.Tensor):
    """A tensor that says it is on the device."""

    __torch_function__ = torch._C._disabled_torch_function_impl


class _Launches(TorchDispatchMode):
    """Counts the operations below the calls that touch the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.depth = 0  # of calls that touch the device

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.depth and not func.is_view and func.overloadpacket.__name__ not in _NO_KERNEL:
            self.count += 1
        return func(*args, **(kwargs or {}))


class SimulatedDevice(TorchFunctionMode):
    """Inside it `cuda` is a device. See the module."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()  # by place in the code: the host waits for the device
        self.copies: Counter[str] = Counter()  # "to device", "to host", and pinned ones
        self._launches = _Launches()

    @property
    def launches(self) -> int:
        """How many kernels would have been launched."""
        return self._launches.count

    def __torch_function__(
        self, func: Callable, types: Any, args: Any = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        own = [t for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)]
        here = any(isinstance(t, OnDevice) for t in own)
        if name == "__get__":
            told = _property(func.__self__.__name__, here)  # pyright: ignore
            if told is not None:
                return told
        elif name in ("to", "cpu", "cuda", "pin_memory", "numpy"):
            return self._moved(func, name, args, kwargs)
        named = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        made = named is not None and named.type == "cuda"
        if made:
            kwargs["device"] = CPU
            if name in ("tensor", "as_tensor"):
                self.copies["to device"] += 1
        elif name in ("tensor", "as_tensor") and not isinstance(args[0], torch.Tensor):
            self._wait(len(own) if here else 0)  # numbers on the host, each fetched on its own
            here, args = False, tree_map_only(OnDevice, torch.Tensor.item, args)
        self._refuse_mixing(name, [] if name in ("tensor", "as_tensor") else own)
        if kwargs.pop("pin_memory", False):
            self.copies["pinned"] += 1
        if here:
            self._count_wait(name, args, kwargs)
        # What is made for another device, or copied into a tensor of the host, stays there.
        away = (named is not None and not made) or (name == "copy_" and not _is(args[0]))
        return self._called(func, args, kwargs, there=(here or made) and not away)

    def _called(self, func: Callable, args: Any, kwargs: dict, *, there: bool) -> Any:
        """The call itself. What comes of tensors on the device is on the device."""
        self._launches.depth += there
        try:
            with self._launches:
                result = func(*args, **kwargs)
        finally:
            self._launches.depth -= there
        return tree_map_only(torch.Tensor, _there, result) if there else result

    def _moved(self, func: Callable, name: str, args: Any, kwargs: dict) -> Any:
        """A copy from one device to the other, or a change of type where the tensor is."""
        value, target = args[0], _target(name, args[1:], kwargs)
        here = isinstance(value, OnDevice)
        if name == "pin_memory":
            assert not here, "only a tensor of the host can be pinned"
            self.copies["pinned"] += 1
            return value.clone()
        if name == "numpy":
            assert not here, "a tensor of the device has no numpy array"
            return func(*args, **kwargs)
        there = here if target is None else target.type == "cuda"
        if target is not None and target.type == "meta":
            return func(*args, **kwargs)
        rest = [a for a in args[1:] if isinstance(a, (torch.dtype, bool))]
        kind = kwargs.get("dtype", next((a for a in args[1:] if torch.is_tensor(a)), value))
        kind = kind.dtype if torch.is_tensor(kind) else kind
        kind = next((a for a in rest if isinstance(a, torch.dtype)), kind)
        if there != here:
            self.copies["to device" if there else "to host"] += 1
            self._wait(not there)
            value = value.as_subclass(torch.Tensor).clone()
        result = self._called(torch.Tensor.to, (value, kind), {}, there=here or there)
        return _there(result) if there else result.as_subclass(torch.Tensor)

    def _refuse_mixing(self, name: str, tensors: list[torch.Tensor]) -> None:
        """Raises RuntimeError for tensors of both devices, as PyTorch does; numbers may come."""
        sizes = {isinstance(t, OnDevice) for t in tensors if t.dim() and not t.is_meta}
        if len(sizes) > 1 and name not in MIXES:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device")
        if name == "__getitem__" and len(sizes) > 1 and not isinstance(tensors[0], OnDevice):
            raise RuntimeError("indices should be on the same device as the indexed tensor (cpu)")

    def _count_wait(self, name: str, args: Any, kwargs: dict) -> None:
        if name == "copy_" and _is(args[0]) != _is(args[1]):
            self.copies["to device" if _is(args[0]) else "to host"] += 1
            self._wait(not kwargs.get("non_blocking"))
            return
        masks = ()
        if name in ("__getitem__", "__setitem__"):
            indices = (t for t in tree_iter(args[1]) if isinstance(t, torch.Tensor))
            masks = [t for t in indices if t.dtype == torch.bool and t.dim()]
        repeats = name == "repeat_interleave" and torch.is_tensor(args[1])
        self._wait(name in WAITS or repeats or bool(masks))

    def _wait(self, times: int) -> None:
        """Count that the host waits, under the function of the package that asks."""
        if times:
            frames = (frame.f_code for frame, _ in traceback.walk_stack(None))
            own = (code for code in frames if "vlmq_export" in code.co_filename)
            code = next(own, None)
            where = f"{Path(code.co_filename).stem}.{code.co_name}" if code else "elsewhere"
            self.waits[where] += times


def _property(name: str, here: bool) -> Any:
    """What a tensor on the device says of itself; None where it says nothing else."""
    told = {"device": CUDA, "is_cuda": True, "is_cpu": False} if here else {}
    return told.get(name)


def _there(value: torch.Tensor) -> torch.Tensor:
    return value if isinstance(value, OnDevice) or value.is_meta else value.as_subclass(OnDevice)


def _is(value: Any) -> bool:
    return isinstance(value, OnDevice)


def _target(name: str, args: Any, kwargs: dict) -> torch.device | None:
    """The device that a call of `to` and its like names."""
    if name in ("cpu", "cuda"):
        return CPU if name == "cpu" else CUDA
    for value in (*args[:1], kwargs.get("device"), kwargs.get("other")):
        if isinstance(value, (str, torch.device)):
            return torch.device(value)
        if isinstance(value, torch.Tensor):
            return CUDA if isinstance(value, OnDevice) else value.device
    return None


@contextmanager
def simulated_device(monkeypatch: Any) -> Iterator[SimulatedDevice]:
    """A simulated device inside the block. What asks PyTorch for CUDA is told that it is there."""
    compatible = torch._has_compatible_shallow_copy_type
    with monkeypatch.context() as patch, SimulatedDevice() as device:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "get_device_name", lambda _device: "simulated")
        patch.setattr(torch.cuda, "synchronize", lambda: None)
        patch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
        patch.setattr(torch.cuda, "max_memory_allocated", lambda _device=None: 0)
        # A parameter that moves to another device becomes another object.
        patch.setattr(
            torch,
            "_has_compatible_shallow_copy_type",
            lambda a, b: isinstance(a, OnDevice) == isinstance(b, OnDevice) and compatible(a, b),
        )
        yield device
