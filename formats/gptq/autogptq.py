"""AutoGPTQ 0.7.1's own decoder, taken from its wheel: the package itself does not import under transformers 5."""

from __future__ import annotations

import importlib.util
import logging
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

from vlmq_export.formats.gptq.read import GptqFolder

_FILE = "auto_gptq/nn_modules/qlinear/qlinear_cuda.py"  # its _old sibling ignores g_idx


def source_file() -> Path | None:
    """The decoder's file in the installed wheel, or None where it is not installed."""
    try:
        file = Path(str(distribution("auto-gptq").locate_file(_FILE)))
    except PackageNotFoundError:
        return None
    return file if file.is_file() else None


def load(file: Path) -> ModuleType:
    logging.getLogger("auto_gptq_qlinear").setLevel(logging.ERROR)  # it warns that CUDA is not there
    spec = importlib.util.spec_from_file_location("auto_gptq_qlinear", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class _SecondFactor(TorchFunctionMode):
    """Keeps the weights that its forward decodes and hands to torch.matmul."""

    value: torch.Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.matmul:
            self.value = args[1]
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def decode(module: ModuleType, folder: GptqFolder, name: str) -> np.ndarray:
    """float32 [N, K] of the linear `name` (as in the file), decoded by AutoGPTQ's QuantLinear on CPU."""
    parts = {part: folder.raw(f"{name}.{part}") for part in ("qweight", "qzeros", "scales", "g_idx")}
    k, n = parts["g_idx"].shape[0], parts["qweight"].shape[1]
    group_size = folder.quantization["group_size"]
    linear = module.QuantLinear(folder.bits, group_size, k, n, bias=False, weight_dtype=torch.float32)
    linear.load_state_dict(parts | {"scales": parts["scales"].float()})
    with _SecondFactor() as factor:
        linear(torch.zeros(1, k))
    assert factor.value is not None
    return factor.value.T.contiguous().numpy()
