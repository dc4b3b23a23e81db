"""Ours against llama.cpp's own quantizer and AutoRound at the same bytes, measured in llama.cpp.

    python -m tools.bench.gguf --out docs/gguf-quality --page docs/gguf.md --calibration SET0 …
    AUTOROUND_PYTHON=… python -m tools.bench.gguf --contenders "AutoRound;exact;vlmq-paper" \\
        --mixes Q2_K_S,Q3_K_M,Q4_K_M

On each reference VLM every contender gives each tensor the type that the mix gives it. The
contenders are:

    vlmq                        the default: ours on the mix
    another method's name       the same with `--no-smooth`
    …, types by cost            a method with as many bits, spread by `--target-bpw`
    …, --no-smooth              the default method without scales of the channels
    …, rotated                  a method with `--rotate folded --no-smooth`
    llama.cpp                   `ggml_quantize_chunk`, which llama-quantize calls for each tensor,
                                without an imatrix
    llama.cpp + text imatrix    with one from the calibration text
    llama.cpp + image imatrix   with one from text and images: the full-precision model's inputs,
                                all tokens alike
    llama.cpp + our imatrix     with the very file that `--emit-imatrix` writes
    AutoRound                   its own GGUF export with its default iterations, or with none, which
                                it recommends for GGUF (peers.py)
    …, decoded to float32       the weights of any of these, without llama.cpp's rounding of
                                activations to 8 bits

KL to full precision at answer tokens and exact match are llama.cpp's own. Images go through mtmd,
all with one mmproj, but for a rotated model, which has its own. SmolVLM's are given as
the features of transformers' tower. The float32 file says how much of the KL is not quantization.

A cell is one contender with its figures. Every cell has a file in --cache, which is not run again,
and OUT.json keeps every cell there ever was. A cell is known by the name of its calibration file.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console

from tools.bench.gguf_results import (
    AUTOROUND,
    BY_COST,
    DECODED,
    DEFAULT,
    EMITTED,
    FLOOR,
    IMAGE,
    MIXES,
    OURS,
    PLAIN,
    ROTATED,
    TEXT,
    UNCALIBRATED,
    all_tables,
    draw,
)
from tools.bench.peers import peers
from tools.bench.scoring import Scorer, batches, load_model, source_weights
from tools.bench.tables import fill
from tools.reference_vlm import onevision, smolvlm
from vlmq_export.bundled import CALIBRATION, HELDOUT, REFERENCE_VLM
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.files import imatrix
from vlmq_export.formats.gguf.files.mmproj import write_mmproj
from vlmq_export.formats.gguf.files.text import write_text
from vlmq_export.formats.gguf.proof.twin_file import copy_container, copy_types, write_twin
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.runtime import runner
from vlmq_export.formats.gguf.runtime.llama import library_path
from vlmq_export.formats.gguf.runtime.prompts import Prompts
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.model_plan import with_kinds
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.planning.budget import budget_of
from vlmq_export.planning.target_bpw import measured_costs
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import Row, read_rows
from vlmq_export.quantizer.samples.sample import Sample
from vlmq_export.quantizer.type_budget.knapsack import choose
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import open_source

MODELS = {
    "Qwen2.5-VL": REFERENCE_VLM,
    "LLaVA-OneVision": onevision.FOLDER,
    "SmolVLM": smolvlm.BUILT,
}
# mtmd gives an image twice that SmolVLM's processor leaves whole (docs/gguf.md), and this model has
# learned from whole ones. So its prompts have the reference's own features in place of pixels.
GIVEN_FEATURES = ("idefics3",)
OPTIONS = FormatOptions(name="reference-vlm")
ANSWER = 12  # most tokens of a greedy answer
err = Console(stderr=True)


def energies(model: Any, samples: list[Sample]) -> dict[str, np.ndarray]:
    """The mean x² of every decoder linear's inputs over all tokens: hub name → float32 [in]."""
    family = Architecture.of(model.config.to_dict()).family
    sums: dict[str, torch.Tensor] = {}

    def add(name: str, _module, args) -> None:
        square = args[0].flatten(0, -2).double().square().sum(0)
        sums[name] = sums.get(name, 0) + square

    hooks = []
    decoder = family.module_name(family.layers).removesuffix("layers.")
    for name, module in model.get_decoder().named_modules():
        if isinstance(module, torch.nn.Linear):
            hub = family.hub_name(decoder + name)
            hooks.append(module.register_forward_pre_hook(partial(add, hub)))
    with torch.no_grad():
        for _, inputs in batches(samples):
            model(**inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    tokens = sum(len(s.input_ids) for s in samples)
    return {name: (total / tokens).float().numpy() for name, total in sums.items()}


def without_images(row: Row) -> Row:
    """The text of a row."""
    messages = tuple(
        {**m, "content": [p for p in m["content"] if p["type"] != "image"]} for m in row.messages
    )
    return replace(row, messages=messages, images=())


def quantized_by_ggml(
    weight: np.ndarray, kind: str, imatrix: np.ndarray | None = None
) -> np.ndarray:
    """The bytes that llama-quantize writes for weights [out, in]: uint8 [out, row bytes].

    imatrix: the importance of each column, float32 [in]; None: all alike. Raises RuntimeError for a
        type that cannot be written without.
    """
    library = ctypes.CDLL(str(library_path()))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_requires_imatrix.restype = ctypes.c_bool
    if imatrix is None and library.ggml_quantize_requires_imatrix(TYPES[kind].id):
        raise RuntimeError(f"llama.cpp's quantizer has no {kind} without an imatrix")
    source = np.ascontiguousarray(weight, np.float32)
    raw = np.zeros((len(source), TYPES[kind].row_bytes(source.shape[1])), np.uint8)
    pointers = [ctypes.c_void_p(x.ctypes.data) for x in (source, raw)]
    given = None if imatrix is None else ctypes.c_void_p(imatrix.ctypes.data)
    counts = [ctypes.c_int64(n) for n in (0, *source.shape)]
    number = ctypes.c_int(TYPES[kind].id)
    assert library.ggml_quantize_chunk(number, *pointers, *counts, given) == raw.nbytes
    return raw


class Calibrated:
    """One reference VLM on one calibration set, and how each contender is made from them."""

    def __init__(self, name: str, path: Path, count: int):
        self.name, self.model, self.path = name, MODELS[name], path
        self.checkpoint, self.preprocessor = Checkpoint(self.model), Preprocessor(self.model)
        self.rows = read_rows(path)[:count]
        self.samples = [self.preprocessor.sample(r) for r in self.rows]

    @cached_property
    def text_samples(self) -> list[Sample]:
        """The calibration samples without their images."""
        return [self.preprocessor.sample(without_images(r)) for r in self.rows]

    @cached_property
    def costs(self) -> dict[str, dict[str, tuple[int, float]]]:
        """Matrix → type → bits and KL, as --target-bpw measures them for any budget."""
        recipe = Recipe(model=str(self.model), target_bpw=2.5, format=["gguf"])
        plan = open_source(recipe.model).plan(recipe).model
        choices = budget_of(plan, recipe).choices
        given = plan, recipe, choices, self.checkpoint, self.samples
        return measured_costs(*given, 10**10, lambda *_: None)

    def energies(self, contender: str) -> dict[str, np.ndarray]:
        """The imatrix of a contender, from full-precision inputs: hub name → float32 [in]."""
        if contender == PLAIN:
            return {}
        given = self.text_samples if contender == TEXT else self.samples
        return energies(load_model(self.model, source_weights(self.model)), given)

    def emitted(self, mix: str, folder: Path) -> dict[str, np.ndarray]:
        """The imatrix that our default method emits with this mix, read as llama-quantize does."""
        import gguf

        artifact, file = self.ours("vlmq-paper", mix, folder), folder / imatrix.IMATRIX
        sums = imatrix.energies(artifact, Layout.of(artifact.architecture))
        imatrix.write_imatrix(file, sums, artifact.manifest.calibration)
        tensors = {str(t.name): t.data for t in gguf.GGUFReader(str(file)).tensors}
        found = {}
        for name, place in Layout.of(self.checkpoint.architecture).text.items():
            if f"{name}.in_sum2" in tensors:
                mean = tensors[f"{name}.in_sum2"][0] / tensors[f"{name}.counts"][0]
                found[place.hub.removesuffix(".weight")] = np.ascontiguousarray(mean)
        return found

    def ours(self, contender: str, mix: str, folder: Path) -> Artifact:
        """The artifact of a method on the types of a mix, or on as many bits spread by cost."""
        rotate = "folded" if contender.endswith(ROTATED) else "off"
        method, default = contender.partition(",")[0], contender.removesuffix(BY_COST) == DEFAULT
        recipe = Recipe(
            model=str(self.model),
            gguf_type=mix,
            format=["gguf"],
            method=method,
            rotate=rotate,
            smooth=None if default else False,
        )
        plan = open_source(recipe.model).plan(recipe).model
        if contender.endswith(BY_COST):
            sizes = {n: self.checkpoint.info(f"{n}.weight").shape for n in plan.config.types}
            bits = sum(
                8 * sizes[n][0] * TYPES[kind].row_bytes(sizes[n][1])
                for n, kind in plan.config.types.items()
            )
            plan = with_kinds(plan, choose(self.costs, bits))
        tokens = sum(len(s.input_ids) for s in self.samples)
        quantize(
            Checkpoint(self.model),
            self.samples,
            plan.config,
            folder / "artifact",
            name=OPTIONS.name,
            calibration={"file": self.path.name, "rows": len(self.rows), "tokens": tokens},
            device="cpu",
        )
        return Artifact(folder / "artifact")

    def autoround(self, contender: str, mix: str, folder: Path) -> Path:
        """AutoRound's text model.

        Its converter does not know LLaVA-OneVision. There it gets the decoder alone, and samples
        without images.
        """
        model, samples = self.model, self.samples
        if model == onevision.FOLDER:
            model, samples = folder / "decoder", self.text_samples
            peers.write_decoder(self.checkpoint, model)
        return peers.autoround_gguf(model, samples, mix, AUTOROUND[contender], folder / "autoround")

    def written(self, contender: str, mix: str, shipped: Path, folder: Path) -> Path:
        """A contender's text model, written below `folder`.

        shipped: a text model of the same mix, whose metadata and types others may take.
        """
        text = folder / "text.gguf"
        if contender.endswith(DECODED):
            twin, plain = folder / "twin.gguf", contender.removesuffix(DECODED)
            write_twin(self.written(plain, mix, shipped, folder), twin)
            return twin
        if contender in AUTOROUND:
            return self.autoround(contender, mix, folder)
        if contender == FLOOR:
            full_precision(self.model, shipped, text)
        elif contender.startswith(PLAIN):
            found = self.emitted(mix, folder) if contender == EMITTED else self.energies(contender)
            peer(self.model, shipped, text, found)
        else:
            artifact = self.ours(contender, mix, folder)
            write_text(artifact, Layout.of(artifact.architecture), text, OPTIONS)
        return text


def bits_per_weight(text: Path) -> float:
    """Bits per weight over all matrices of a file, the embedding included."""
    tensors = GGUFFile(text).tensors.values()
    matrices = [(t.shape, TYPES[t.type]) for t in tensors if len(t.shape) == 2]
    bits = sum(8 * rows * kind.row_bytes(columns) for (rows, columns), kind in matrices)
    return bits / sum(rows * columns for (rows, columns), _ in matrices)


def peer(model: Path, shipped: Path, path: Path, imatrix: dict[str, np.ndarray]) -> None:
    """Write a file with the types of `shipped` and ggml's own blocks."""
    checkpoint = Checkpoint(model)
    places = Layout.of(checkpoint.architecture).text

    def blocks(name: str, kind: str) -> np.ndarray | None:
        if kind.startswith(("F", "BF")):
            return None
        place = places[name]
        weight = place.of(checkpoint.tensor(place.hub)).float().numpy()
        return quantized_by_ggml(weight, kind, imatrix.get(place.hub.removesuffix(".weight")))

    copy_types(shipped, path, blocks)


def full_precision(model: Path, shipped: Path, path: Path) -> None:
    """Write a file with the source's own weights in float32."""
    checkpoint = Checkpoint(model)
    places = Layout.of(checkpoint.architecture).text

    def own(name: str, _values) -> np.ndarray:
        return places[name].of(checkpoint.tensor(places[name].hub)).float().numpy()

    copy_container(shipped, path, change=own)


def measured(text: Path, mmproj: Path, reference: Reference, scorer: Scorer) -> dict[str, float]:
    """KL and agreement at answer tokens, and exact match, of llama.cpp's logits and answers."""
    kl, agree = [], []
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        requests = Prompts(reference, Layout.of(reference.architecture), place)
        features = reference.architecture.model_type in GIVEN_FEATURES
        given = requests.exact if features else requests.mtmd
        prompts = [given(s, f"p{i}", logits=True) for i, s in enumerate(scorer.samples)]
        prompts += [given(s, f"a{i}", answer=ANSWER) for i, s in enumerate(scorer.prompts)]
        run = runner.run(place, text, mmproj, prompts, reference, 1, ANSWER)
        for i, (sample, p) in enumerate(zip(scorer.samples, scorer.full)):
            logits = torch.from_numpy(np.array(run.logits(i)))[:, : reference.vocabulary]
            here, there = _at_answer(sample, p[:, : reference.vocabulary], logits)
            kl.append((here.exp() * (here - there)).sum(-1))
            agree.append((here.argmax(-1) == there.argmax(-1)).float())
        decode = scorer.preprocessor.tokenizer.decode
        answers = run.prompts[len(scorer.samples) :]
        right = sum(
            decode(a["answer"], skip_special_tokens=True).strip() == r.answer
            for a, r in zip(answers, scorer.rows)
        )
    return {
        "kl": float(torch.cat(kl).mean()),
        "agreement": float(torch.cat(agree).mean()),
        "exact": right / len(scorer.rows),
    }


def _at_answer(
    sample: Sample,
    full: torch.Tensor,  # log-probabilities of full precision, [tokens, vocabulary]
    logits: torch.Tensor,  # llama.cpp's: mtmd has none at image tokens, [text tokens, vocabulary]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sides' log-probabilities of the answer's tokens, [answer tokens, vocabulary] each."""
    found = torch.full((len(sample.input_ids), logits.shape[1]), -torch.inf)
    everywhere = len(logits) == len(found)  # as where features are given
    found[slice(None) if everywhere else ~sample.vision] = logits.log_softmax(-1)
    answer = torch.nonzero(sample.answer[1:]).flatten()  # position t predicts token t+1
    return full.log_softmax(-1)[answer], found[answer]


def run_set(
    at: Calibrated,
    mixes: Sequence[str],
    contenders: Sequence[str],
    scorer: Scorer,
    cache: Path,
    first: bool,  # whether this is the first calibration set
) -> None:
    """Measure every contender that has no file in the cache; one that cannot be made is skipped."""
    for mix in mixes:
        with tempfile.TemporaryDirectory() as scratch:
            lent: Written | None = None
            for contender in contenders:
                sizes = f"{len(at.rows)} {len(scorer.rows)}"
                name = f"{at.name} {at.path.name} {sizes} {mix} {contender}"
                done = cache / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.json"
                if done.is_file() or (contender in UNCALIBRATED and not first):
                    continue
                lent = lent or Written.of(at.ours("rtn", mix, Path(scratch)), Path(scratch))
                folder = Path(scratch) / done.stem
                folder.mkdir()
                try:
                    if contender.endswith(ROTATED):
                        own = Written.of(at.ours(contender, mix, folder), folder)
                    else:
                        own = replace(lent, text=at.written(contender, mix, lent.text, folder))
                except RuntimeError as e:
                    err.print(f"{name}: {e}", highlight=False, markup=False)
                    continue
                cell = {
                    "model": at.name,
                    "contender": contender,
                    "mix": mix,
                    "calibration": at.path.name,
                    "samples": len(at.rows),
                    "rows": len(scorer.rows),
                    "bytes": own.text.stat().st_size,
                    "bits": bits_per_weight(own.text),
                    **measured(own.text, own.mmproj, own.reference, scorer),
                }
                done.write_text(json.dumps(cell), "utf-8")
                told = f"KL {cell['kl']:.2e}, exact {cell['exact']:.3f}"
                err.print(f"{name}: {told}", highlight=False)
                shutil.rmtree(folder)


@dataclass(frozen=True)
class Written:
    """What llama.cpp loads, and what its prompts are made with.

    All contenders on a mix but the rotated ones share mmproj and reference, and write only a text
    model with the types of this one.
    """

    text: Path
    mmproj: Path
    reference: Reference

    @classmethod
    def of(cls, artifact: Artifact, folder: Path) -> Written:
        """The files of an artifact, in `folder`."""
        layout, text, mmproj = Layout.of(artifact.architecture), "lent.gguf", "mmproj-lent.gguf"
        write_text(artifact, layout, folder / text, OPTIONS)
        write_mmproj(artifact, layout, folder / mmproj, "f32")
        return cls(folder / text, folder / mmproj, Reference(artifact.path, []))


def known_by(cell: dict) -> tuple:
    """What distinguishes a cell from all others."""
    return tuple(cell[key] for key in ("model", "calibration", "mix", "contender", "samples"))


def main(
    out: Annotated[
        Path | None, typer.Option(help="Adds the cells to OUT.json, and draws OUT.svg")
    ] = None,
    page: Annotated[
        Path | None, typer.Option(help="Renews the tables that this page asks for")
    ] = None,
    cache: Annotated[
        Path, typer.Option(help="One JSON a cell; a cell found there is not run again")
    ] = Path("out/gguf-quality"),
    calibration: Annotated[
        list[Path] | None, typer.Option(help="Calibration sets; default: the bundled one")
    ] = None,
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
        full = load_model(MODELS[name], source_weights(MODELS[name]))
        scorer = Scorer(MODELS[name], full, read_rows(HELDOUT)[:rows])
        for i, path in enumerate(calibration or [CALIBRATION]):
            at = Calibrated(name, path, samples)
            run_set(at, mixes.split(","), contenders.split(";"), scorer, cache, first=i == 0)
    found = json.loads(out.with_suffix(".json").read_text("utf-8")) if out else []
    found += [json.loads(f.read_text("utf-8")) for f in sorted(cache.glob("*.json"))]
    cells = {known_by(c): c for c in found}
    if out:
        ordered = sorted(cells.values(), key=lambda c: [str(part) for part in known_by(c)])
        out.with_suffix(".json").write_text(json.dumps(ordered, indent=1) + "\n", "utf-8")
        draw(ordered, out.with_suffix(".svg"))
    tables = all_tables(list(cells.values()))
    if page:
        fill(page, tables)
    for title, text in tables.items():
        if text.count("\n") > 1:
            print(f"{title}\n\n{text}\n")


if __name__ == "__main__":
    typer.run(main)
