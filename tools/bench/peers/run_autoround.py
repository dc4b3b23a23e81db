"""Quantize a model folder with AutoRound on given samples, as a request of peers.py says.

    python tools/bench/peers/run_autoround.py REQUEST.json

This needs `auto-round` 0.16 and nothing of this project. AutoRound runs with its defaults (200
iterations of sign gradient descent on rounding and ranges), with 8 samples a step, and on all
samples, where its own default is 128 texts. It writes GPTQ's format. With `gguf` in the request it
writes a GGUF of that kind, with the converter of llama.cpp that it carries.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def samples_of(file: str, count: int) -> list[dict]:
    """The model's inputs of each sample, from the safetensors file that peers.py wrote."""
    from safetensors import safe_open

    samples: list[dict] = [{} for _ in range(count)]
    with safe_open(file, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118
            index, _, key = name.partition(".")
            samples[int(index)][key] = f.get_tensor(name)
    return samples


def main(request: dict) -> None:
    """Quantize as the request says, and write the model into its folder `out`."""
    import torch
    import transformers
    from auto_round import AutoRound

    folder = request["model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind_of_model = getattr(transformers, config.architectures[0])
    model = kind_of_model.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = samples_of(request["samples_file"], request["samples"])
    # AutoRound drops texts that are shorter than this, and cuts those that are longer.
    given = {"seqlen": min(s["input_ids"].shape[1] for s in samples)}
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
        dataset=samples,
        nsamples=request["samples"],
        iters=request.get("iters"),
        batch_size=1,
        gradient_accumulate_steps=8,
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
