"""Makes tests/data/llama_quantize_types.json: the type that llama-quantize gives each tensor.

    python tools/llama_cpp/quantize_types.py LLAMA_QUANTIZE tests/data/llama_quantize_types.json

LLAMA_QUANTIZE is the unchanged program that tools/llama_cpp/build_quantize.sh builds. It is run
with every mix on models whose values mean nothing, because the choice of types depends on names,
layers, heads, row lengths and tied embeddings alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from vlmq_export.formats.gguf.files.imatrix import write_imatrix
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.types.mix import MIXES

VOCABULARY = 64
# Layers, heads, key-value heads, hidden_size, intermediate_size, and whether embeddings are tied.
SHAPES = (
    (6, 4, 2, 256, 512, True),  # the reference VLM
    (28, 28, 4, 1792, 256, False),  # seven heads for each key-value head, as 7B models have
    (36, 16, 2, 512, 256, True),  # as 3B models have
    (24, 14, 2, 896, 512, True),  # rows of 896, which no K-quant fits
)


def shapes(
    layers: int, heads: int, kv: int, hidden: int, mlp: int, tied: bool
) -> dict[str, tuple[int, int]]:
    """Every matrix by its GGUF name, [out, in]."""
    tensors = {"token_embd.weight": (VOCABULARY, hidden)}
    if not tied:
        tensors["output.weight"] = (VOCABULARY, hidden)
    narrow = (kv * hidden // heads, hidden)
    block = {
        "attn_q": (hidden, hidden),
        "attn_k": narrow,
        "attn_v": narrow,
        "attn_output": (hidden, hidden),
        "ffn_gate": (mlp, hidden),
        "ffn_up": (mlp, hidden),
        "ffn_down": (hidden, mlp),
    }
    for i in range(layers):
        tensors |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return tensors


def write_model(path: Path, shape: tuple[int, int, int, int, int, bool]) -> None:
    """Write a model of one of SHAPES, all of whose matrices hold one number."""
    layers, heads, kv, hidden, mlp, _ = shape
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_context_length(128)
    writer.add_block_count(layers)
    writer.add_embedding_length(hidden)
    writer.add_feed_forward_length(mlp)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([f"t{i}" for i in range(VOCABULARY)])
    writer.add_token_types([1] * VOCABULARY)
    writer.add_token_merges(["t 0"])
    tensors = {name: np.full(size, 0.01, np.float32) for name, size in shapes(*shape).items()}
    norms = [f"blk.{i}.{n}.weight" for i in range(layers) for n in ("attn_norm", "ffn_norm")]
    tensors |= {name: np.ones(hidden, np.float32) for name in [*norms, "output_norm.weight"]}
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(binary: str, out: str) -> None:
    """Run llama-quantize on every shape with every mix, and write a row for each."""
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, quantized = Path(scratch) / "model.gguf", Path(scratch) / "quantized.gguf"
        imatrix = Path(scratch) / "imatrix.gguf"
        for shape in SHAPES:
            write_model(model, shape)
            ones = {name: np.ones(size[1], np.float32) for name, size in shapes(*shape).items()}
            write_imatrix(imatrix, ones, {"file": "ones", "rows": 1, "tokens": 1})
            for mix in MIXES:
                # llama-quantize refuses Q2_K_S without an imatrix. Its rules for the I-quants are
                # others with one than without; ours are those with one.
                wants = mix == "Q2_K_S" or mix.startswith("IQ")
                given = ["--imatrix", str(imatrix)] if wants else []
                command = [binary, *given, str(model), str(quantized), mix, "1"]
                done = subprocess.run(command, capture_output=True, text=True)
                if done.returncode:
                    sys.exit(done.stderr or done.stdout)
                found = GGUFFile(quantized).tensors
                types = [found[name].type for name in shapes(*shape)]
                rows.append({"shape": shape, "mix": mix, "types": types})
    lines = ",\n".join(json.dumps(row, separators=(",", ":")) for row in rows)
    Path(out).write_text(f"[{lines}]\n", "utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
