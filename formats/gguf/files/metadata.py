"""The metadata of a GGUF file beyond the keys of its architecture: general.* and tokenizer.*."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlmq_export._version import __version__
from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.types.mix import FILE_TYPES
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.architecture import Architecture
from vlmq_export.quantizer.samples.companions import chat_template, load_tokenizer
from vlmq_export.quantizer.storage.untrusted import read_json

if TYPE_CHECKING:
    import gguf

# The patterns by which the byte-level BPE tokenizers of these families split text, and llama.cpp's
# names of these pre-tokenizers. A pre-tokenizer is code in llama.cpp, so a pattern that llama.cpp
# does not have cannot be written into a file.
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_REGEX = QWEN2_REGEX.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(
    r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]"
)
PRE_TOKENIZERS = {QWEN2_REGEX: "qwen2", QWEN35_REGEX: "qwen35"}
# GPT-2's pattern is that of the step ByteLevel itself.
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BY_STEPS = {"gpt-2": [_BYTE_LEVEL], "smollm": [_DIGITS, _BYTE_LEVEL]}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # values of tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    """A byte-level BPE tokenizer as llama.cpp takes it."""

    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # one for each row of the embedding
    types: list[int]  # one for each token: NORMAL, CONTROL, USER_DEFINED or UNUSED
    merges: list[str]  # two tokens with a space between them, in order of priority
    eos: int  # token ids
    bos: int | None
    pad: int | None
    add_bos: bool  # whether llama.cpp puts `bos` before a prompt
    chat_template: str | None


def add_general(
    writer: gguf.GGUFWriter,
    artifact: Artifact,
    *,
    kind: str,  # model or mmproj
    name: str,
    parameters: int,  # number of weights of this file
    dominant: str,  # a mix, or the type that most weights have
) -> None:
    """Add the keys general.* and, as vlmq.*, where the integers came from."""
    import gguf

    writer.add_type(kind)
    writer.add_name(name)
    _add_name_parts(writer, name, parameters)
    file_type = FILE_TYPES[dominant] if dominant in FILE_TYPES else TYPES[dominant].file_type
    assert file_type is not None, f"{dominant} is no type that a file is mostly of"
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by(f"vlmq-export {__version__}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, artifact.manifest.name)
    if artifact.manifest.repository:
        writer.add_base_model_repo_url(0, f"https://huggingface.co/{artifact.manifest.repository}")
    licenses = (artifact.source / file for file in ("LICENSE", "LICENSE.txt"))
    if text := next((file for file in licenses if file.is_file()), None):
        _add_license(writer, text.read_text("utf-8", errors="replace"))
    _add_recipe(writer, artifact.config)


def _add_name_parts(writer: gguf.GGUFWriter, name: str, parameters: int) -> None:
    """Add the parts of a model's name as gguf-py tells them apart, and its size."""
    import gguf

    parts = gguf.Metadata.get_model_id_components(name, parameters)
    _, _, basename, finetune, version, label = parts
    if basename:
        writer.add_basename(basename)
    if finetune:
        writer.add_finetune(finetune)
    if version:
        writer.add_version(version)
    writer.add_size_label(label or gguf.size_label(parameters, 0, 0, 0))


def _add_license(writer: gguf.GGUFWriter, text: str) -> None:
    """Add the SPDX id of the two licenses that are recognized by their titles, else the title."""
    title = next((line.strip() for line in text.splitlines() if line.strip()), "")
    spdx = {"Apache License": "apache-2.0", "MIT License": "mit"}.get(title)
    if spdx:
        writer.add_license(spdx)
    elif title:
        writer.add_license("other")
        writer.add_license_name(title[:120])


def _add_recipe(writer: gguf.GGUFWriter, config: QuantConfig) -> None:
    """Add the recipe. With block types, the method alone says something of all linears."""
    if config.types:
        writer.add_string("vlmq.method", config.method)
        return
    own = () if config.widths else ("bits", "symmetric")  # else each linear has its own
    for key in ("method", *own, "group_size", "act_order"):
        writer.add_string(f"vlmq.{key}", str(getattr(config, key)))


def add_keys(writer: gguf.GGUFWriter, keys: Mapping[str, object]) -> None:
    """Add keys with the GGUF types that llama.cpp reads them as.

    Whole numbers are uint32, and int32 in arrays. Floats are float32.
    """
    import gguf

    kinds = gguf.GGUFValueType
    single = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    for key, value in keys.items():
        if isinstance(value, list):
            kind = type(value[0])
            inner = kinds.INT32 if kind is int else single[kind]
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, single[type(value)])


def file_stem(name: str, parameters: int, encoding: str) -> str:
    """`<Name>-<SizeLabel>-<Encoding>` by the GGUF naming convention.

    A size that is in the name already stays there. Characters that cannot stand in a file name
    become dashes. A leading `mmproj-` is removed, because it marks the other file.
    """
    import gguf

    clean = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)[:100].strip("-.")
    clean = clean.removeprefix("mmproj-") or "model"
    parts = gguf.Metadata.get_model_id_components(clean, parameters)
    _, _, basename, finetune, version, label = parts
    if not basename or not label:
        basename, finetune, version, label = clean, None, None, gguf.size_label(parameters, 0, 0, 0)
    return gguf.naming_convention(None, basename, finetune, version, label, encoding)


def read_tokenizer(folder: Path, architecture: Architecture, rows: int) -> Tokenizer:
    """transformers' tokenizer of a model folder, as llama.cpp's byte-level BPE takes it.

    rows: the rows of the embedding. The tokens are padded to this number.

    Raises CheckpointError for files that transformers cannot read, and FormatError for a tokenizer
    whose pre-tokenizer llama.cpp does not have by name, for one that does not fit the embedding,
    and for one that lacks a token that llama.cpp needs.
    """
    loaded = load_tokenizer(folder)
    raw = _bpe(folder, loaded)
    pre = _pre_tokenizer(raw, type(loaded).__name__)
    _same_splitting(folder, loaded, pre)
    added = {t["id"]: t for t in raw["added_tokens"]}
    tokens = {i: token for token, i in raw["model"]["vocab"].items()}
    tokens |= {i: t["content"] for i, t in added.items()}
    if max(tokens) >= rows:
        raise FormatError(
            f"tokenizer: token id {max(tokens)} is beyond the {rows} rows of the embedding"
        )
    special = partial(_special, loaded=loaded, architecture=architecture, rows=rows)
    eos, bos = special("eos"), special("bos")
    if eos is None:
        raise FormatError(
            "tokenizer_config.json: no eos_token and no eos_token_id in config.json;"
            " llama.cpp would not stop"
        )
    return Tokenizer(
        pre,
        [tokens.get(i, f"[PAD{i}]") for i in range(rows)],
        [_token_type(tokens, added, i) for i in range(rows)],
        [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
        eos,
        bos,
        special("pad"),
        bos is not None and loaded("a")["input_ids"][:1] == [bos],
        chat_template(folder, loaded),
    )


def _bpe(folder: Path, loaded: Any) -> dict:
    """What the tokenizer would be saved as: the content of a tokenizer.json.

    Raises FormatError for a tokenizer that has no such file.
    """
    inner = getattr(loaded, "backend_tokenizer", None)
    if inner is None:
        raise FormatError(
            f"{folder.name}: {type(loaded).__name__} is no BPE of the library tokenizers,"
            " which is all that is written to GGUF"
        )
    return json.loads(inner.to_str())


def _same_splitting(folder: Path, loaded: Any, pre: str) -> None:
    """Raises FormatError where tokenizer.json splits text otherwise than transformers does.

    Some classes of transformers bring a pre-tokenizer of their own, and ignore that of the file.
    Other programs read the file, so that the model would mean different things to them.
    """
    file = folder / "tokenizer.json"
    if file.is_file():
        name = type(loaded).__name__
        if (own := _pre_tokenizer(read_json(file), name)) != pre:
            raise FormatError(
                f"tokenizer.json has the pre-tokenizer of {own}, and transformers' {name} that of"
                f" {pre}; save the tokenizer again with transformers"
            )


def _token_type(tokens: Mapping[int, str], added: Mapping[int, dict], i: int) -> int:
    """tokenizer.ggml.token_type of token i. Rows of the embedding without a token are unused."""
    if i in added:
        return CONTROL if added[i]["special"] else USER_DEFINED
    return NORMAL if i in tokens else UNUSED


def _special(
    key: str,  # eos, bos or pad
    *,
    loaded: Any,
    architecture: Architecture,
    rows: int,
) -> int | None:
    """The id of a special token, or None where there is none within the embedding.

    Where the tokenizer has no such token, config.json may have the id.
    """
    name = f"{key}_token_id"
    found = getattr(loaded, name, None)
    if found is None:
        nested, outer = architecture.text.get(name), architecture.config.get(name)
        found = outer if nested is None else nested
    found = found[0] if isinstance(found, list) else found
    return found if found is not None and 0 <= found < rows else None


def _pre_tokenizer(raw: dict, name: str) -> str:
    """llama.cpp's name of the pre-tokenizer. Raises FormatError where it has none.

    raw: the content of a tokenizer.json; name: of the tokenizer's class.
    """
    kind, pre = raw["model"].get("type"), raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    found = " + ".join(str(s.get("type")) for s in steps)
    for known, wanted in _BY_STEPS.items() if kind == "BPE" else ():
        if len(steps) == len(wanted) and all(w.items() <= s.items() for w, s in zip(wanted, steps)):
            return known
    if kind == "BPE" and found == "Split + ByteLevel":
        split, level = steps
        pattern = (split.get("pattern") or {}).get("Regex")
        usual = split.get("behavior") == "Isolated" and not split.get("invert")
        usual = usual and not level.get("add_prefix_space") and not level.get("use_regex")
        if usual and pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
        found += f" by {pattern}" if usual else " with other settings"
    known = ", ".join([*PRE_TOKENIZERS.values(), *_BY_STEPS])
    raise FormatError(
        f"tokenizer.json: {name} has model {kind} and pre-tokenizer {found};"
        f" llama.cpp would split text differently with those known here: {known}"
    )


def add_tokenizer(writer: gguf.GGUFWriter, t: Tokenizer) -> None:
    """Add the keys tokenizer.*."""
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(t.pre)
    writer.add_token_list(t.tokens)
    writer.add_token_types(t.types)
    writer.add_token_merges(t.merges)
    writer.add_eos_token_id(t.eos)
    if t.bos is not None:
        writer.add_bos_token_id(t.bos)
    if t.pad is not None:
        writer.add_pad_token_id(t.pad)
    writer.add_add_bos_token(t.add_bos)
    if t.chat_template:
        writer.add_chat_template(t.chat_template)
