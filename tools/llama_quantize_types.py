"""tests/data/llama_quantize_types.json: the type that stock llama-quantize gives each tensor, for every mix.

    python tools/llama_quantize_types.py LLAMA_QUANTIZE tests/data/llama_quantize_types.json

LLAMA_QUANTIZE is what tools/build_llama_quantize.sh makes. Models are empty but for their shapes: the choice depends on
names, layers, heads, row lengths and tied embeddings alone.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np

from vlmq_export.formats.gguf.imatrix import write_imatrix
from vlmq_export.formats.gguf.mix import MIXES
from vlmq_export.formats.gguf.read import GGUFFile

VOCABULARY = 64
SHAPES = (  # layers, heads, kv heads, hidden, MLP, tied
    (6, 4, 2, 256, 512, True),  # the reference VLM
    (28, 28, 4, 1792, 256, False),  # seven heads a group, as 7B models have
    (36, 16, 2, 512, 256, True),  # as 3B
    (24, 14, 2, 896, 512, True),  # rows of 896: no K-quant fits
)


def shapes(layers: int, heads: int, kv: int, hidden: int, mlp: int, tied: bool) -> dict[str, tuple[int, int]]:
    """Matrices by GGUF name, torch's order."""
    tensors = {"token_embd.weight": (VOCABULARY, hidden)} | ({} if tied else {"output.weight": (VOCABULARY, hidden)})
    narrow = (kv * hidden // heads, hidden)
    for i in range(layers):
        block = {"attn_q": (hidden, hidden), "attn_k": narrow, "attn_v": narrow, "attn_output": (hidden, hidden)}
        block |= {"ffn_gate": (mlp, hidden), "ffn_up": (mlp, hidden), "ffn_down": (hidden, mlp)}
        tensors |= {f"blk.{i}.{name}.weight": shape for name, shape in block.items()}
    return tensors


def write_model(path: Path, shape: tuple) -> None:
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
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        model, quantized = Path(scratch) / "model.gguf", Path(scratch) / "quantized.gguf"
        imatrix = Path(scratch) / "imatrix.gguf"
        for shape in SHAPES:
            write_model(model, shape)
            ones = {name: np.ones(size[1], np.float32) for name, size in shapes(*shape).items()}
            write_imatrix(imatrix, ones, {"file": "ones", "rows": 1, "tokens": 1})
            for mix in MIXES:
                given = ["--imatrix", str(imatrix)] if mix == "Q2_K_S" else []  # refused without one
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
