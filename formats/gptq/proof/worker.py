"""Runs a GPTQ folder in transformers with gptqmodel, as a process of its own.

Importing gptqmodel starts threads, patches safetensors and transformers, and redirects caches.
"""

from __future__ import annotations

import gc

# Of the time that importing gptqmodel takes, half would go into looking for garbage.
gc.disable()

import json  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402

from vlmq_export.formats.gptq.read import PARTS  # noqa: E402
from vlmq_export.formats.in_transformers.proof.worker import (  # noqa: E402
    Loaded,
    from_pretrained,
    main,
)


def load(request: dict) -> Loaded:
    """The folder with the kernel that the request names, or with the one that the loader picks.

    In an exact run the scales are widened to float32. Otherwise TorchLinear rounds each decoded
    weight to float16, which changes logits by 5e-4.
    """
    from transformers import GPTQConfig

    asked, chosen = request["loading"], {}
    if asked.get("alone"):
        model = by_gptqmodel(request)
    else:
        if "backend" in asked:
            chosen["quantization_config"] = GPTQConfig(**asked)
        model = from_pretrained(request, **chosen)
    linears: dict[str, Any] = {
        name: m
        for name, m in model.named_modules()
        if hasattr(m, "qweight") and hasattr(m, "g_idx")
    }
    for module in linears.values() if request["exact"] else ():
        module.scales = module.scales.float()
    kernel = ", ".join(sorted({type(m).__name__ for m in linears.values()}))
    return Loaded(model, linears, PARTS, kernel, lambda m: m.dequantize_weight().T.contiguous())


def by_gptqmodel(request: dict) -> Any:
    """The model of transformers as GPTQModel.load builds it, by the rules of `dynamic`.

    In an exact run its kernel is let work in float32, as it does where transformers builds it.
    """
    from gptqmodel import BACKEND, GPTQModel
    from gptqmodel.models.auto import MODEL_MAP
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear

    folder = request["folder"]
    kind = json.loads((Path(folder) / "config.json").read_text("utf-8"))["model_type"]
    # The combined processors of these families need more packages, and no image is processed here.
    MODEL_MAP[kind].require_load_processor = False
    MODEL_MAP[kind].require_pkgs = None
    backend = BACKEND[request["loading"].get("backend", "auto").upper()]
    dtype = getattr(torch, request["dtype"])
    if request["exact"]:
        TorchLinear.SUPPORTS_DTYPES = [*TorchLinear.SUPPORTS_DTYPES, torch.float32]
    loaded: Any = GPTQModel.load(folder, device="cpu", backend=backend, dtype=dtype)
    return loaded.model.eval()


if __name__ == "__main__":
    main(load)
