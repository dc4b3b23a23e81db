"""Ours against llama.cpp's own quantizer at the same bytes: the same type for every tensor, measured in llama.cpp.

    python -m tools.bench.gguf --out docs/gguf-quality --calibration SET0 --calibration SET1 --calibration SET2

Both reference VLMs, the types of one mix for all: `llama.cpp` (`ggml_quantize_chunk`, what llama-quantize calls for each
tensor) without an imatrix, with one from the calibration text, and with one from text and images; our solver on the same
block types; and `types by cost`, as many bits spread by `--target-bpw`. KL to full precision at answer tokens and exact
match are of llama.cpp itself, images through mtmd; the float32 file says what of that is not quantization.
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

from tools.bench.scoring import Scorer, batches, load_model, source_weights
from tools.reference_vlm import onevision
from vlmq_export import pipeline
from vlmq_export.budget import measured_types
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import runner
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.names import text_to_hub
from vlmq_export.formats.gguf.text import write_text
from vlmq_export.formats.gguf.twin import copy_container, copy_types
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.plan import with_types
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.recipe import Recipe
from vlmq_export.reference import Reference

PEERS = ("llama.cpp", "llama.cpp + text imatrix", "llama.cpp + image imatrix")
OURS = ("exact", "exact, types by cost", "vlmq")
FLOOR = "full precision, float32 file"  # what is left of KL where nothing is quantized: llama.cpp's own deviations
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M")
MODELS = {"Qwen2.5-VL": REFERENCE_VLM, "LLaVA-OneVision": onevision.FOLDER}
ANSWER = 12  # tokens of a greedy answer
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


def ours(model: Path, contender: str, mix: str, samples: list[Sample], folder: Path) -> Artifact:
    """A method on the types of a mix, or on as many bits spread by measured cost."""
    method, _, by_cost = contender.partition(", ")
    checkpoint, recipe = Checkpoint(model), Recipe(model=str(model), gguf_type=mix, format=["gguf"])
    plan = pipeline.plan_of(recipe, checkpoint, None).model
    if by_cost:
        bits, total = size_of(plan.config.types, checkpoint)
        budget = Recipe(model=str(model), target_bpw=bits / total * (1 + 1e-12), format=["gguf"])
        types = measured_types(plan, budget, checkpoint, samples, 10**10, lambda *_: None)
        plan = with_types(plan, types)
    config = replace(plan.config, method=method)
    quantize(checkpoint, samples, config, folder / "artifact", name="reference-vlm", calibration={}, device="cpu")
    return Artifact(folder / "artifact")


def size_of(types: dict[str, str], checkpoint: Checkpoint) -> tuple[int, int]:
    """(bits, weights) of the matrices with these types."""
    shapes = {name: checkpoint.info(f"{name}.weight").shape for name in types}
    return sum(8 * rows * TYPES[types[n]].row_bytes(k) for n, (rows, k) in shapes.items()), sum(
        rows * k for rows, k in shapes.values()
    )


def peer(model: Path, shipped: Path, path: Path, imatrix: dict[str, np.ndarray]) -> None:
    """A file of the same types with ggml's own blocks."""
    checkpoint = Checkpoint(model)
    hub = text_to_hub(checkpoint.config)

    def blocks(name: str, kind: str) -> np.ndarray | None:
        if kind.startswith(("F", "BF")):
            return None
        weight = checkpoint.tensor(hub[name]).float().numpy()
        return quantized_by_ggml(weight, kind, imatrix.get(hub[name].removesuffix(".weight")))

    copy_types(shipped, path, blocks)


def full_precision(model: Path, shipped: Path, path: Path) -> None:
    """The source's own weights in float32."""
    checkpoint = Checkpoint(model)
    hub = text_to_hub(checkpoint.config)
    copy_container(shipped, path, change=lambda name, _: checkpoint.tensor(hub[name]).float().numpy())


def measured(text: Path, mmproj: Path, reference: Reference, scorer: Scorer) -> dict[str, float]:
    """Of llama.cpp's own logits and greedy answers: KL and agreement at answer tokens, and exact match."""
    kl, agree, right = [], [], 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        prompts = [runner.mtmd_prompt(reference, s, place, f"p{i}", logits=True) for i, s in enumerate(scorer.samples)]
        prompts += [
            runner.mtmd_prompt(reference, s, place, f"a{i}", answer=ANSWER) for i, s in enumerate(scorer.prompts)
        ]
        run = runner.run(place, text, mmproj, prompts, reference, 1, ANSWER)
        for i, (sample, p) in enumerate(zip(scorer.samples, scorer.full)):
            logits = torch.from_numpy(np.array(run.logits(i)))[:, : reference.vocabulary]
            q = torch.full((len(sample.input_ids), p.shape[1]), -torch.inf)
            q[~sample.vision, : reference.vocabulary] = logits.log_softmax(-1)
            p = p[:, : reference.vocabulary].log_softmax(-1)
            answer = torch.nonzero(sample.answer[1:]).flatten()
            here, there = p[answer], q[answer, : reference.vocabulary]
            kl.append((here.exp() * (here - there)).sum(-1))
            agree.append((here.argmax(-1) == there.argmax(-1)).float())
        decode = scorer.preprocessor.tokenizer.decode
        answers = run.prompts[len(scorer.samples) :]
        right = sum(
            decode(a["answer"], skip_special_tokens=True).strip() == r.answer for a, r in zip(answers, scorer.rows)
        )
    return {
        "kl": float(torch.cat(kl).mean()), "agreement": float(torch.cat(agree).mean()), "exact": right / len(scorer.rows)
    }  # fmt: skip


def run_set(
    name: str, path: Path, mixes: list[str], methods: list[str], samples: int, scorer: Scorer, cache: Path
) -> list[dict]:
    """Every contender on one model and calibration set; finished cells come from the cache."""
    model, preprocessor = MODELS[name], Preprocessor(MODELS[name])
    rows = read_rows(path)[:samples]
    drawn = [preprocessor.sample(r) for r in rows]
    imatrices: dict[str, dict] = {}

    def imatrix(contender: str) -> dict[str, np.ndarray]:
        if contender not in imatrices:
            given = [preprocessor.sample(without_images(r)) for r in rows] if "text" in contender else drawn
            plain = contender == PEERS[0]
            imatrices[contender] = {} if plain else energies(load_model(model, source_weights(model)), given)
        return imatrices[contender]

    cells = []
    for mix in mixes:
        with tempfile.TemporaryDirectory() as scratch:
            lent = None  # a file with the types of the mix, its mmproj, and the reference that prompts are made with
            for contender in [*([FLOOR] if mix == mixes[0] else []), *methods, *PEERS]:
                key = hashlib.sha256(f"{name} {path.name} {samples} {len(scorer.rows)} {mix} {contender}".encode())
                done = cache / f"{key.hexdigest()[:16]}.json"
                if not done.is_file():
                    lent = lent or _lend(model, mix, Path(scratch))
                    shipped, mmproj, reference = lent
                    folder = Path(scratch) / key.hexdigest()[:16]
                    folder.mkdir()
                    text = folder / "text.gguf"
                    if contender in methods:
                        write_text(
                            ours(model, contender, mix, drawn, folder), text, FormatOptions(name="reference-vlm")
                        )
                    elif contender == FLOOR:
                        full_precision(model, shipped, text)
                    else:
                        peer(model, shipped, text, imatrix(contender))
                    cell = {"model": name, "contender": contender, "mix": mix, "calibration": path.name}
                    cell |= {"samples": samples, "bytes": text.stat().st_size}
                    done.write_text(json.dumps(cell | measured(text, mmproj, reference, scorer)), "utf-8")
                cells.append(c := json.loads(done.read_text("utf-8")))
                err.print(
                    f"{name} {path.stem} {mix} {contender}: KL {c['kl']:.2e}, exact {c['exact']:.3f}, {c['bytes']} bytes",
                    highlight=False,
                )
    return cells


def _lend(model: Path, mix: str, scratch: Path) -> tuple[Path, Path, Reference]:
    artifact = ours(model, "rtn", mix, [], scratch)
    shipped, mmproj = scratch / "lent.gguf", scratch / "mmproj-lent.gguf"
    write_text(artifact, shipped, FormatOptions(name="reference-vlm"))
    write_mmproj(artifact, mmproj, "f32")
    return shipped, mmproj, Reference(artifact.path, [])


def table(cells: list[dict], field: str, digits: str = ".1e") -> str:
    """Markdown, a row a contender and a column a mix: mean over the calibration sets, ± half their range."""
    by = defaultdict(list)
    for c in cells:
        by[c["contender"], c["mix"]].append(c[field])
    mixes = list(dict.fromkeys(c["mix"] for c in cells))
    lines = ["| | " + " | ".join(mixes) + " |", "|---" * (1 + len(mixes)) + "|"]
    for contender in dict.fromkeys(c["contender"] for c in cells):
        found = [by[contender, mix] for mix in mixes]
        row = [f"{statistics.fmean(v):{digits}} ± {(max(v) - min(v)) / 2:{digits}}" if v else "" for v in found]
        lines.append(f"| {contender} | " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def main(
    out: Annotated[Path | None, typer.Option(help="Writes OUT.json and OUT.md")] = None,
    cache: Annotated[Path, typer.Option(help="One JSON a cell")] = Path("out/gguf-quality"),
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one")] = None,
    models: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(MODELS),
    mixes: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(MIXES),
    methods: Annotated[str, typer.Option(help="Separated by semicolons")] = ";".join(OURS),
    samples: int = 512,
    rows: int = 512,
) -> None:
    """Run what is not in the cache, then print the tables."""
    logging.disable(logging.WARNING)
    cache.mkdir(parents=True, exist_ok=True)
    texts, cells = [], []
    for name in models.split(","):
        scorer = Scorer(MODELS[name], load_model(MODELS[name], source_weights(MODELS[name])), read_rows(HELDOUT)[:rows])
        found = []
        for path in calibration or [CALIBRATION]:
            found += run_set(name, path, mixes.split(","), methods.split(";"), samples, scorer, cache)
        cells += found
        texts.append(f"{name}: KL in llama.cpp\n\n{table(found, 'kl')}\n")
        texts.append(
            f"Exact match in llama.cpp (transformers, full precision: {scorer.baseline.exact:.3f})\n\n{table(found, 'exact', '.3f')}\n"
        )
    if out:
        out.with_suffix(".json").write_text(json.dumps(cells, indent=1) + "\n")
        out.with_suffix(".md").write_text("".join(texts))
    print("".join(texts))


if __name__ == "__main__":
    typer.run(main)
