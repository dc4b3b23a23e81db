"""The sizes of README's table: what a 3B and a 7B of published shape become in each format.

    python -m tools.docs.sizes          # prints the table

Nothing is quantized. A checkpoint here is a config.json and the headers of its tensors, in a file
whose weights take no room on the disk, and each size comes from the plan of a run.
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from tools.reference_vlm.random_checkpoint import (
    COPIED,
    QWEN2_5_VL_3B,
    SPECIAL_TOKENS,
    Shapes,
    shapes,
)
from vlmq_export import Recipe, plan
from vlmq_export.bundled import REFERENCE_VLM

_7B = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "num_hidden_layers": 28,
    "max_window_layers": 28,
    "tie_word_embeddings": False,
    "vocab_size": 152064,
    "vision_config": QWEN2_5_VL_3B["vision_config"] | {"out_hidden_size": 3584},
}
MODELS = {"Qwen2.5-VL-3B": QWEN2_5_VL_3B, "Qwen2.5-VL-7B": QWEN2_5_VL_3B | _7B}
FLAGS = {  # as a user types them → the recipe
    "--format gguf": {"format": ["gguf"]},
    "--format gguf --vision-bits off": {"format": ["gguf"], "vision_bits": 0},
    "--format gguf --gguf-type Q3_K_M": {"format": ["gguf"], "gguf_type": "Q3_K_M"},
    "--format gguf --gguf-type Q2_K": {"format": ["gguf"], "gguf_type": "Q2_K"},
    "--format gguf --bits 8": {"format": ["gguf"], "bits": 8},
    "--format compressed-tensors": {"format": ["compressed-tensors"]},
    "--format compressed-tensors --vision-bits 8": {
        "format": ["compressed-tensors"],
        "vision_bits": 8,
    },
    "--format gptq --sym": {"format": ["gptq"], "sym": True},
    "--format gptq --bits 8": {"format": ["gptq"], "bits": 8},
    "--format gptq --bits 3": {"format": ["gptq"], "bits": 3},
    "--format gptq --bits 2": {"format": ["gptq"], "bits": 2},
    "--format onnx": {"format": ["onnx"]},
    "--format onnx --vision-bits off --embedding-bits off --head-bits off": {
        "format": ["onnx"],
        "vision_bits": 0,
        "embedding_bits": 0,
        "head_bits": 0,
    },
    "--format onnx --bits 8": {"format": ["onnx"], "bits": 8},
}


def headers(folder: Path, config: dict) -> int:
    """Write a checkpoint of this configuration without its weights. Returns their bytes."""
    folder.mkdir(parents=True)
    for name in COPIED:
        shutil.copyfile(REFERENCE_VLM / name, folder / name)
    tokenizer = AutoTokenizer.from_pretrained(REFERENCE_VLM)
    ids = {key: tokenizer.convert_tokens_to_ids(token) for key, token in SPECIAL_TOKENS.items()}
    (folder / "config.json").write_text(json.dumps(config | ids), "utf-8")
    return write_headers(folder / "model.safetensors", shapes(config | ids))


def write_headers(file: Path, shapes: Shapes) -> int:
    """Write a safetensors file of bfloat16 tensors without their bytes, whose number it returns."""
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as f:
        f.write(struct.pack("<Q", len(text)) + text)
        f.truncate(8 + len(text) + end)
    return end


def sizes(folder: Path, config: dict) -> dict[str, float]:
    """Flags → GB of what they write; and the source's own under an empty name."""
    found = {"": headers(folder, config) / 1e9}
    for flags, recipe in FLAGS.items():
        planned = plan(Recipe(model=str(folder), **recipe))
        assert not planned.refusals, planned.refusals
        found[flags] = sum(p.size_bytes for p in planned.formats.values()) / 1e9
    return found


def table() -> list[str]:
    """The lines of the table."""
    with tempfile.TemporaryDirectory() as scratch:
        found = [sizes(Path(scratch) / name, config) for name, config in MODELS.items()]
    lines = [f"| GB | {' | '.join(MODELS)} |", "|---" * (1 + len(MODELS)) + "|"]
    for flags in found[0]:
        name = f"`{flags}`" if flags else "the source, bf16"
        lines.append(f"| {name} | {' | '.join(f'{one[flags]:.1f}' for one in found)} |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
