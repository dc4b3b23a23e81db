"""Runs a GPTQ folder in transformers with gptqmodel, and leaves what it computed in files.

`runtime.py` starts it as a process of its own, because importing gptqmodel starts threads, patches
safetensors and transformers, and redirects caches. Its arguments are request files in JSON
(`runtime.Request`), which it works on in turn.
"""

from __future__ import annotations

import gc

# Of the time that importing gptqmodel takes, half would go into looking for garbage.
gc.disable()

import json  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from torch import nn  # noqa: E402

from vlmq_export.formats.proof.answers import greedy_answers  # noqa: E402

ROWS = 32  # input rows of each kind that a linear is tried on


def load(request: dict) -> Any:  # a PreTrainedModel, whose parts torch types as Tensor | Module
    """The model as a user of transformers gets it.

    Raises RuntimeError if a tensor of the folder found no place, or a parameter no tensor.
    """
    from transformers import AutoModelForImageTextToText, GPTQConfig

    chosen = {}
    if request["backend"]:
        chosen["quantization_config"] = GPTQConfig(bits=request["bits"], backend=request["backend"])
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        request["folder"],
        dtype=getattr(torch, request["dtype"]),
        device_map="cpu",
        output_loading_info=True,
        trust_remote_code=False,
        **chosen,
    )
    model, info = loaded
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise RuntimeError(
            f"transformers could not place {len(wrong)} tensors of the folder, first {wrong[0]}"
        )
    return model.eval()


def quantized_modules(model: nn.Module) -> dict[str, Any]:
    """The quantized linears, which are of some class of gptqmodel's, by module name."""
    return {
        name: m
        for name, m in model.named_modules()
        if hasattr(m, "qweight") and hasattr(m, "g_idx")
    }


def upcast_scales(model: nn.Module) -> None:
    """Widen the scales to float32.

    Otherwise TorchLinear rounds each decoded weight to float16, which changes logits by 5e-4.
    """
    for module in quantized_modules(model).values():
        module.scales = module.scales.float()


def save_weights(model: nn.Module, out: Path) -> None:
    """Write every parameter and buffer as float32 to <module name>.npy.

    A quantized linear is written as its kernel decodes it, [N, K].
    """
    out.mkdir()
    quantized = quantized_modules(model)
    packed = set()
    for name, module in quantized.items():
        weight = module.dequantize_weight().T.contiguous().float()
        np.save(out / f"{name}.weight.npy", weight.numpy())
        packed |= {f"{name}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    for name, value in model.state_dict().items():
        if name not in packed:
            np.save(out / f"{name}.npy", value.float().numpy())


def save_linears(model: nn.Module, inputs: dict[str, torch.Tensor], out: Path) -> None:
    """Write input and output of every quantized linear in its kernel.

    The input is random rows, then rows that the linear is given when the model runs on `inputs`.
    """
    out.mkdir()
    met: dict[str, torch.Tensor] = {}
    modules = quantized_modules(model)
    names = {module: name for name, module in modules.items()}

    # A value that a hook returns would replace the input.
    def keep(module: nn.Module, args: tuple) -> None:
        met[names[module]] = args[0].flatten(0, -2)[-ROWS:].clone()

    hooks = [m.register_forward_pre_hook(keep) for m in names]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    random = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        x = torch.cat([torch.randn(ROWS, module.in_features, generator=random), met[name].float()])
        np.savez(out / f"{name}.npz", x=x.numpy(), y=module(x).numpy())


@torch.no_grad()
def work(request: dict, result: dict[str, Any]) -> None:
    """Load the model, run it on every prompt, and write what it computes into the request's `out`.

    result: is filled with what is known so far, so that a kernel that fails can be named.
    """
    out = Path(request["out"])
    start = time.perf_counter()
    model = load(request)
    gc.freeze()  # what is there now stays to the end of the request
    gc.enable()
    kernels = sorted({type(m).__name__ for m in quantized_modules(model).values()})
    result |= {"kernel": ", ".join(kernels), "load_seconds": time.perf_counter() - start}
    write(result, out)
    prompts = [load_file(file) for file in request["prompts"]]
    if request["exact"]:
        upcast_scales(model)
        save_weights(model, out / "weights")
        save_linears(model, prompts[0], out / "linears")
    for i, inputs in enumerate(prompts):
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
        logits = model(**inputs, use_cache=False).logits[0, :, : request["vocabulary"]]
        np.save(out / f"logits-{i}.npy", logits.float().numpy())
    stop_ids = frozenset(request["stop_ids"])
    answers = dict(greedy_answers(model, prompts, stop_ids, request["limit"]))
    result |= {
        "answers": [answers[i] for i in range(len(prompts))],
        "seconds": time.perf_counter() - start,
    }


def write(result: dict[str, Any], out: Path) -> None:
    """Replace result.json, which whoever waits reads at any time."""
    temporary = out / "result.json.tmp"
    temporary.write_text(json.dumps(result), "utf-8")
    temporary.replace(out / "result.json")


def main() -> None:
    """Do what the request files say. A failure becomes one line in the request's result."""
    for file in sys.argv[1:]:
        request = json.loads(Path(file).read_text("utf-8"))
        torch.set_num_threads(request["threads"])
        result: dict[str, Any] = {}
        try:
            work(request, result)
        except Exception as e:  # a runtime may raise anything
            result["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"
        write(result, Path(request["out"]))
        gc.unfreeze()  # the next request's model takes the place of this one's
        gc.collect()
    gc.freeze()  # the end of the process does not look for garbage either


if __name__ == "__main__":
    main()
