"""Quantize a model folder with llm-compressor's GPTQ on given samples, as a request of peers.py says.

    python tools/bench/llmcompressor_quantize.py REQUEST.json

Needs `llmcompressor` 0.14 and nothing of this project. Its defaults: damping 1 %, `static` activation order (groups fixed
before the columns are reordered). What it writes is compressed-tensors' pack-quantized format.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main(request: dict) -> None:
    import torch
    import transformers
    from autoround_quantize import samples_of
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    folder = request["model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    model = getattr(transformers, config.architectures[0]).from_pretrained(folder, dtype=torch.float32)
    per_channel = request["group_size"] == -1
    weights = {
        "num_bits": request["bits"], "type": "int", "symmetric": request["sym"],
        "strategy": "channel" if per_channel else "group", "group_size": None if per_channel else request["group_size"],
    }  # fmt: skip
    layer = type(model.model.language_model.layers[0]).__name__
    samples = samples_of(request["samples_file"], request["samples"])
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(samples, batch_size=None),
        recipe=GPTQModifier(
            config_groups={"group_0": {"targets": [f"re:.*language_model.layers.*{p}_proj$" for p in
                                                   ("q", "k", "v", "o", "gate", "up", "down")], "weights": weights}},
            ignore=["lm_head"],
        ),
        num_calibration_samples=len(samples),
        sequential_targets=[layer],
        pipeline="sequential",
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    model.save_pretrained(request["out"], save_compressed=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
