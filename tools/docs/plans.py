"""What a dry run says of published shapes: size, memory and time, without their weights.

    python -m tools.docs.plans qwen3_vl --format gguf --samples 128
    python -m tools.docs.plans qwen3_vl_moe --format gptq

A checkpoint here is a small one of the family (tools/reference_vlm) whose config.json has the
published sizes, with the headers of its tensors in a file that takes no room on the disk. Flags
behind the name are those of the command.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import transformers

from tools.docs.sizes import write_headers
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.cli import main as command
from vlmq_export.quantizer.model.architecture import Architecture

_TOWER = {  # of the models up to 4B
    "deepstack_visual_indexes": [5, 11, 17],
    "depth": 24,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_heads": 16,
    "num_position_embeddings": 2304,
}
_LARGE_TOWER = {
    "deepstack_visual_indexes": [8, 16, 24],
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "num_position_embeddings": 2304,
}
_SCALING = {"mrope_interleaved": True, "mrope_section": [24, 20, 20], "rope_type": "default"}
# model_type → the repository, and what its config.json has in place of the small one's.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_vl": (
        "Qwen3-VL-4B-Instruct",
        {
            "text_config": {
                "head_dim": 128,
                "hidden_size": 2560,
                "intermediate_size": 9728,
                "num_attention_heads": 32,
                "num_hidden_layers": 36,
                "num_key_value_heads": 8,
                "rope_scaling": _SCALING,
                "vocab_size": 151936,
            },
            "tie_word_embeddings": True,
            "vision_config": _TOWER | {"out_hidden_size": 2560},
        },
    ),
    "qwen3_5": (
        "Qwen3.5-4B",
        {
            "text_config": {
                "full_attention_interval": 4,
                "head_dim": 256,
                "hidden_size": 2560,
                "intermediate_size": 9216,
                "linear_num_key_heads": 16,
                "linear_num_value_heads": 32,
                "num_attention_heads": 16,
                "num_hidden_layers": 32,
                "num_key_value_heads": 4,
                "vocab_size": 248320,
            },
            "tie_word_embeddings": True,
            "vision_config": _TOWER | {"deepstack_visual_indexes": [], "out_hidden_size": 2560},
        },
    ),
    "qwen3_vl_moe": (
        "Qwen3-VL-30B-A3B-Instruct",
        {
            "text_config": {
                "head_dim": 128,
                "hidden_size": 2048,
                "intermediate_size": 6144,
                "moe_intermediate_size": 768,
                "num_attention_heads": 32,
                "num_experts": 128,
                "num_experts_per_tok": 8,
                "num_hidden_layers": 48,
                "num_key_value_heads": 4,
                "rope_scaling": _SCALING,
                "vocab_size": 151936,
            },
            "tie_word_embeddings": False,
            "vision_config": _LARGE_TOWER | {"out_hidden_size": 2048},
        },
    ),
}


def checkpoint(folder: Path, model_type: str) -> Path:
    """Write a checkpoint of the published shape below `folder`, without its weights."""
    name, sizes = PUBLISHED[model_type]
    made = make_tiny(folder / name, model_type)
    file = made / "config.json"
    config = json.loads(file.read_text("utf-8"))
    for key, value in sizes.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(config), "utf-8")
    built = transformers.AutoConfig.from_pretrained(made)
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])(built)
    family = Architecture.of(config).family
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    shapes = {
        # Experts are published as [experts, in, out].
        family.hub_name(n): p.mT.shape if ".experts." in n else p.shape
        for n, p in model.named_parameters()
        if n not in tied
    }
    write_headers(made / "model.safetensors", shapes)
    return made


def main() -> None:
    """Print the dry run of a published shape."""
    model_type, *flags = sys.argv[1:]
    with tempfile.TemporaryDirectory() as scratch:
        model = checkpoint(Path(scratch), model_type)
        sys.argv[1:] = [str(model), *flags, "--dry-run"]
        command()


if __name__ == "__main__":
    main()
