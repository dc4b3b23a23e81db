"""Whether a GGUF file has everything that llama.cpp needs, of the right kind and value.

llama.cpp loads a file without biases, rope base, token types or an untied output matrix without a word and computes
something else; the exporter must look by itself, and `verify` looks again at the file that ships.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.metadata import Tokenizer, read_tokenizer
from vlmq_export.formats.gguf.names import Shapes, text_shapes, vision_shapes
from vlmq_export.formats.gguf.params import TextParams, image_params, text_params, vision_params
from vlmq_export.formats.gguf.read import GGUFFile


def complete(path: str | Path, config: dict, source: Path | None = None) -> list[str]:
    """Problems of a text model or an mmproj, one line each; an empty list is a complete file.

    `config`: the source model's config.json. `source`: its folder; with it, tokens, merges and chat template and the
    image normalization are compared too. Raises FormatError for a file that cannot be parsed at all.
    """
    file = GGUFFile(path)
    arch = file.metadata.get("general.architecture")
    p = text_params(config)
    if arch == p.graph.arch:
        wanted, shapes = _TEXT_KEYS | p.keys(), text_shapes(p)
        tokenizer = read_tokenizer(source, config, p.vocabulary) if source else None
        tokens = _token_problems(file.metadata, p, tokenizer)
    elif arch == "clip":
        v = vision_params(config)
        switches = dict.fromkeys(("clip.use_gelu", "clip.use_silu"), False)  # neither is quick-GELU
        wanted, shapes, tokens = switches | _VISION_KEYS | v.keys(), vision_shapes(v), []
        if source:
            wanted |= image_params(source).keys()
    else:
        return [f"general.architecture is {arch!r}, neither {p.graph.arch} nor clip"]
    return [*_key_problems(file, wanted), *tokens, *_tensor_problems(file, shapes)]


class _Any:
    """Any value that is there."""


_TEXT_KEYS = {
    "general.type": "model", "general.name": _Any, "general.file_type": _Any, "general.quantization_version": 2,
    "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": _Any, "tokenizer.ggml.eos_token_id": _Any,
}  # fmt: skip
_VISION_KEYS = {"general.type": "mmproj", "clip.vision.image_mean": _Any, "clip.vision.image_std": _Any}


def _same(got: object, want: object) -> bool:
    """Equality, of floats as float32: that is how GGUF stores them."""
    if isinstance(want, list):
        return isinstance(got, list) and len(got) == len(want) and all(_same(g, w) for g, w in zip(got, want))
    if isinstance(want, float):
        return isinstance(got, (int, float)) and np.float32(got) == np.float32(want)
    return got == want


def _key_problems(file: GGUFFile, wanted: dict[str, object]) -> list[str]:
    problems = []
    for key, want in wanted.items():
        got = file.metadata.get(key, False if want is False else None)  # an absent switch is off
        if got is None:
            problems.append(f"key {key} is missing")
        elif want is not _Any and not _same(got, want):
            problems.append(f"key {key} is {got} where config.json says {want}")
    return problems


def _token_problems(metadata: dict, p: TextParams, tokenizer: Tokenizer | None) -> list[str]:
    problems = []
    for key in ("tokens", "token_type"):
        entries = metadata.get(f"tokenizer.ggml.{key}")
        n = len(entries) if isinstance(entries, list) else 0
        if n != p.vocabulary:
            problems.append(f"key tokenizer.ggml.{key} has {n} entries where the embedding has {p.vocabulary} rows")
    if not metadata.get("tokenizer.ggml.merges"):
        problems.append("key tokenizer.ggml.merges is missing")
    if metadata.get("tokenizer.ggml.add_bos_token") is None:
        problems.append("key tokenizer.ggml.add_bos_token is missing")
    if tokenizer is None:
        return problems
    for key, want in (
        ("ggml.pre", tokenizer.pre), ("ggml.tokens", tokenizer.tokens), ("ggml.token_type", tokenizer.types), ("ggml.merges", tokenizer.merges),
        ("ggml.eos_token_id", tokenizer.eos), ("ggml.bos_token_id", tokenizer.bos), ("ggml.padding_token_id", tokenizer.pad),
        ("ggml.add_bos_token", tokenizer.add_bos), ("chat_template", tokenizer.chat_template),
    ):  # fmt: skip
        if want is not None and metadata.get(f"tokenizer.{key}") != want:
            problems.append(f"key tokenizer.{key} is not that of the source's tokenizer")
    return problems


def _tensor_problems(file: GGUFFile, shapes: Shapes) -> list[str]:
    problems = [f"tensor {name} is missing" for name in shapes if name not in file.tensors]
    for name, t in file.tensors.items():
        if name not in shapes:
            problems.append(
                f"tensor {name} belongs to no part of the model, and llama.cpp refuses what it does not use"
            )
        elif t.shape != shapes[name]:
            problems.append(f"tensor {name} has shape {t.shape} where config.json says {shapes[name]}")
        elif len(t.shape) == 1 and t.type != "F32":
            problems.append(f"tensor {name} is {t.type}; norms and biases must be F32")
    return problems


def require_complete(path: Path, config: dict, source: Path) -> None:
    """Raises FormatError with every problem, and removes the file: a half-right GGUF must not be left to load."""
    if problems := complete(path, config, source):
        for part in GGUFFile(path).parts:
            part.unlink()
        raise FormatError(f"{path.name}: {'; '.join(problems)}")
