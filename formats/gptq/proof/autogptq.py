"""Decodes linears with AutoGPTQ 0.7.1's own code, taken from its wheel.

The package itself cannot be imported with transformers 5. Its file with the decoder can.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from vlmq_export.formats.gptq.read import PARTS, GptqFolder

# The file beside it whose name ends in _old ignores g_idx.
_FILE = "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"


def source_file() -> Path | None:
    """The decoder's file in the installed wheel, or None where that is not installed."""
    try:
        file = Path(str(distribution("auto-gptq").locate_file(_FILE)))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def load(file: Path) -> ModuleType:
    """The decoder's file as a module."""
    # It warns that CUDA is not there.
    logging.getLogger("auto_gptq_qlinear").setLevel(logging.ERROR)
    spec = importlib.util.spec_from_file_location("auto_gptq_qlinear", file)
    assert spec is not None and spec.loader is not None, "a path of a .py file has a loader"
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _SecondFactor(TorchFunctionMode):
    """Keeps the second argument of torch.matmul, which is where the decoded weights go."""

    value: torch.Tensor | None = None

    def __torch_function__(
        self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        if func is torch.matmul:
            self.value = args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def decode(module: ModuleType, folder: GptqFolder, name: str) -> np.ndarray:
    """The weights of the linear `name` of the file, by AutoGPTQ's QuantLinear on the CPU.

    float32 [N, K]. Raises what its tensor code raises on damaged parts.
    """
    parts = {part: folder.raw(f"{name}.{part}") for part in PARTS}
    k, n = parts["g_idx"].shape[0], parts["qweight"].shape[1]
    group_size, (bits, _) = folder.quantization["group_size"], folder.grid_of(name)
    linear = module.QuantLinear(bits, group_size, k, n, bias=False, weight_dtype=torch.float32)
    linear.load_state_dict(parts | {"scales": parts["scales"].float()})
    with _SecondFactor() as factor:
        linear(torch.zeros(1, k))
    assert factor.value is not None, "its forward multiplies by the weights that it decodes"
    return factor.value.T.contiguous().numpy()
