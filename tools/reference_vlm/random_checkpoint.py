"""A checkpoint of a published shape with random weights, written shard by shard.

    python -m tools.reference_vlm.random_checkpoint /tmp/qwen-3b
    python -m tools.reference_vlm.random_checkpoint /tmp/qwen-3b-2 --layers 2
    python -m tools.reference_vlm.random_checkpoint /tmp/small --layers 8 --scale 8

The first is Qwen2.5-VL-3B: 36 layers, 7.5 GB. The second has two of its decoder layers, and the
third eight, with every width divided by 8. Only one tensor is in memory at a time.

Shapes and settings are those of the published config.json. The tokenizer is the bundled one, whose
few ids take the place of the special tokens'; the embedding keeps its published 151,936 rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers import AutoTokenizer, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.quantizer.model.architecture import Architecture

COPIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
)
SPECIAL_TOKENS = {
    "bos_token_id": "<|endoftext|>",
    "eos_token_id": "<|im_end|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "vision_token_id": "<|vision_pad|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
QWEN2_5_VL_3B = {
    "architectures": ["Qwen2_5_VLForConditionalGeneration"],
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 128000,
    "max_window_layers": 70,
    "model_type": "qwen2_5_vl",
    "num_attention_heads": 16,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 32768,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_sliding_window": False,
    "vision_config": {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "in_chans": 3,
        "out_hidden_size": 2048,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "tokens_per_second": 2,
        "temporal_patch_size": 2,
    },
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    "vocab_size": 151936,
}
Shapes = dict[str, torch.Size]  # by hub name
ITEM = 2  # bytes of a bfloat16


def scaled(config: dict, layers: int | None, scale: int) -> dict:
    """`config` with other decoder layers (None: as many as before) and widths divided by `scale`.

    Heads keep their width, and up to scale 8 every linear's input stays a multiple of 128.
    """
    vision = config["vision_config"]
    text = {k: config[k] // scale for k in ("hidden_size", "num_attention_heads", "vocab_size")}
    text["intermediate_size"] = config["intermediate_size"] // scale // 128 * 128
    text["num_key_value_heads"] = min(config["num_key_value_heads"], text["num_attention_heads"])
    text["num_hidden_layers"] = layers or config["num_hidden_layers"]
    widths = ("hidden_size", "intermediate_size", "num_heads", "out_hidden_size")
    tower = {k: vision[k] // scale for k in widths}
    tower["depth"] = vision["depth"] if scale == 1 else 4
    tower["fullatt_block_indexes"] = vision["fullatt_block_indexes"] if scale == 1 else [1, 3]
    return config | text | {"vision_config": vision | tower}


def shapes(config: dict) -> Shapes:
    """Every tensor's shape, from transformers' own class without weights."""
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(**config))
    family = Architecture.of(config).family
    return {family.hub_name(name): p.shape for name, p in model.named_parameters()}


def random_tensor(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """A bfloat16 tensor of a scale that keeps activations finite through any number of layers."""
    generator = torch.Generator().manual_seed(seed)
    value = torch.empty(shape, dtype=torch.bfloat16)
    columns = math.prod(shape[1:])
    if len(shape) == 1:
        mean, spread = (1.0, 0.1) if "norm" in name or ".ln_q." in name else (0.0, 0.05)
    else:
        mean, spread = 0.0, 1.0 if "embed_tokens" in name else columns**-0.5
    for rows in value.view(shape[0], -1).split(max(1, 2**24 // columns)):
        rows.copy_(torch.randn(rows.shape, generator=generator) * spread + mean)
    return value


def shards(tensors: Shapes, limit: int) -> Iterator[list[str]]:
    """The names of each shard's tensors: as many as fit in `limit` bytes, and at least one."""
    shard, room = [], limit
    for name, shape in tensors.items():
        size = ITEM * math.prod(shape)
        if shard and size > room:
            yield shard
            shard, room = [], limit
        shard.append(name)
        room -= size
    yield shard


def write_shard(path: Path, names: list[str], tensors: Shapes) -> None:
    """Write a safetensors file, tensor by tensor."""
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        size, shape = ITEM * math.prod(tensors[name]), list(tensors[name])
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    seeds = {name: seed for seed, name in enumerate(tensors)}
    with path.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        for name in names:
            value = random_tensor(name, tensors[name], seeds[name])
            f.write(value.view(-1).view(torch.uint8).numpy().data)


def make(
    folder: Path,
    *,
    published: dict = QWEN2_5_VL_3B,
    layers: int | None = None,
    scale: int = 1,
    shard_bytes: int = 2 * 10**9,
) -> Path:
    """Write the checkpoint into `folder`. `layers` and `scale` are those of `scaled`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        shutil.copyfile(REFERENCE_VLM / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_VLM)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()}
    config = scaled(published, layers, scale) | ids
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", "utf-8")
    tensors = shapes(config)
    parts = list(shards(tensors, shard_bytes))
    weight_map = {}
    for i, names in enumerate(parts, start=1):
        file = f"model-{i:05d}-of-{len(parts):05d}.safetensors"
        write_shard(folder / file, names, tensors)
        weight_map |= dict.fromkeys(names, file)
    total = sum(ITEM * math.prod(s) for s in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    text = json.dumps(index, indent=1) + "\n"
    (folder / "model.safetensors.index.json").write_text(text, "utf-8")
    return folder


def main() -> None:
    """Write a checkpoint as the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int)
    parser.add_argument("--scale", type=int, default=1, help="divide every width by this")
    args = parser.parse_args()
    make(args.folder, layers=args.layers, scale=args.scale)


if __name__ == "__main__":
    main()
