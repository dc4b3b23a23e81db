"""The source model as transformers runs it: device, arithmetic, loading."""

from __future__ import annotations

from contextlib import contextmanager

import torch
from torch import nn

from vlmq_export.errors import CheckpointError, UsageError
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.untrusted import third_party


def pick_device(device: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises UsageError where it was asked for and is not there."""
    if device not in ("auto", "cpu", "cuda"):
        raise UsageError(f"device {device} is not known; choose auto, cpu or cuda")
    if device == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: PyTorch sees no CUDA device here; use --device cpu")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


@contextmanager
def exact_arithmetic():
    """float32 products as float32: TensorFloat-32 off, which vision towers' convolutions use by default on CUDA."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def load_model(checkpoint: Checkpoint, device: torch.device) -> nn.Module:
    """transformers' own class in float32, without gradients. Raises CheckpointError for weights that do not fit it."""
    import transformers

    with _no_progress_bar(transformers), third_party(f"{checkpoint.path}: transformers cannot load this model"):
        config = transformers.AutoConfig.from_pretrained(checkpoint.path, trust_remote_code=False)
        cls = model_class(transformers, config.architectures)
        model, info = cls.from_pretrained(
            checkpoint.path, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
        )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"]]:
        raise CheckpointError(
            f"{checkpoint.path}: {len(wrong)} tensors do not fit the model, first {sorted(map(str, wrong))[0]}"
        )
    return model.to(device).eval().requires_grad_(False)


def model_class(transformers, architectures: object) -> type[nn.Module]:
    """The class that config.json names. Raises CheckpointError unless it is one of transformers' own models."""
    name = architectures[0] if isinstance(architectures, list) and architectures else None
    cls = getattr(transformers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise CheckpointError(f"config.json names no model class of transformers {transformers.__version__} ({name})")
    return cls


@contextmanager
def _no_progress_bar(transformers):
    """The run shows its own."""
    bars = transformers.utils.logging
    shown = bars.is_progress_bar_enabled()
    bars.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            bars.enable_progress_bar()
