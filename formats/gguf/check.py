"""The proof of a GGUF export in llama.cpp itself, on the CPU.

    L1  every weight of both files, by three readers, bit for bit; metadata and names complete
    L2  every product of the real run against the emulated activation rounding, worst row ≤ 3e-7
    L3  the float32 twin of the shipped file ≤ 5e-6 on text and on images fed as the reference's vision features, where
        names, biases and rope show; and the shipped file with images through mtmd, where activations are rounded to
        8 bits and only a sanity bound is possible

A perfect block-type file is 1e-2 away from a float32 model in its logits and a wrong scale moves them by 1e-5, so no
bound on the shipped file's logits could find it: L1, L2 and the twin carry the proof.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError, MissingRuntime
from vlmq_export.formats.base import Check, CheckSettings, FormatOptions, answers_row, compare_weights, relative_error
from vlmq_export.formats.gguf import deviations, emulate, rounding, runner
from vlmq_export.quantizer.calibration import Sample
from vlmq_export.reference import Reference

# Each ten times or more above what a right file gives and below what one wrong fp16 scale gives (docs/verification.md).
E_ROW = 3e-7  # right: 5e-8; one scale by one ulp: 3e-6 at 1024 columns
TWIN = 5e-6  # right: 1e-6
EMBEDDING = {"f32": 2e-3, "f16": 2.5e-3, "q8_0": 5e-2}  # right: 6e-4, f16 adds up to 5e-4, q8_0 gives 2e-2
_EMBEDDING_WHY = {
    "f32": "llama.cpp rounds pixels to fp16 and takes GELU from a table",
    "f16": "llama.cpp rounds pixels to fp16 and takes GELU from a table; f16 weights add 5e-4",
    "q8_0": "sanity only: activations are rounded to 8 bits; L1 and L2 hold the weights",
}
SHIPPED = 5e-2  # right: 2e-2 to 3e-2, by 8-bit activations alone
ROUNDED = 1.25  # times what that rounding costs the model in emulation, where it costs more (measured 0.96 to 1.13)
ANSWER = 16  # most tokens of a greedy answer
TEXT_PROMPTS = 8
SMALL = 2**28  # bytes: llama.cpp's threads spin at every barrier, and on models below this cost more than they give

_gate = partial(Check.at_most, "gguf")
_LATER = (("L2", "every product"), ("L3", "shipped file through mtmd"), ("L3", "float32 twin"))


def check(folder: Path, reference: Reference, options: FormatOptions, settings: CheckSettings) -> list[Check]:
    """All rows. What cannot run says so; a file that llama.cpp refuses is a failed row, never an exception."""
    from vlmq_export.formats.gguf import missing

    if absent := missing():
        why = f"{absent} not installed; pip install 'vlmq-export[gguf]'"
        return [Check.not_run("gguf", level, name, why) for level, name in (("L1", "weights"), *_LATER)]
    try:
        files = _Files.open(Path(folder), reference)
        rows = [_complete(files, reference), *_weights(files, reference)]
    except FormatError as e:
        return [_failed("L1", "files", str(e))]
    if reference.too_large:
        return rows + [Check.not_run("gguf", level, name, reference.too_large) for level, name in _LATER]
    if not any(s.images for s in reference.prompts):
        why = "no held-out prompt has an image; give --verify-data with images"
        return rows + [Check.not_run("gguf", level, name, why) for level, name in _LATER]
    with tempfile.TemporaryDirectory(prefix="vlmq-gguf-") as scratch:
        for step, later in ((_shipped, _LATER[:2]), (_twin, _LATER[2:])):
            place = Path(scratch) / step.__name__
            place.mkdir()
            try:
                rows += step(files, reference, settings, place)
            except MissingRuntime as e:
                rows += [Check.not_run("gguf", level, name, str(e)) for level, name in later]
            except (runner.RunFailed, FormatError) as e:
                rows += [_failed(level, name, str(e)) for level, name in later]
    return rows


def _failed(level: str, name: str, why: str) -> Check:
    return Check("gguf", level, name, "failed", detail=why)


@dataclass(frozen=True)
class _Files:
    text: Path
    mmproj: Path
    hub: dict[str, str]  # GGUF name → hub name, text model only
    types: dict[str, str]  # GGUF name → type, both files
    mmproj_dtype: str  # of its linears
    class_row: str  # where its class token's position row is; last where it has none

    @classmethod
    def open(cls, folder: Path, reference: Reference) -> _Files:
        from vlmq_export.formats.gguf.mmproj import CLASS_ROW
        from vlmq_export.formats.gguf.names import text_to_hub
        from vlmq_export.formats.gguf.read import GGUFFile, find_files

        text, mmproj = find_files(folder)
        tower = GGUFFile(mmproj)
        vision = {name: t.type for name, t in tower.tensors.items()}
        types = {name: t.type for name, t in GGUFFile(text).tensors.items()} | vision
        dtype = next((t.lower() for t in ("Q8_0", "F16") if t in vision.values()), "f32")
        row = str(tower.metadata.get(CLASS_ROW, "last"))
        return cls(text, mmproj, text_to_hub(reference.config), types, dtype, row)

    def tower(self, reference: Reference) -> Iterator[tuple[str, np.ndarray]]:
        """What a reader must find in the mmproj."""
        from vlmq_export.formats.gguf.names import expected_mmproj

        return expected_mmproj(reference.weights, reference.config, self.mmproj_dtype, self.class_row)

    def threads(self, settings: CheckSettings) -> int:
        folder = self.text.parent
        return settings.threads if sum(f.stat().st_size for f in folder.glob("*.gguf")) >= SMALL else 1


# --- L1 ---------------------------------------------------------------------------------------------------------------


def _complete(files: _Files, reference: Reference) -> Check:
    from vlmq_export.formats.gguf.complete import complete

    problems = [p for f in (files.text, files.mmproj) for p in complete(f, reference.config, reference.folder)]
    what = "what llama.cpp misses silently: biases, rope base, tokenizer, shapes"
    worst = "; ".join(problems[:4])
    return _gate("L1", "metadata and names complete", len(problems), 0, unit="problems", detail=what, worst=worst)


def _weights(files: _Files, reference: Reference) -> Iterator[Check]:
    from vlmq_export.formats.gguf import names, read

    readers = {
        "gguf-py": read.decode_gguf_py,
        "llama.cpp's own decoder": read.decode_libggml,
        "our reader": read.decode_ours,
    }
    detail = (
        "" if files.mmproj_dtype == "f32" else f"linears of the mmproj against the source cast to {files.mmproj_dtype}"
    )
    idle = names.unused(reference.config)
    count = reference.weights.count - sum(
        reference.weights.array(n).size for n in reference.weights.names() if n in idle
    )
    for who, reader in readers.items():
        name, pairs = f"weights by {who}", _Pairs(files, reference, reader)
        try:
            yield compare_weights("gguf", name, pairs.expected(), pairs.found.get, count=count, detail=detail)
        except MissingRuntime as e:
            yield Check.not_run("gguf", "L1", name, str(e))
        except FormatError as e:
            yield _failed("L1", name, str(e))


class _Pairs:
    """What a reader finds beside what it should, one tensor at a time in the file's order; absent ones come last."""

    def __init__(self, files: _Files, reference: Reference, reader: Callable):
        self.files, self.reference, self.reader = files, reference, reader
        self.found: dict[str, np.ndarray] = {}  # the tensor that `expected` is at, by the name that it yields

    def expected(self) -> Iterator[tuple[str, np.ndarray]]:
        from vlmq_export.formats.gguf.names import head, unused, vision_to_hub

        weights, config = self.reference.weights, self.reference.config
        # A tied output matrix is the embedding itself: a checkpoint that stores it twice has one tensor in the file.
        left = set(weights.names()) - unused(config) - set(vision_to_hub(config).values())
        for name, got in self.reader(self.files.text):
            hubs = [self.files.hub.get(name)]
            if name == "token_embd.weight" and "output.weight" not in self.files.hub:
                hubs.append(head(config))
            for hub in left.intersection(hubs):
                yield from self._pair(hub, got, weights.array(hub))
            left.difference_update(hubs)
        vision = dict(self.files.tower(self.reference))
        for name, got in self.reader(self.files.mmproj):
            if name in vision:
                yield from self._pair(name, got, vision.pop(name))
        yield from vision.items()
        yield from ((hub, weights.array(hub)) for hub in sorted(left))

    def _pair(self, name: str, got: np.ndarray, want: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        self.found[name] = got
        yield name, want
        del self.found[name]


# --- L2, and L3 of the shipped file: one child ------------------------------------------------------------------------


def _shipped(files: _Files, reference: Reference, settings: CheckSettings, scratch: Path) -> list[Check]:
    samples = _pictured(reference)[: max(settings.questions, settings.images)]
    compared = samples[: settings.images]
    first = samples[0]
    watched = [
        runner.exact_prompt(reference, runner.text_only(reference, first), scratch, "watched-text"),
        runner.exact_prompt(reference, first, scratch, "watched-image"),
        runner.mtmd_prompt(reference, first, scratch, "watched-mtmd"),
    ]
    prompts = [{**p, "logits": True, "capture": True} for p in watched]
    for i, s in enumerate(samples):
        prompts.append(runner.mtmd_prompt(reference, s, scratch, f"image-{i}", logits=i < len(compared), answer=ANSWER))
    oblong = deviations.oblong(reference, first)
    prompts.append(runner.mtmd_prompt(reference, oblong, scratch, "oblong"))
    prompts[-1]["length"] *= 2  # it may take more tokens there
    threads = files.threads(settings)
    run = runner.run(scratch, files.text, files.mmproj, prompts, reference, threads, ANSWER)
    rows = [*_products(files, reference, run), *_mtmd(files, reference, run, samples, compared, offset=len(watched))]
    rows.append(deviations.resizing(reference, oblong, run.array(run.prompts[-1]["image"])))
    if files.mmproj_dtype == "q8_0":
        rows.append(_mmproj_twin(files, reference, compared, scratch, threads))
    shipped = _error(run.array(run.prompts[len(watched)]["image"]), runner.image_rows(reference, first))
    return [*rows, *deviations.class_row(files.mmproj, files.text, reference, first, shipped, scratch, threads)]


def _products(files: _Files, reference: Reference, run: runner.Run) -> Iterator[Check]:
    from vlmq_export.formats.gguf.names import vision_places
    from vlmq_export.formats.gguf.params import vision_params

    hub, weights = files.hub, reference.weights
    text = [name for name in run.captured if name in hub]
    yield _row_errors(files, reference, run, "language model", ((n, hub[n], weights.array(hub[n])) for n in text))
    vision = dict(files.tower(reference))
    places = vision_places(vision_params(reference.config))
    vision = {n: w for n, w in vision.items() if places[n].linear}
    yield _row_errors(files, reference, run, "vision tower", ((n, n, vision[n]) for n in run.captured if n in vision))
    looked_up = set() if "output.weight" not in hub else {hub["token_embd.weight"]}  # rows are taken, not multiplied
    unseen = {f"{n}.weight" for n in weights.linears} - looked_up - {hub[n] for n in text} | set(vision) - set(
        run.captured
    )
    yield _gate(
        "L2", "linears seen in the run", len(unseen), 0, unit="missing", compared=len(weights.linears) + len(vision),
        worst=", ".join(sorted(unseen)[:4]),
    )  # fmt: skip


def _row_errors(files: _Files, reference: Reference, run: runner.Run, part: str, weights: Iterator) -> Check:
    """`weights`: (GGUF name, name to report, what it must decode to [out, in])."""
    errors = {}
    for name, said, weight in weights:
        x, y = run.product(name)
        kind = emulate.ACTIVATIONS.get(files.types[name])
        if kind is None or weight.shape != (y.shape[1], x.shape[1]):
            errors[f"{said} ({files.types[name]}, {y.shape[1]} × {x.shape[1]})"] = float("nan")
            continue
        offset = _offset(reference, said) if kind == "Q8_1" else None
        e = emulate.row_error(y, emulate.product(x, weight, kind, offset), x, weight)
        errors[f"{said} row {int(e.argmax())}"] = float(e.max())
    name, value = _worst(errors)
    above = [n for n in sorted(errors, key=errors.get, reverse=True) if not errors[n] <= E_ROW]
    return _gate(
        "L2", f"every product of the {part}", value, E_ROW, unit="worst row", compared=len(errors),
        worst=", ".join(above[:8]) or name,
        detail="‖Δ row‖ / (‖w row‖ · ‖X‖) against the emulated activation rounding, on text and on an image",
    )  # fmt: skip


def _offset(reference: Reference, hub: str) -> np.ndarray:
    """m of w = d·q + m for every block of 32 columns: −scale · zero_point, float32 [out, in/32]."""
    module = hub.removesuffix(".weight")
    if f"{module}.dmin" in reference.weights.parts:
        return -reference.weights.tensor(f"{module}.dmin").numpy().astype(np.float32)
    scales, zeros, g_idx = (
        reference.weights.tensor(f"{module}.{k}").numpy() for k in ("scales", "zero_points", "g_idx")
    )
    group = g_idx[::32]
    return -scales.astype(np.float32)[:, group] * zeros.astype(np.float32)[:, group]


def _mtmd(
    files: _Files, reference: Reference, run: runner.Run, samples: list[Sample], compared: list[Sample], offset: int
) -> Iterator[Check]:
    results = run.prompts[offset : offset + len(samples)]
    ids = [np.where(s.vision.numpy(), -1, s.input_ids.numpy()).tolist() for s in samples]
    wrong = [s.id for s, r, want in zip(samples, results, ids) if r["ids"] != want]
    yield _gate(
        "L3", "prompts tokenized by llama.cpp", len(wrong), 0, unit="different", compared=len(samples),
        worst=", ".join(wrong[:4]), detail="token ids and number of image tokens, through mtmd",
    )  # fmt: skip
    images, features, logits = {}, {}, {}
    for i, sample in enumerate(compared):
        images[sample.id] = run.array(results[i]["image"])
        features[sample.id] = _error(images[sample.id], runner.image_rows(reference, sample))
        text = ~sample.vision.numpy()
        logits[sample.id] = _error(run.logits(offset + i)[:, : reference.vocabulary], reference.logits(sample)[text])
    name, value = _worst(features)
    yield _gate(
        "L3", "image embeddings of mtmd", value, EMBEDDING[files.mmproj_dtype], unit="rel", compared=len(compared),
        worst=name, detail=_EMBEDDING_WHY[files.mmproj_dtype],
    )  # fmt: skip
    if np.isfinite(value) and files.mmproj_dtype != "q8_0":
        yield deviations.half_precision(reference, compared, images, value)
    yield shipped_row(files, reference, compared, logits)
    different = [s.id for s, r in zip(samples, results) if r["answer"] != reference.answer(s, ANSWER)]
    yield Check(
        "gguf", "L3", "greedy answers of the shipped file equal", "info", 1 - len(different) / len(samples), None, "share",
        len(samples), f"{len(samples) - len(different)} of {len(samples)} equal", ", ".join(different[:4]),
    )  # fmt: skip


def shipped_row(files: _Files, reference: Reference, samples: list[Sample], errors: dict[str, float]) -> Check:
    """Sanity only. A model whom rounded activations cost more than usual is held to its own cost, not to the usual one."""
    (name, value), median, gate = _worst(errors), float(np.median(list(errors.values()))), SHIPPED
    detail = "sanity only: activations are rounded to 8 bits"
    if not median <= SHIPPED:
        cost = float(np.median(list(rounding.cost(reference, files.hub, files.types, samples).values())))
        gate = max(SHIPPED, ROUNDED * cost)
        detail += f", which in the reference costs this model {cost:.2g}"
    return _gate(
        "L3", "shipped file through mtmd, median logits", median, gate, unit="rel", compared=len(samples),
        worst=f"{name} ({value:.1e})", detail=detail,
    )  # fmt: skip


def _mmproj_twin(files: _Files, reference: Reference, samples: list[Sample], scratch: Path, threads: int) -> Check:
    """The mmproj as the float32 numbers that it decodes to: its activations are not rounded to 8 bits."""
    from vlmq_export.formats.gguf.twin import decoded_tower, write_twin

    twin = scratch / "mmproj-twin.gguf"
    write_twin(files.mmproj, twin)
    prompts = [runner.mtmd_prompt(reference, s, scratch, f"twin-{i}") for i, s in enumerate(samples)]
    run = runner.run(scratch, files.text, twin, prompts, reference, threads, ANSWER)
    with decoded_tower(reference, twin):
        pairs = zip(samples, run.prompts)
        errors = {s.id: _error(run.array(p["image"]), runner.image_rows(reference, s)) for s, p in pairs}
    name, value = _worst(errors)
    return _gate(
        "L3", "image embeddings of the mmproj's float32 twin", value, EMBEDDING["f32"], unit="rel", compared=len(samples),
        worst=name, detail="reference with the same weights in its vision tower",
    )  # fmt: skip


# --- L3 of the twin ---------------------------------------------------------------------------------------------------


def _twin(files: _Files, reference: Reference, settings: CheckSettings, scratch: Path) -> Iterator[Check]:
    from vlmq_export.formats.gguf.twin import write_twin

    twin = scratch / "twin.gguf"
    write_twin(files.text, twin)
    images = _pictured(reference)[: settings.images]
    texts = [runner.text_only(reference, s) for s in images[:TEXT_PROMPTS]]
    samples = [*texts, *images]
    wanted = {"logits": True, "answer": ANSWER}
    prompts = [runner.exact_prompt(reference, s, scratch, f"p{i}", **wanted) for i, s in enumerate(samples)]
    run = runner.run(scratch, twin, None, prompts, reference, files.threads(settings), ANSWER)
    answers = {s.id: r["answer"] for s, r in zip(samples, run.prompts)}

    def errors() -> dict[str, float]:
        logits = (run.logits(i)[:, : reference.vocabulary] for i in range(len(samples)))
        return {s.id: _error(got, reference.logits(s)) for s, got in zip(samples, logits)}

    with reference.language_norm_eps(run.eps):
        adjusted = errors()
        verdicts = {s.id: reference.judge(s, answers[s.id], TWIN, ANSWER) for s in images}
    said = f"reference with the RMS epsilon that llama.cpp's load log prints ({run.eps:g})"
    for kind, some in (("text prompts", texts), ("image prompts, reference's vision features", images)):
        name, value = _worst({s.id: adjusted[s.id] for s in some})
        n = len(some)
        yield _gate("L3", f"float32 twin, {kind}", value, TWIN, unit="rel", compared=n, worst=name, detail=said)
    yield answers_row("gguf", "greedy answers of the twin", verdicts, unit="different", detail=said)
    name, value = _worst(errors())
    same = sum(answers[s.id] == reference.answer(s, ANSWER) for s in images)
    yield Check(
        "gguf", "L3", "float32 twin against the unmodified reference", "info", value, None, "rel", len(samples),
        f"{deviations.rms_epsilon(reference, run.eps)}; {same} of {len(images)} greedy answers equal", name,
    )  # fmt: skip


def _pictured(reference: Reference) -> list[Sample]:
    return [s for s in reference.prompts if s.images]


def _error(got: np.ndarray, want: np.ndarray) -> float:
    """Relative error, infinite where not even the shapes agree."""
    return relative_error(got, want) if got.shape == want.shape else float("inf")


def _worst(errors: dict[str, float]) -> tuple[str, float]:
    """NaN is worst of all, and nothing compared is NaN."""
    if not errors:
        return "nothing was compared", float("nan")
    name = max(errors, key=lambda n: (np.isnan(errors[n]), errors[n]))
    return name, errors[name]
