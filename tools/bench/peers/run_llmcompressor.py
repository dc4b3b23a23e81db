"""Quantize a model folder with llm-compressor's GPTQ, as a request of peers.py says.

    python tools/bench/peers/run_llmcompressor.py REQUEST.json

This needs `llmcompressor` 0.14 and nothing of this project. llm-compressor runs with its defaults:
damping 1 %, and `static` activation order, where groups are fixed before the columns are reordered.
It writes compressed-tensors' pack-quantized format.
"""

import json
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

# Python's option -P, with which peers.py starts this script, leaves the script's folder out.
sys.path.append(str(Path(__file__).resolve().parent))


def main(request: dict) -> None:
    """Quantize as the request says, and write the model into its folder `out`."""
    import torch
    import transformers
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier
    from run_autoround import samples_of

    folder = request["model"]
    config = transformers.AutoConfig.from_pretrained(folder)
    kind_of_model = getattr(transformers, config.architectures[0])
    model = kind_of_model.from_pretrained(folder, dtype=torch.float32)
    layer = type(model.get_decoder().layers[0]).__name__
    samples = samples_of(request["samples_file"], request["samples"])
    oneshot(
        model=model,
        dataset=torch.utils.data.DataLoader(samples, batch_size=None),
        recipe=GPTQModifier(config_groups={"group_0": linears(request)}, ignore=["lm_head"]),
        num_calibration_samples=len(samples),
        sequential_targets=[layer],
        pipeline="sequential",
        tokenizer=transformers.AutoTokenizer.from_pretrained(folder),
    )
    model.save_pretrained(request["out"], save_compressed=True)


def linears(request: dict) -> dict:
    """Which linears are quantized, and how, in llm-compressor's terms."""
    per_channel = request["group_size"] == -1
    weights = {
        "num_bits": request["bits"],
        "type": "int",
        "symmetric": request["sym"],
        "strategy": "channel" if per_channel else "group",
        "group_size": None if per_channel else request["group_size"],
    }
    names = ("q", "k", "v", "o", "gate", "up", "down")
    targets = [f"re:.*(language|text)_model.layers.*{name}_proj$" for name in names]
    return {"targets": targets, "weights": weights}


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
