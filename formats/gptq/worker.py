"""Runs a GPTQ folder in transformers + gptqmodel and leaves what it computed in files.

Started by runtime.py as a process of its own: importing gptqmodel starts threads, patches safetensors and transformers
and redirects caches. One argument, a request file in JSON (`runtime.Request`).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file

ROWS = 32  # input rows of each kind that a linear is tried on


def load(request: dict) -> torch.nn.Module:
    """The model as a user of transformers gets it; raises RuntimeError when tensors of the folder found no place."""
    from transformers import AutoModelForImageTextToText, GPTQConfig

    chosen = {}
    if request["backend"]:
        chosen["quantization_config"] = GPTQConfig(bits=request["bits"], backend=request["backend"])
    model, info = AutoModelForImageTextToText.from_pretrained(
        request["folder"], dtype=getattr(torch, request["dtype"]), device_map="cpu", output_loading_info=True, **chosen
    )
    if wrong := [*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"]]:
        raise RuntimeError(f"transformers could not place {len(wrong)} tensors of the folder, first {wrong[0]}")
    return model.eval()


def quantized_modules(model: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: m for name, m in model.named_modules() if hasattr(m, "qweight") and hasattr(m, "g_idx")}


def upcast_scales(model: torch.nn.Module) -> None:
    """Without this TorchLinear rounds each decoded weight to float16, 5e-4 of the logits."""
    for module in quantized_modules(model).values():
        module.scales = module.scales.float()


def save_weights(model: torch.nn.Module, out: Path) -> None:
    """Every parameter and buffer as float32 <module name>.npy; a quantized linear as its kernel decodes it, [N, K]."""
    out.mkdir()
    quantized = quantized_modules(model)
    for name, module in quantized.items():
        np.save(out / f"{name}.weight.npy", module.dequantize_weight().T.contiguous().float().numpy())
    packed = {f"{name}.{part}" for name in quantized for part in ("qweight", "qzeros", "scales", "g_idx")}
    for name, value in model.state_dict().items():
        if name not in packed:
            np.save(out / f"{name}.npy", value.float().numpy())


def save_linears(model: torch.nn.Module, inputs: dict[str, torch.Tensor], out: Path) -> None:
    """x and y of every quantized linear: random rows, then rows that it meets when the model runs on `inputs`."""
    out.mkdir()
    met: dict[str, torch.Tensor] = {}
    modules = quantized_modules(model)

    def keep(module: torch.nn.Module, args: tuple) -> None:  # a value returned here would replace the input
        met[names[module]] = args[0].flatten(0, -2)[-ROWS:].clone()

    names = {m: name for name, m in modules.items()}
    hooks = [m.register_forward_pre_hook(keep) for m in names]
    model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    random = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        x = torch.cat([torch.randn(ROWS, module.in_features, generator=random), met[name].float()])
        np.savez(out / f"{name}.npz", x=x.numpy(), y=module(x).numpy())


def answer(model: torch.nn.Module, inputs: dict[str, torch.Tensor], limit: int, stop_ids: list[int]) -> list[int]:
    """Greedy token ids up to and without the stop token."""
    ids = model.generate(
        **inputs, max_new_tokens=limit, do_sample=False, num_beams=1, eos_token_id=stop_ids, pad_token_id=stop_ids[0]
    )
    new = ids[0, inputs["input_ids"].shape[1] :].tolist()
    return new[: next((i for i, t in enumerate(new) if t in stop_ids), len(new))]


@torch.no_grad()
def work(request: dict) -> None:
    out = Path(request["out"])
    start = time.perf_counter()
    model = load(request)
    kernels = sorted({type(m).__name__ for m in quantized_modules(model).values()})
    result = {"kernel": ", ".join(kernels), "load_seconds": time.perf_counter() - start, "answers": []}
    result_file = out / "result.json"
    result_file.write_text(json.dumps(result), "utf-8")  # so that a kernel that fails is named
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
        result["answers"].append(answer(model, inputs, request["limit"], request["stop_ids"]))
    result["seconds"] = time.perf_counter() - start
    result_file.write_text(json.dumps(result), "utf-8")


def main() -> int:
    request = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    torch.set_num_threads(request["threads"])
    try:
        work(request)
    except Exception as e:  # whatever a runtime raises becomes one line of the report
        sys.stderr.write(f"\n{type(e).__name__}: {' '.join(str(e).split())[:400]}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
