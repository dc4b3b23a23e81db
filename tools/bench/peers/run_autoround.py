"""Quantize a model folder with AutoRound on given samples, as a request of peers.py says.

    python tools/bench/peers/run_autoround.py REQUEST.json

This needs `auto-round` 0.16 and nothing of this project. AutoRound runs with its defaults (200
iterations of sign gradient descent on rounding and ranges), with 8 samples a step, and on all
samples, where its own default is 128 texts. `iters` in the request sets the iterations, of which
its best recipe has 1000. With `extension` it runs with the extension that it advises for 2 bits,
which is for symmetric grids. It writes GPTQ's format. With `gguf` in the request it writes a GGUF
of that kind, with the converter of llama.cpp that it carries.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F

os.environ.setdefault("HF_HUB_OFFLINE", "1")
AT_ONCE = 8  # samples of a step


def samples_of(file: str, count: int) -> list[dict]:
    """The model's inputs of each sample, from the safetensors file that peers.py wrote."""
    from safetensors import safe_open

    samples: list[dict] = [{} for _ in range(count)]
    with safe_open(file, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118
            index, _, key = name.partition(".")
            samples[int(index)][key] = f.get_tensor(name)
    return samples


def batches_of(samples: list[dict], filler: int) -> Iterator[dict]:
    """The samples in batches of AT_ONCE, each filled at its end to the length of the longest.

    AutoRound tunes on samples of one length. What is filled is behind all that a sample says, so
    that it changes nothing before it.
    """
    longest = max(s["input_ids"].shape[1] for s in samples)

    def filled(key: str, value: torch.Tensor) -> torch.Tensor:
        own = {"input_ids": filler, "attention_mask": 1}
        if key.startswith("pixel") or key.endswith("thw"):
            return value
        return F.pad(value, (0, longest - value.shape[1]), value=own.get(key, 0))

    for start in range(0, len(samples), AT_ONCE):
        some = samples[start : start + AT_ONCE]
        yield {key: torch.cat([filled(key, s[key]) for s in some]) for key in some[0]}


def main(request: dict) -> None:
    """Quantize as the request says, and write the model into its folder `out`."""
    import transformers
    from auto_round import AutoRound

    folder = request["model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind_of_model = getattr(transformers, config.architectures[0])
    model = kind_of_model.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = samples_of(request["samples_file"], request["samples"])
    batches = list(batches_of(samples, tokenizer.eos_token_id))
    # AutoRound drops texts that are shorter than this, and cuts those that are longer.
    given = {"seqlen": batches[0]["input_ids"].shape[1]}
    if (Path(folder) / "preprocessor_config.json").is_file():
        # AutoRound refuses a VLM without a processor. The one of this family needs torchvision, and
        # the samples are processed already, so that an image processor does.
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        given = {"processor": processor, "image_processor": processor}
    kind = request.get("gguf", "")
    if kind:
        grid = {"scheme": kind.upper()}
        mend_the_converter()
    else:
        grid = {k: request[k] for k in ("bits", "group_size", "sym")}
    rounding = AutoRound(
        model,
        tokenizer=tokenizer,
        **given,
        **grid,
        iters=request.get("iters"),
        enable_alg_ext=request.get("extension", False),
        dataset=batches,
        nsamples=request["samples"],
        batch_size=AT_ONCE,
        device_map="cpu",
        enable_torch_compile=False,
        seed=request.get("seed", 42),
    )
    rounding.quantize_and_save(request["out"], format=kind or "auto_gptq")


def mend_the_converter() -> None:
    """Make AutoRound's converter take the reference VLMs' tokenizer as one of Qwen2's kind.

    The converter recognises a pre-tokenizer by the tokens that a published vocabulary makes of one
    text, and does not know this vocabulary, whose pre-tokenizer is Qwen2's.
    """
    import gguf
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    # The converter's module for Qwen2 names this architecture, which no published gguf has. No
    # model here is one.
    if not hasattr(gguf.MODEL_ARCH, "DFLASH"):
        gguf.MODEL_ARCH.DFLASH = gguf.MODEL_ARCH.QWEN2
    get_conversion()
    sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
