"""The Modelfile by which Ollama takes both GGUF files.

Read in Ollama's source of 2026-08 (docs/modelfile.mdx, server/create.go, server/images.go), and not
run. Each file has a FROM of its own: the one whose `general.type` is mmproj becomes the projector,
and the parts of a split model are put together. There is no TEMPLATE, which would be a translation
of the chat template into Go's language. Without it Ollama takes the template of its own that is
nearest to `tokenizer.chat_template`, or where none is near, that key itself.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from vlmq_export.formats.gguf.files.tokenizer import Tokenizer

MODELFILE = "Modelfile"


def modelfile(files: Sequence[str], stop: Sequence[str]) -> str:
    """The content of the file.

    files: the names of the GGUF files beside it, the text model's first.
    stop: the tokens that end an answer.
    """
    lines = [f"FROM ./{name}" for name in files]
    lines += [f'PARAMETER stop "{token}"' for token in stop]
    return "\n".join(lines) + "\n"


def stop_tokens(folder: Path, tokenizer: Tokenizer) -> list[str]:
    """The tokens that end an answer, by generation_config.json and the tokenizer, in this order.

    One that a line of a Modelfile cannot hold is left out: the GGUF's own `eos` stops there.
    """
    file = folder / "generation_config.json"
    told = json.loads(file.read_text("utf-8")).get("eos_token_id") if file.is_file() else None
    ids = told if isinstance(told, list) else [told]
    known = [i for i in [*ids, tokenizer.eos] if type(i) is int and 0 <= i < len(tokenizer.tokens)]
    tokens = [tokenizer.tokens[i] for i in dict.fromkeys(known)]
    return [t for t in tokens if t.isprintable() and '"' not in t]
