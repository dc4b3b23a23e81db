"""What a worker does: it runs a folder in transformers, and leaves what it computed in files.

Each format has a `proof/worker.py`, which `runtime.py` starts as a process of its own. It says how
its runtime loads a folder, and ends in `main`. Its arguments are request files in JSON
(`runtime.Request`), which it works on in turn.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from vlmq_export.formats.proof.answers import greedy_answers

ROWS = 32  # input rows of each kind that a linear is tried on


@dataclass(frozen=True)
class Loaded:
    """A folder in a runtime."""

    model: Any  # a PreTrainedModel, whose parts torch types as Tensor | Module
    linears: dict[str, Any]  # the quantized linears by module name
    packed: tuple[str, ...]  # names of their tensors that are not weights of the model
    kernel: str  # what multiplies with them, in words
    weight: Callable[[Any], torch.Tensor]  # what a quantized linear decodes to, float [N, K]


# Loads the folder of a request as a user of its runtime does. Where the request is exact, scales
# are float32. Raises what the runtime raises.
Loader = Callable[[dict], Loaded]


def from_pretrained(request: dict, **chosen: Any) -> Any:
    """The model as a user of transformers gets it.

    Raises RuntimeError if a tensor of the folder found no place, or a parameter no tensor.
    """
    from transformers import AutoModelForImageTextToText

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


def save_weights(loaded: Loaded, out: Path) -> None:
    """Write every parameter and buffer as float32 to <module name>.npy.

    A quantized linear is written as its kernel decodes it, [N, K].
    """
    out.mkdir()
    taken = set()
    for name, module in loaded.linears.items():
        np.save(out / f"{name}.weight.npy", loaded.weight(module).float().numpy())
        taken |= {f"{name}.{part}" for part in ("weight", *loaded.packed)}
    for name, value in loaded.model.state_dict().items():
        if name not in taken:
            np.save(out / f"{name}.npy", value.float().numpy())


def save_linears(loaded: Loaded, inputs: dict[str, torch.Tensor], out: Path) -> None:
    """Write input and output of every quantized linear in its kernel.

    The input is random rows, then rows that the linear is given when the model runs on `inputs`. A
    linear of the vision tower is given none where no image is among them.
    """
    out.mkdir()
    met: dict[str, torch.Tensor] = {}
    modules = loaded.linears
    names = {module: name for name, module in modules.items()}

    # A value that a hook returns would replace the input.
    def keep(module: nn.Module, args: tuple) -> None:
        met[names[module]] = args[0].flatten(0, -2)[-ROWS:].clone()

    hooks = [m.register_forward_pre_hook(keep) for m in names]
    loaded.model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    random = torch.Generator().manual_seed(0)
    for name, module in modules.items():
        rows = [torch.randn(ROWS, module.in_features, generator=random)]
        x = torch.cat(rows + ([met[name].float()] if name in met else []))
        np.savez(out / f"{name}.npz", x=x.numpy(), y=module(x).numpy())


@torch.no_grad()
def work(request: dict, result: dict[str, Any], load: Loader) -> None:
    """Load the model, run it on every prompt, and write what it computes into the request's `out`.

    result: is filled with what is known so far, so that a kernel that fails can be named.
    """
    out = Path(request["out"])
    start = time.perf_counter()
    loaded = load(request)
    model = loaded.model
    gc.freeze()  # what is there now stays to the end of the request
    gc.enable()
    result |= {"kernel": loaded.kernel, "load_seconds": time.perf_counter() - start}
    write(result, out)
    prompts = [load_file(file) for file in request["prompts"]]
    if request["exact"] and request["logits"]:
        save_weights(loaded, out / "weights")
        first = next((inputs for inputs in prompts if "pixel_values" in inputs), prompts[0])
        save_linears(loaded, first, out / "linears")
    for inputs in prompts:
        if "pixel_values" in inputs:
            inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    for i, inputs in enumerate(prompts if request["logits"] else []):
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


def main(load: Loader) -> None:
    """Do what the request files say. A failure becomes one line in the request's result."""
    for file in sys.argv[1:]:
        request = json.loads(Path(file).read_text("utf-8"))
        torch.set_num_threads(request["threads"])
        result: dict[str, Any] = {}
        try:
            work(request, result, load)
        except Exception as e:  # a runtime may raise anything
            result["failed"] = f"{type(e).__name__}: {' '.join(str(e).split())[:400]}"
        write(result, Path(request["out"]))
        gc.unfreeze()  # the next request's model takes the place of this one's
        gc.collect()
    gc.freeze()  # the end of the process does not look for garbage either
