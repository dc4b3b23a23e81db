"""Quantize a model folder with AutoRound on given samples, as a request of peers.py says.

    python tools/bench/autoround_quantize.py REQUEST.json

Needs `auto-round` 0.16 and nothing of this project. Its defaults (200 iterations of sign gradient descent on rounding and
ranges), 8 samples a step; all samples are given where its own default is 128 texts. What it writes is GPTQ's format, or with
`gguf` in the request a GGUF of that kind by the converter of llama.cpp that it carries.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def samples_of(file: str, count: int) -> list[dict]:
    from safetensors import safe_open

    samples: list[dict] = [{} for _ in range(count)]
    with safe_open(file, framework="pt") as f:
        for name in f.keys():  # noqa: SIM118
            index, _, key = name.partition(".")
            samples[int(index)][key] = f.get_tensor(name)
    return samples


def main(request: dict) -> None:
    import torch
    import transformers
    from auto_round import AutoRound

    folder = request["model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    samples = samples_of(request["samples_file"], request["samples"])
    # Of texts it drops what is shorter than this, and cuts what is longer.
    given = {"seqlen": min(s["input_ids"].shape[1] for s in samples)}
    if (Path(folder) / "preprocessor_config.json").is_file():
        # It refuses a VLM without a processor, whose one for this family needs torchvision; samples are processed already.
        processor = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
        given = {"processor": processor, "image_processor": processor}
    kind = request.get("gguf", "")
    grid = {"scheme": kind.upper()} if kind else {k: request[k] for k in ("bits", "group_size", "sym")}
    if kind:
        mend_the_converter()
    rounding = AutoRound(
        model, tokenizer=tokenizer, **given, **grid,
        dataset=samples, nsamples=request["samples"],
        iters=request.get("iters"), batch_size=1, gradient_accumulate_steps=8, device_map="cpu", enable_torch_compile=False, seed=request.get("seed", 42),
    )  # fmt: skip
    rounding.quantize_and_save(request["out"], format=kind or "auto_gptq")


def mend_the_converter() -> None:
    """Its converter knows a pre-tokenizer by what a vocabulary makes of one text, so not the reference VLMs': Qwen2's."""
    import gguf
    from auto_round.export.export_to_gguf.llama_cpp_conversion import get_conversion

    if not hasattr(
        gguf.MODEL_ARCH, "DFLASH"
    ):  # its module for Qwen2 names it, no published gguf has it, nothing here is one
        gguf.MODEL_ARCH.DFLASH = gguf.MODEL_ARCH.QWEN2
    get_conversion()
    sys.modules["conversion.base"].TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
