"""Whether a GGUF file has everything that llama.cpp needs, of the right kind and value.

llama.cpp loads a file without biases, rope base, token types or an untied output matrix, says
nothing, and computes something else. The exporter must therefore look by itself, and `verify` looks
again at the file that ships.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.files.tokenizer import Tokenizer, read_tokenizer
from vlmq_export.formats.gguf.read import GGUFFile
from vlmq_export.formats.gguf.tables.graphs import TextParams
from vlmq_export.formats.gguf.tables.layout import Layout, shapes
from vlmq_export.formats.gguf.tables.params import image_params

_ANY = object()  # stands for any value that is there

# Keys that every text model and every mmproj must have, beside those of its architecture.
_TEXT_KEYS = {
    "general.type": "model",
    "general.name": _ANY,
    "general.file_type": _ANY,
    "general.quantization_version": 2,
    "tokenizer.ggml.model": _ANY,
    "tokenizer.ggml.pre": _ANY,
    "tokenizer.ggml.eos_token_id": _ANY,
}
_VISION_KEYS = {
    "general.type": "mmproj",
    "clip.vision.image_mean": _ANY,
    "clip.vision.image_std": _ANY,
}
# Algorithm of a tokenizer → the keys that it cannot do without.
_ALGORITHMS = {
    "gpt2": ("ggml.merges",),
    "llama": ("ggml.scores", "ggml.unknown_token_id", "ggml.add_space_prefix"),
}
# Where neither of the two activations is switched on, llama.cpp computes quick-GELU.
_ACTIVATIONS = {"clip.use_gelu": False, "clip.use_silu": False}


def complete(path: str | Path, layout: Layout, source: Path | None = None) -> list[str]:
    """The problems of a text model or an mmproj, one line each. A complete file has none.

    source: the source model's folder. If it is given, tokens, merges, chat template and image
        normalization are compared with it too.

    Raises FormatError for a file that cannot be parsed at all.
    """
    file = GGUFFile(path)
    arch = file.metadata.get("general.architecture")
    p = layout.text_params
    if arch == p.graph.arch:
        wanted, places = _TEXT_KEYS | p.keys(), layout.text
        tokenizer = read_tokenizer(source, layout.architecture, p.vocabulary) if source else None
        tokens = _token_problems(file.metadata, p, tokenizer)
    elif arch == "clip":
        wanted = _ACTIVATIONS | _VISION_KEYS | layout.vision_params.keys()
        places, tokens = layout.vision, []
        if source:
            wanted |= image_params(source).keys()
    else:
        return [f"general.architecture is {arch!r}, neither {p.graph.arch} nor clip"]
    return [*_key_problems(file, wanted), *tokens, *_tensor_problems(file, shapes(places))]


def require_complete(path: Path, layout: Layout, source: Path) -> None:
    """Raises FormatError with every problem of a file, and removes the file.

    A file that is half right must not be left, because llama.cpp might load it.
    """
    if problems := complete(path, layout, source):
        for part in GGUFFile(path).parts:
            part.unlink()
        raise FormatError(f"{path.name}: {'; '.join(problems)}")


def _same(got: object, want: object) -> bool:
    """Whether two values are equal. Floats are compared as float32, as GGUF stores them."""
    if isinstance(want, list):
        return (
            isinstance(got, list)
            and len(got) == len(want)
            and all(_same(g, w) for g, w in zip(got, want))
        )
    if isinstance(want, float):
        return isinstance(got, (int, float)) and np.float32(got) == np.float32(want)
    return got == want


def _key_problems(file: GGUFFile, wanted: Mapping[str, object]) -> list[str]:
    """Keys that are missing or have another value than `wanted` says."""
    problems = []
    for key, want in wanted.items():
        # A switch that is absent is off.
        got = file.metadata.get(key, False if want is False else None)
        if got is None:
            problems.append(f"key {key} is missing")
        elif want is not _ANY and not _same(got, want):
            problems.append(f"key {key} is {got} where config.json says {want}")
    return problems


def _token_problems(
    metadata: Mapping[str, Any], p: TextParams, tokenizer: Tokenizer | None
) -> list[str]:
    """What is wrong with the keys of the tokenizer.

    tokenizer: that of the source, to compare with.
    """
    problems = []
    for key in ("tokens", "token_type"):
        entries = metadata.get(f"tokenizer.ggml.{key}")
        n = len(entries) if isinstance(entries, list) else 0
        if n != p.vocabulary:
            problems.append(
                f"key tokenizer.ggml.{key} has {n} entries where the embedding has"
                f" {p.vocabulary} rows"
            )
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in _ALGORITHMS:
        known = " or ".join(_ALGORITHMS)
        problems.append(f"key tokenizer.ggml.model is {kind!r} where {known} is expected")
    for key in ("ggml.add_bos_token", *_ALGORITHMS.get(str(kind), ())):
        if metadata.get(f"tokenizer.{key}") in (None, []):
            problems.append(f"key tokenizer.{key} is missing")
    for key, want in tokenizer.keys().items() if tokenizer else ():
        if not _same(metadata.get(key), want):
            problems.append(f"key {key} is not that of the source's tokenizer")
    return problems


def _tensor_problems(file: GGUFFile, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors that are missing, unknown, of another shape, or of a type that llama.cpp refuses."""
    problems = [f"tensor {name} is missing" for name in shapes if name not in file.tensors]
    for name, t in file.tensors.items():
        if name not in shapes:
            problems.append(
                f"tensor {name} belongs to no part of the model, and llama.cpp refuses what it"
                " does not use"
            )
        elif t.shape != shapes[name]:
            problems.append(
                f"tensor {name} has shape {t.shape} where config.json says {shapes[name]}"
            )
        elif len(t.shape) == 1 and t.type != "F32":
            problems.append(f"tensor {name} is {t.type}; norms and biases must be F32")
    return problems
