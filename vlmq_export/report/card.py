"""What the model card has beyond the report: licence, data, and how each file is run.

The card's code blocks are templates of their own, templates/run_*.j2. The facts that they fill in
are made here.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import yaml

from vlmq_export import bundled
from vlmq_export.errors import VlmqError, one_line
from vlmq_export.formats.compressed_tensors import runtimes as compressed
from vlmq_export.formats.compressed_tensors.layout import schemes
from vlmq_export.formats.gguf.files.imatrix import IMATRIX
from vlmq_export.formats.gptq import runtimes as gptq
from vlmq_export.planning.run_plan import RunPlan
from vlmq_export.quantizer.artifact.manifest import MANIFEST
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.storage.untrusted import contained
from vlmq_export.quantizer.storage.whole_files import sha256_file
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import locate_model

CARD, CONFIG = "README.md", "config.json"
_ID = re.compile(r"[a-z0-9][a-z0-9.+-]{0,63}")  # an identifier of a licence, as the hub has them
# The first line of a licence's text → its identifier.
_TITLES = {"Apache License": "apache-2.0", "MIT License": "mit"}
_LARGEST = 1 << 16  # characters of a README that are read; its front matter comes first


def facts(out: Path, recipe: Recipe, artifact: Artifact, plan: RunPlan) -> dict:
    """What card.md.j2 and the templates of its code blocks are given."""
    model, options = plan.model, recipe.format_options(plan.model.name)
    family = model.architecture.family
    by_gptq, loads = (
        {r.name.split()[0]: not r.refuses(model, options) for r in programs}
        for programs in (gptq.RUNTIMES, compressed.RUNTIMES)
    )
    return {
        "license": licence(out, recipe, artifact),
        "data": data(recipe, artifact.manifest.calibration),
        "by_transformers": by_gptq["transformers"],
        "by_gptqmodel": by_gptq["GPTQModel.load"],
        "by_vllm": loads["vLLM"],
        "by_sglang": loads["SGLang"],
        "one_grid": len(schemes(model)) == 1,
        "by_genai": (out / "onnx" / "genai_config.json").is_file(),
        "by_ollama": (out / "gguf" / "Modelfile").is_file(),
        "mrope": family.mrope,
        "recurrent": any(block.kind == "recurrent" for block in family.every_block),
        "needs": " ".join(["torchvision", *family.processor_needs]),
        "several_tiles": family.newline > 0,  # an image comes in several tiles, as [1, tiles, ...]
        "ends_in_config": (out / "onnx" / "generation_config.json").is_file(),
        "gguf": _gguf(out / "gguf"),
    }


# -- licence -------------------------------------------------------------------------------------


def licence(out: Path, recipe: Recipe, artifact: Artifact) -> dict[str, str]:
    """The card's keys `license`, `license_name` and `license_link`; empty where it is not known.

    They are those of the source's own card. Once the source is gone, they are those that this
    folder's card has. Where no card has any, the text of a LICENSE beside the model is looked at.
    """
    for card in _cards(out, recipe, artifact):
        if found := front_matter_licence(card):
            return found
    for file in ("LICENSE", "LICENSE.txt"):
        if (path := artifact.source / file).is_file():
            lines = path.read_text("utf-8", errors="replace").splitlines()
            title = next((line.strip() for line in lines if line.strip()), "")
            copies = (f"{name}/{file}" for name in recipe.format if (out / name / file).is_file())
            link = next(copies, f"artifact/source/{file}")
            other = {"license": "other", "license_name": "as-the-source", "license_link": link}
            return {"license": _TITLES[title]} if title in _TITLES else other
    return {}


def _cards(out: Path, recipe: Recipe, artifact: Artifact) -> Iterator[Path]:
    """The cards that may name the licence of the source, the nearest to it first."""
    if recipe.model is not None:
        with suppress(VlmqError, OSError, ValueError):
            model = locate_model(recipe.model, download=False)
            if (model / MANIFEST).is_file():  # an artifact lies beside the card of its own run
                yield model.resolve().parent / CARD
            # Its weights are not hashed for this, which takes a minute at 7B.
            elif sha256_file(model / CONFIG) == artifact.manifest.source.get(CONFIG):
                yield contained(model, CARD)
    yield out / CARD


def front_matter_licence(card: Path) -> dict[str, str]:
    """The keys of a card's front matter that name a licence; empty for what is no licence.

    The card may be anybody's: what does not look like the hub's identifiers is not taken over.
    """
    try:
        with card.open(encoding="utf-8", errors="replace") as file:
            text = file.read(_LARGEST)
        _, front, _ = re.split(r"^---\s*$", text, maxsplit=2, flags=re.MULTILINE)
        keys = yaml.safe_load(front)
        name = keys.get("license")
    except (OSError, ValueError, AttributeError, RecursionError, yaml.YAMLError):
        return {}
    if not isinstance(name, str) or not _ID.fullmatch(name):
        return {}
    more = {k: v for k in ("license_name", "license_link") if isinstance(v := keys.get(k), str)}
    return {"license": name, **{k: one_line(v) for k, v in more.items()}}


# -- data ----------------------------------------------------------------------------------------


def data(recipe: Recipe, calibration: dict) -> str:
    """The samples that the integers were calibrated on, in a sentence.

    The manifest may be anybody's, so that a key may be missing or of any type.
    """
    rows, file = calibration.get("rows"), calibration.get("file")
    if not rows:
        return "No sample was used: the weights were rounded without calibration."
    ours = calibration.get("sha256") == sha256_file(bundled.CALIBRATION)
    bundle = " (drawn images that come with the program)" if ours else ""
    return (
        f"Calibrated on {rows} rows of {file}{bundle}, drawn with seed {recipe.seed} where it has"
        f" more: {calibration.get('tokens')} tokens, {calibration.get('vision_tokens')} of them of"
        f" images. SHA-256 of the file: {calibration.get('sha256')}."
    )


# -- files ---------------------------------------------------------------------------------------


def _gguf(folder: Path) -> dict[str, str]:
    """The names of the two GGUF files, and one for the model in Ollama."""
    files = sorted(p.name for p in folder.glob("*.gguf") if p.name != IMATRIX)
    text = [name for name in files if not name.startswith("mmproj-")]
    vision = [name for name in files if name.startswith("mmproj-")]
    if not text or not vision:
        return {}
    return {"text": text[0], "mmproj": vision[0], "name": Path(text[0]).stem.lower()}
