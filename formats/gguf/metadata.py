"""The metadata of a GGUF file beyond the architecture's own keys: general.*, tokenizer.*, and where the file came from."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from vlmq_export import __version__
from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.mix import FILE_TYPES
from vlmq_export.formats.gguf.types import TYPES
from vlmq_export.quantizer.artifact import Artifact
from vlmq_export.quantizer.families import text_config

if TYPE_CHECKING:
    import gguf

# The patterns that byte-level BPE tokenizers of these families split by → llama.cpp's name of that pre-tokenizer, which
# is code of its own there: a pattern that it has not cannot be written into a file.
QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN35_REGEX = QWEN2_REGEX.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
PRE_TOKENIZERS = {QWEN2_REGEX: "qwen2", QWEN35_REGEX: "qwen35"}
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # tokenizer.ggml.token_type


@dataclass(frozen=True)
class Tokenizer:
    pre: str  # llama.cpp's name of the pre-tokenizer
    tokens: list[str]  # one a row of the embedding
    types: list[int]
    merges: list[str]
    eos: int
    bos: int | None
    pad: int | None
    add_bos: bool
    chat_template: str | None


def add_general(
    writer: gguf.GGUFWriter, artifact: Artifact, *, kind: str, name: str, parameters: int, dominant: str
) -> None:
    """`kind`: model or mmproj; `parameters` of this file; `dominant`: a mix, or the type that most weights have."""
    import gguf

    m, config = artifact.manifest, artifact.config
    _, _, basename, finetune, version, label = gguf.Metadata.get_model_id_components(name, parameters)
    writer.add_type(kind)
    writer.add_name(name)
    if basename:
        writer.add_basename(basename)
    if finetune:
        writer.add_finetune(finetune)
    if version:
        writer.add_version(version)
    writer.add_size_label(label or gguf.size_label(parameters, 0, 0, 0))
    writer.add_file_type(FILE_TYPES[dominant] if dominant in FILE_TYPES else TYPES[dominant].file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_quantized_by(f"vlmq-export {__version__}")
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, m.name)
    if text := next((f for f in ("LICENSE", "LICENSE.txt") if (artifact.source / f).is_file()), None):
        _add_license(writer, (artifact.source / text).read_text("utf-8", errors="replace"))
    if config.types:
        writer.add_string("vlmq.method", config.method)
        return
    for key in ("method", "bits", "group_size", "symmetric", "act_order"):  # where the integers came from
        writer.add_string(f"vlmq.{key}", str(getattr(config, key)))


def add_keys(writer: gguf.GGUFWriter, keys: dict[str, object]) -> None:
    """Keys with the GGUF types that llama.cpp reads them as: whole numbers are uint32, or int32 in arrays."""
    import gguf

    kinds = gguf.GGUFValueType
    single = {bool: kinds.BOOL, int: kinds.UINT32, float: kinds.FLOAT32, str: kinds.STRING}
    for key, value in keys.items():
        if isinstance(value, list):
            inner = (
                kinds.INT32 if isinstance(value[0], int) and not isinstance(value[0], bool) else single[type(value[0])]
            )
            writer.add_key_value(key, value, kinds.ARRAY, sub_type=inner)
        else:
            writer.add_key_value(key, value, single[type(value)])


def _add_license(writer: gguf.GGUFWriter, text: str) -> None:
    """The SPDX id of the two licenses told apart by their title, else the title itself."""
    title = next((line.strip() for line in text.splitlines() if line.strip()), "")
    spdx = {"Apache License": "apache-2.0", "MIT License": "mit"}.get(title)
    if spdx:
        writer.add_license(spdx)
    elif title:
        writer.add_license("other")
        writer.add_license_name(title[:120])


def file_stem(name: str, parameters: int, encoding: str) -> str:
    """`<Name>-<SizeLabel>-<Encoding>` by the GGUF naming convention; a size that is in the name already stays there.

    What cannot stand in a file name becomes a dash, and a leading `mmproj-`, which marks the other file, goes.
    """
    import gguf

    clean = re.sub(r"[^\w.+-]+", "-", name, flags=re.ASCII)[:100].strip("-.").removeprefix("mmproj-") or "model"
    _, _, basename, finetune, version, label = gguf.Metadata.get_model_id_components(clean, parameters)
    if not basename or not label:
        basename, finetune, version, label = clean, None, None, gguf.size_label(parameters, 0, 0, 0)
    return gguf.naming_convention(None, basename, finetune, version, label, encoding)


def read_tokenizer(folder: Path, config: dict, rows: int) -> Tokenizer:
    """The tokenizer beside a Hugging Face model, as llama.cpp's byte-level BPE takes it.

    `rows`: of the embedding; tokens are padded to it. Raises FormatError for a tokenizer whose pre-tokenizer
    llama.cpp does not have, by name, or that does not fit the embedding.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise FormatError(
            "tokenizer.json is missing from the source model; save the tokenizer with transformers beside the weights"
        )
    raw = json.loads(file.read_text("utf-8"))
    extra = folder / "tokenizer_config.json"
    settings = json.loads(extra.read_text("utf-8")) if extra.is_file() else {}
    pre = _pre_tokenizer(raw, settings)
    ids = {i: token for token, i in raw["model"]["vocab"].items()}
    added = {t["id"]: t for t in raw.get("added_tokens", [])}
    ids |= {i: t["content"] for i, t in added.items()}
    if max(ids) >= rows:
        raise FormatError(f"tokenizer.json: token id {max(ids)} is beyond the {rows} rows of the embedding")

    def kind(i: int) -> int:
        if i in added:
            return CONTROL if added[i]["special"] else USER_DEFINED
        return NORMAL if i in ids else UNUSED

    by_text = {token: i for i, token in ids.items()}
    text = text_config(config)

    def special(key: str) -> int | None:
        """By name from the tokenizer's settings, else by id from the model's config."""
        token = settings.get(f"{key}_token")
        token = token.get("content") if isinstance(token, dict) else token
        i = by_text.get(token) if token else text.get(f"{key}_token_id", config.get(f"{key}_token_id"))
        i = i[0] if isinstance(i, list) else i
        return i if i is not None and 0 <= i < rows else None

    eos = special("eos")
    if eos is None:
        raise FormatError(
            "tokenizer_config.json: no eos_token and no eos_token_id in config.json; llama.cpp would not stop"
        )
    return Tokenizer(
        pre, [ids.get(i, f"[PAD{i}]") for i in range(rows)], [kind(i) for i in range(rows)],
        [m if isinstance(m, str) else " ".join(m) for m in raw["model"]["merges"]],
        eos, special("bos"), special("pad"), bool(settings.get("add_bos_token", False)), _chat_template(folder, settings),
    )  # fmt: skip


def _pre_tokenizer(raw: dict, settings: dict) -> str:
    """llama.cpp's name of it."""
    kind, pre = raw["model"].get("type"), raw.get("pre_tokenizer") or {}
    steps = pre.get("pretokenizers", []) if pre.get("type") == "Sequence" else [pre]
    found = " + ".join(str(s.get("type")) for s in steps)
    if kind == "BPE" and found == "Split + ByteLevel":
        split, level = steps
        pattern = (split.get("pattern") or {}).get("Regex")
        usual = split.get("behavior") == "Isolated" and not split.get("invert")
        usual = usual and not level.get("add_prefix_space") and not level.get("use_regex")
        if usual and pattern in PRE_TOKENIZERS:
            return PRE_TOKENIZERS[pattern]
        found += f" by {pattern}" if usual else " with other settings"
    raise FormatError(
        f"tokenizer.json: {settings.get('tokenizer_class', 'tokenizer')} has model {kind} and pre-tokenizer {found}; "
        f"llama.cpp would split text differently with those known here: {', '.join(PRE_TOKENIZERS.values())}"
    )


def _chat_template(folder: Path, settings: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    if (folder / "chat_template.json").is_file():
        return json.loads((folder / "chat_template.json").read_text("utf-8")).get("chat_template")
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def add_tokenizer(writer: gguf.GGUFWriter, t: Tokenizer) -> None:
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
