"""Ours against llama.cpp's own quantizer and AutoRound at the same bytes, everything measured in llama.cpp.

    python -m tools.bench.gguf --out docs/gguf-quality --page docs/gguf.md --calibration SET0 --calibration SET1 …
    AUTOROUND_PYTHON=… python -m tools.bench.gguf --contenders "AutoRound;exact;vlmq" --mixes Q2_K_S,Q3_K_M,Q4_K_M

On both reference VLMs, one type for each tensor for all, as the mix has it:

- ours: a method's name, or with `, types by cost` as many bits spread by `--target-bpw`;
- `llama.cpp`: `ggml_quantize_chunk`, which llama-quantize calls for each tensor, without an imatrix, with one from the
  calibration text, from text and images (the full-precision model's inputs, all tokens alike), or with the very file that
  `--emit-imatrix` writes;
- any of these `, decoded to float32`: its weights without llama.cpp's rounding of activations to 8 bits;
- `AutoRound`: its own GGUF export, with its default iterations or with none, which it recommends for GGUF (peers.py).

KL to full precision at answer tokens and exact match are of llama.cpp itself, images through mtmd, all with one mmproj;
the float32 file says what of that is not quantization. Every cell has a file in --cache, which is not run again, and
OUT.json keeps every cell there ever was. Cells are known by the name of the calibration file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from rich.console import Console

from tools.bench import peers
from tools.bench.scoring import Scorer, batches, load_model, source_weights
from tools.bench.tables import fill, table
from tools.reference_vlm import onevision
from vlmq_export import pipeline
from vlmq_export.budget import measured_costs
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.base import FormatOptions
from vlmq_export.formats.gguf import imatrix, runner
from vlmq_export.formats.gguf.llama import library_path
from vlmq_export.formats.gguf.mmproj import write_mmproj
from vlmq_export.formats.gguf.names import text_to_hub
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.text import write_text
from vlmq_export.formats.gguf.twin import copy_container, copy_types, write_twin
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.plan import with_types
from vlmq_export.quantizer import budget
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.calibration import Preprocessor, Row, Sample, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.quantize import quantize
from vlmq_export.recipe import Recipe
from vlmq_export.reference import Reference

OURS = ("exact", "exact, types by cost", "vlmq", "vlmq, types by cost")
PLAIN, TEXT, IMAGE, EMITTED = (
    "llama.cpp", "llama.cpp + text imatrix", "llama.cpp + image imatrix", "llama.cpp + our imatrix",
)  # fmt: skip
AUTOROUND = {"AutoRound": None, "AutoRound, 0 iterations": 0}  # iterations; None: its default, 200
FLOOR = "full precision, float32 file"  # what is left of KL where nothing is quantized: llama.cpp's own deviations
UNCALIBRATED = (FLOOR, PLAIN)  # the same for every calibration set: run on the first
MIXES = ("Q2_K", "Q3_K_M", "Q4_K_M")
MODELS = {"Qwen2.5-VL": REFERENCE_VLM, "LLaVA-OneVision": onevision.FOLDER}
BY_COST = ", types by cost"
DECODED = ", decoded to float32"
OPTIONS = FormatOptions(name="reference-vlm")
ANSWER = 12  # tokens of a greedy answer
err = Console(stderr=True)


def energies(model: torch.nn.Module, samples: list[Sample]) -> dict[str, np.ndarray]:
    """Mean x² of every decoder linear's input columns over all tokens: hub name of the module → float32 [in]."""
    family = family_of(model.config.to_dict())
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str):
        def hook(_module, args):
            square = args[0].flatten(0, -2).double().square().sum(0)
            sums[name] = sums.get(name, 0) + square

        return hook

    named = {n: m for n, m in model.model.language_model.named_modules() if isinstance(m, torch.nn.Linear)}
    hooks = [m.register_forward_pre_hook(watch(family.hub_name(f"model.language_model.{n}"))) for n, m in named.items()]
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


class Calibrated:
    """A reference on one calibration set, and what its contenders share."""

    def __init__(self, name: str, path: Path, count: int):
        self.name, self.model, self.path = name, MODELS[name], path
        self.checkpoint, self.preprocessor = Checkpoint(self.model), Preprocessor(self.model)
        self.rows = read_rows(path)[:count]
        self.samples = [self.preprocessor.sample(r) for r in self.rows]

    @cached_property
    def text_samples(self) -> list[Sample]:
        return [self.preprocessor.sample(without_images(r)) for r in self.rows]

    @cached_property
    def costs(self) -> dict[str, dict[str, tuple[int, float]]]:
        """matrix → type → (bits, KL), as --target-bpw measures it; the same for every budget."""
        recipe = Recipe(model=str(self.model), gguf_type=MIXES[0], format=["gguf"])
        plan = pipeline.plan_of(recipe, self.checkpoint, None).model
        return measured_costs(plan, recipe, self.checkpoint, self.samples, 10**10, lambda *_: None)

    def energies(self, contender: str) -> dict[str, np.ndarray]:
        """The imatrix of a contender by hub module, of full-precision inputs."""
        if contender == PLAIN:
            return {}
        given = self.text_samples if contender == TEXT else self.samples
        return energies(load_model(self.model, source_weights(self.model)), given)

    def emitted(self, mix: str, folder: Path) -> dict[str, np.ndarray]:
        """The imatrix that our default method emits with this mix, as llama-quantize reads it from the file."""
        import gguf

        artifact, file = self.ours("vlmq", mix, folder), folder / imatrix.IMATRIX
        imatrix.write_imatrix(file, imatrix.energies(artifact), artifact.manifest.calibration)
        tensors = {str(t.name): t.data for t in gguf.GGUFReader(str(file)).tensors}
        return {
            hub.removesuffix(".weight"): np.ascontiguousarray(tensors[f"{n}.in_sum2"][0] / tensors[f"{n}.counts"][0])
            for n, hub in text_to_hub(self.checkpoint.config).items()
            if f"{n}.in_sum2" in tensors
        }

    def ours(self, contender: str, mix: str, folder: Path) -> Artifact:
        """A method on the types of a mix, or on as many bits spread by measured cost."""
        recipe = Recipe(model=str(self.model), gguf_type=mix, format=["gguf"])
        plan = pipeline.plan_of(recipe, self.checkpoint, None).model
        if contender.endswith(BY_COST):
            sizes = {n: self.checkpoint.info(f"{n}.weight").shape for n in plan.config.types}
            bits = sum(8 * sizes[n][0] * TYPES[kind].row_bytes(sizes[n][1]) for n, kind in plan.config.types.items())
            plan = with_types(plan, budget.choose(self.costs, bits))
        config = replace(plan.config, method=contender.removesuffix(BY_COST))
        told = {"file": self.path.name, "rows": len(self.rows), "tokens": sum(len(s.input_ids) for s in self.samples)}
        made = folder / "artifact"
        quantize(self.checkpoint, self.samples, config, made, name=OPTIONS.name, calibration=told, device="cpu")
        return Artifact(made)

    def autoround(self, contender: str, mix: str, folder: Path) -> Path:
        """AutoRound's file. Its converter knows no LLaVA-OneVision: there the decoder alone, which takes no images."""
        model, samples = self.model, self.samples
        if model == onevision.FOLDER:
            model, samples = folder / "decoder", self.text_samples
            peers.write_decoder(self.checkpoint, model)
        return peers.autoround_gguf(model, samples, mix, AUTOROUND[contender], folder / "autoround")

    def written(self, contender: str, mix: str, shipped: Path, folder: Path) -> Path:
        """A contender's text model, written below `folder`; `shipped` lends metadata and types where it needs them."""
        text = folder / "text.gguf"
        if contender.endswith(DECODED):
            write_twin(self.written(contender.removesuffix(DECODED), mix, shipped, folder), folder / "twin.gguf")
            return folder / "twin.gguf"
        if contender in AUTOROUND:
            return self.autoround(contender, mix, folder)
        if contender == FLOOR:
            full_precision(self.model, shipped, text)
        elif contender.startswith(PLAIN):
            found = self.emitted(mix, folder) if contender == EMITTED else self.energies(contender)
            peer(self.model, shipped, text, found)
        else:
            write_text(self.ours(contender, mix, folder), text, OPTIONS)
        return text


def bits_per_weight(text: Path) -> float:
    """Of all matrices of a file, the embedding included."""
    matrices = [(t.shape, TYPES[t.type]) for t in GGUFFile(text).tensors.values() if len(t.shape) == 2]
    bits = sum(8 * rows * kind.row_bytes(columns) for (rows, columns), kind in matrices)
    return bits / sum(rows * columns for (rows, columns), _ in matrices)


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
    at: Calibrated, mixes: Sequence[str], contenders: Sequence[str], scorer: Scorer, cache: Path, first: bool
) -> None:
    """Every contender that has no file in the cache."""
    for mix in mixes:
        with tempfile.TemporaryDirectory() as scratch:
            lent = None  # a file with the types of the mix, its mmproj, and the reference that prompts are made with
            for contender in contenders:
                name = f"{at.name} {at.path.name} {len(at.rows)} {len(scorer.rows)} {mix} {contender}"
                done = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
                if done.is_file() or (contender in UNCALIBRATED and not first):
                    continue
                lent = lent or _lend(at, mix, Path(scratch))
                shipped, mmproj, reference = lent
                folder = Path(scratch) / done.stem
                folder.mkdir()
                try:
                    text = at.written(contender, mix, shipped, folder)
                except RuntimeError as e:
                    err.print(f"{name}: {e}", highlight=False, markup=False)
                    continue
                cell = {"model": at.name, "contender": contender, "mix": mix, "calibration": at.path.name}
                cell |= {"samples": len(at.rows), "rows": len(scorer.rows), "bytes": text.stat().st_size}
                cell |= {"bits": bits_per_weight(text)} | measured(text, mmproj, reference, scorer)
                done.write_text(json.dumps(cell), "utf-8")
                err.print(f"{name}: KL {cell['kl']:.2e}, exact {cell['exact']:.3f}", highlight=False)
                shutil.rmtree(folder)


def _lend(at: Calibrated, mix: str, scratch: Path) -> tuple[Path, Path, Reference]:
    artifact = at.ours("rtn", mix, scratch)
    shipped, mmproj = scratch / "lent.gguf", scratch / "mmproj-lent.gguf"
    write_text(artifact, shipped, OPTIONS)
    write_mmproj(artifact, mmproj, "f32")
    return shipped, mmproj, Reference(artifact.path, [])


def known_by(cell: dict) -> tuple:
    """What tells a cell from all others."""
    return tuple(cell[key] for key in ("model", "calibration", "mix", "contender", "samples"))


def all_tables(cells: list[dict]) -> dict[str, str]:
    """NAME of a table → markdown: `FIELD MODEL`, a row a contender and a column a mix; AutoRound's beside ours apart.

    `ratio`: KL as a share of llama.cpp's with the image imatrix of the same set.
    """
    base = {(c["model"], c["mix"], c["calibration"]): c["kl"] for c in cells if c["contender"] == IMAGE}
    cells = [
        c | {"ratio": c["kl"] / k if (k := base.get((c["model"], c["mix"], c["calibration"]))) else None} for c in cells
    ]
    order = ("Q2_K_S", *MIXES, FLOOR, *OURS, *AUTOROUND, PLAIN, TEXT, EMITTED, IMAGE)
    tables = {}
    for model in MODELS:
        own = [c for c in cells if c["model"] == model and c["contender"] != FLOOR]
        tables[f"decoded kl {model}"] = table(
            [c for c in own if c["contender"].endswith(DECODED)], "contender", "mix", "kl", order
        )
        own = [c for c in own if not c["contender"].endswith(DECODED)]
        mixed = [c for c in own if c["mix"] in MIXES and c["contender"] not in AUTOROUND]
        beside = [c for c in own if c["contender"] in (*OURS, *AUTOROUND, IMAGE)]
        beside = [c for c in beside if any(_alike(c, other) for other in beside if other["contender"] in AUTOROUND)]
        for field in ("kl", "exact", "ratio", "bits"):
            tables[f"{field} {model}"] = table(mixed, "contender", "mix", field, order)
            tables[f"AutoRound {field} {model}"] = table(beside, "contender", "mix", field, order)
    return tables


def _alike(cell: dict, other: dict) -> bool:
    """Of the same calibration samples, on the same types."""
    return all(cell[key] == other[key] for key in ("mix", "calibration", "samples"))


def main(
    out: Annotated[Path | None, typer.Option(help="Adds the cells to OUT.json")] = None,
    page: Annotated[Path | None, typer.Option(help="Renews the tables that this page asks for")] = None,
    cache: Annotated[Path, typer.Option(help="One JSON a cell; a cell found there is not run again")] = Path(
        "out/gguf-quality"
    ),
    calibration: Annotated[list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one")] = None,
    models: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(MODELS),
    mixes: Annotated[str, typer.Option(help="Comma-separated")] = ",".join(MIXES),
    contenders: Annotated[str, typer.Option(help="Separated by semicolons")] = ";".join(
        (FLOOR, *OURS, PLAIN, TEXT, IMAGE)
    ),
    samples: int = 128,
    rows: int = 128,
) -> None:
    """Run what is not in the cache, then print the tables."""
    logging.disable(logging.WARNING)
    cache.mkdir(parents=True, exist_ok=True)
    for name in models.split(",") if mixes and contenders else []:
        scorer = Scorer(MODELS[name], load_model(MODELS[name], source_weights(MODELS[name])), read_rows(HELDOUT)[:rows])
        for i, path in enumerate(calibration or [CALIBRATION]):
            at = Calibrated(name, path, samples)
            run_set(at, mixes.split(","), contenders.split(";"), scorer, cache, first=i == 0)
    cells = json.loads(out.with_suffix(".json").read_text("utf-8")) if out else []
    cells = {
        known_by(c): c for c in [*cells, *(json.loads(f.read_text("utf-8")) for f in sorted(cache.glob("*.json")))]
    }
    if out:
        ordered = sorted(cells.values(), key=lambda c: [str(part) for part in known_by(c)])
        out.with_suffix(".json").write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
    tables = all_tables(list(cells.values()))
    if page:
        fill(page, tables)
    for title, text in tables.items():
        if text.count("\n") > 1:
            print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
