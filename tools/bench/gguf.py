"""Ours against llama.cpp's own quantizer at the same bytes: the same type for every tensor, measured in llama.cpp.

    python -m tools.bench.gguf --out docs/gguf-quality --calibration SET0 --calibration SET1 --calibration SET2

Contenders, all on the bundled reference VLM with the types of one mix: `llama.cpp` (`ggml_quantize_chunk`, what
llama-quantize calls for each tensor) without an imatrix, with one from the calibration text, and with one from text and
images; and our solver on the same block types. KL to full precision at answer tokens and exact agreement of the next
token come from logits of llama.cpp itself, images through mtmd; `weights` is the KL of the decoded weights in float32,
which leaves out that llama.cpp rounds activations to 8 bits.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import statistics
import tempfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from tools.bench.quality import _source_weights as source_weights
from tools.bench.scoring import Scorer, batches, load_model
from vlmq_export import pipeline
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import runner
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.names import text_to_hub
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.text import write_text
from vlmq_export.formats.gguf.twin import copy_types
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.recipe import Recipe
from vlmq_export.reference import Reference, Weights

PEERS = ("llama.cpp", "llama.cpp + text imatrix", "llama.cpp + image imatrix")
OURS = ("gptq", "gptaq", "vlmq")
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M")
err = Console(stderr=True)


def energies(model: torch.nn.Module, samples: list[Sample]) -> dict[str, np.ndarray]:
    """Mean x² of every decoder linear's input columns over all tokens: hub name of the module → float32 [in]."""
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_module, args):
            square = args[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, 0) + square

        return hook

    named = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [m.register_forward_pre_hook(watch(f"model.{n}")) for n, m in named.items()]
    with torch.no_grad():
        for _, inputs in batches(samples):
            model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(s.input_ids) for s in samples)
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def without_images(row: Row) -> Row:
    messages = tuple({**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages)
    return replace(row, messages=messages, images=())


def quantized_by_ggml(weight: np.ndarray, kind: str, imatrix: np.ndarray | None) -> np.ndarray:
    """The bytes that llama-quantize writes: uint8 [out, row bytes]."""
    library = ctypes.CDLL(str(library_path()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    source = np.ascontiguousarray(weight, np.float32)
    raw = np.zeros((len(source), TYPES[kind].row_bytes(source.shape[1])), np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (source, raw)]
    given = None if imatrix is None else ctypes.c_void_p(imatrix.ctypes.data)
    counts = [ctypes.c_int64(n) for n in (0, *source.shape)]
    assert library.ggml_quantize_chunk(ctypes.c_int(TYPES[kind].id), *pointers, *counts, given) == raw.nbytes
    return raw


def ours(method: str, mix: str, samples: list[Sample], folder: Path) -> Artifact:
    recipe = Recipe(method=method, gguf_type=mix, format=["gguf"])
    checkpoint = Checkpoint(REFERENCE_VLM)
    config = pipeline.plan_of(recipe, checkpoint, None).model.config
    quantize(checkpoint, samples, config, folder / "artifact", name="reference-vlm", calibration={}, device="cpu")
    return Artifact(folder / "artifact")


def peer(shipped: Path, path: Path, imatrix: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A file of the same types with ggml's own blocks; returns what it decodes to by hub name."""
    checkpoint = Checkpoint(REFERENCE_VLM)
    hub = text_to_hub(checkpoint.config)

    def blocks(name: str, kind: str) -> np.ndarray | None:
        if kind.startswith(("F", "BF")):
            return None
        weight = checkpoint.tensor(hub[name]).float().numpy()
        return quantized_by_ggml(weight, kind, imatrix.get(hub[name].removesuffix(".weight")))

    copy_types(shipped, path, blocks)
    file = GGUFFile(path)
    return {hub[n]: np.array(file.array(n)) for n, t in file.tensors.items() if not t.type.startswith(("F", "BF"))}


def measured(text: Path, mmproj: Path, reference: Reference, scorer: Scorer) -> tuple[float, float]:
    """(KL at answer tokens, share of answer tokens whose most likely token agrees) of llama.cpp's own logits."""
    kl, agree = [], []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prompts = [runner.mtmd_prompt(reference, s, place, f"p{i}", logits=True) for i, s in enumerate(scorer.samples)]
        run = runner.run(place, text, mmproj, prompts, reference, 1, 0)
        for i, (sample, p) in enumerate(zip(scorer.samples, scorer.full)):
            logits = torch.from_numpy(np.array(run.logits(i)))[:, : reference.vocabulary]
            q = torch.full((len(sample.input_ids), p.shape[1]), -torch.inf)
            q[~sample.vision, : reference.vocabulary] = logits.log_softmax(-1)
            p = p[:, : reference.vocabulary].log_softmax(-1)
            answer = torch.nonzero(sample.answer[1:]).flatten()
            here, there = p[answer], q[answer, : reference.vocabulary]
            kl.append((here.exp() * (here - there)).sum(-1))
            agree.append((here.argmax(-1) == there.argmax(-1)).float())
    return float(torch.cat(kl).mean()), float(torch.cat(agree).mean())


def run_set(path: Path, mixes: list[str], methods: list[str], samples: int, scorer: Scorer, cache: Path) -> list[dict]:
    """Every contender on one calibration set; finished cells come from the cache."""
    preprocessor = Preprocessor(REFERENCE_VLM)
    rows = read_rows(path)[:samples]
    drawn = [preprocessor.sample(r) for r in rows]
    full = load_model(REFERENCE_VLM, source_weights())
    imatrices = {
        PEERS[0]: {},
        PEERS[1]: energies(full, [preprocessor.sample(without_images(r)) for r in rows]),
        PEERS[2]: energies(full, drawn),
    }
    cells = []
    for mix in mixes:
        with tempfile.TemporaryDirectory() as scratch:
            shipped, mmproj = None, Path(scratch) / "mmproj-x.gguf"
            for contender in [*methods, *PEERS]:
                key = hashlib.sha256(f"{path.resolve()} {samples} {len(scorer.rows)} {mix} {contender}".encode())
                done = cache / f"{key.hexdigest()[:16]}.json"
                folder = Path(scratch) / contender.replace(" ", "")
                if done.is_file() and contender not in methods[:1]:  # the first one's file lends its types and metadata
                    cells.append(json.loads(done.read_text("utf-8")))
                    continue
                folder.mkdir()
                text = folder / "text.gguf"
                if contender in methods:
                    artifact = ours(contender, mix, drawn, folder)
                    write_text(artifact, text, FormatOptions(name="reference-vlm"))
                    weights = dict(Weights(artifact.path).items())
                    if shipped is None:
                        shipped, reference = text, Reference(artifact.path, [])
                        write_mmproj(artifact, mmproj, "f32")
                else:
                    assert shipped is not None
                    weights = dict(source_weights()) | peer(shipped, text, imatrices[contender])
                if not done.is_file():
                    kl, agreement = measured(text, mmproj, reference, scorer)
                    score = scorer.score(load_model(REFERENCE_VLM, weights.items()))
                    cell = {
                        "contender": contender, "mix": mix, "calibration": path.name, "bytes": text.stat().st_size,
                        "kl": kl, "agreement": agreement, "kl_weights": score.kl, "exact": score.exact,
                    }  # fmt: skip
                    done.write_text(json.dumps(cell), "utf-8")
                cells.append(json.loads(done.read_text("utf-8")))
                c = cells[-1]
                err.print(
                    f"{path.stem} {mix} {contender}: KL {c['kl']:.2e} in llama.cpp, {c['kl_weights']:.2e} of the weights, {c['bytes']} bytes",
                    highlight=False,
                )
    return cells


def table(cells: list[dict], field: str) -> str:
    """Markdown, a row a contender and a column a mix: mean over the calibration sets, ± half their range."""
    by = defaultdict(list)
    for c in cells:
        by[c["contender"], c["mix"]].append(c[field])
    mixes = list(dict.fromkeys(c["mix"] for c in cells))
    lines = ["| | " + " | ".join(mixes) + " |", "|---" * (1 + len(mixes)) + "|"]
    for contender in dict.fromkeys(c["contender"] for c in cells):
        found = [by[contender, mix] for mix in mixes]
        row = [f"{statistics.fmean(v):.1e} ± {(max(v) - min(v)) / 2:.0e}" if v else "" for v in found]
        lines.append(f"| {contender} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json and OUT.md")] = None,
    cache: Annotated[Path, typer.Option(help="One JSON a cell")] = Path("out/gguf-quality"),
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one")] = None,
    mixes: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(MIXES),
    methods: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(OURS),
    samples: int = 512,
    rows: int = 512,
) -> None:
    """Run what is not in the cache, then print the tables."""
    logging.disable(logging.WARNING)
    cache.mkdir(parents=True, exist_ok=True)
    scorer = Scorer(REFERENCE_VLM, load_model(REFERENCE_VLM, source_weights()), read_rows(HELDOUT)[:rows])
    cells = []
    for path in calibration or [CALIBRATION]:
        cells += run_set(path, mixes.split(","), methods.split(","), samples, scorer, cache)
    text = f"KL in llama.cpp\n\n{table(cells, 'kl')}\nKL of the weights\n\n{table(cells, 'kl_weights')}"
    if out:
        out.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")
        out.with_suffix(".md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
