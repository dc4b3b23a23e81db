"""The layouts in which others write rows, each read as one conversation and its images.

    conversations, messages     turns of {from, value} or {role, content}: LLaVA, ShareGPT4V,
                                LLaMA-Factory, OpenAI, transformers
    question, answer(s)         visual question answering
    query, response             ms-swift
    instruction, input, output  Alpaca, LLaMA-Factory

Images stand in the content of a turn, or beside the turns as `image` or `images`. Then `<image>` in
a text or an image part without a name says where each of them goes. A video is a list of frames.
docs/data.md has a row of each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from vlmq_export.quantizer.samples.image_refs import shown

_ROLES = {  # speakers of all layouts → roles
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "system": "system",
}
# The newline of `<image>\n` belongs to the layout and not to the prompt.
_PLACEHOLDER = re.compile(r"(<(?:image|video)>\n?|\n<(?:image|video)>$)")
_FRAMES = (
    "videos are not decoded; give the frames as a list of image files"
    " (ffmpeg -i clip.mp4 -vf fps=1 frame-%03d.jpg)"
)

Part = dict[str, Any]  # {"type": "text", "text"} or {"type": "image" or "video", "of": value}
Turn = tuple[str, Any]  # role and content, as the layout has it


def conversation(raw: dict) -> tuple[list[dict], list[Any]]:
    """The messages of a row, and the images of its placeholders in their order.

    Each message is {"role", "content"}; the content is a list of {"type": "text", "text"} and
    {"type": "image"}. Raises ValueError for what no layout has.
    """
    listed = {"image": _listed(raw, "image"), "video": _listed(raw, "video")}
    if raw.get("audio") or raw.get("audios"):
        raise ValueError("audio is not supported")
    found = []
    for key in ("conversations", "messages"):
        if (raw_turns := raw.get(key)) is not None:
            turns = _turns(raw_turns)
            llava = any(turn.get("from") is not None for turn in raw_turns)
            always = {"image"} if llava else set()
            found.append(_messages(turns, listed, always=always, loose=False))
    if not found and (turns := _questions(raw)):
        found.append(_messages(turns, listed, always=set(), loose=True))
    if not found:
        keys = ", ".join(shown(key) for key in list(raw)[:8])
        raise ValueError(
            "neither conversations nor messages, nor a question, query or instruction"
            f" (its keys: {keys})"
        )
    if len(found) == 2 and found[0] != found[1]:
        raise ValueError("conversations and messages differ; keep one of them")
    messages, images = found[0]
    system = raw.get("system")
    if isinstance(system, str) and system.strip() and messages and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    return messages, images


def _listed(raw: dict, kind: str) -> list[Any]:
    """What a row lists beside its turns, as `image` or `images`, `video` or `videos`."""
    given = [(key, raw[key]) for key in (kind, f"{kind}s") if raw.get(key) is not None]
    if not given:
        return []
    if len(given) == 2:
        raise ValueError(f"both {kind} and {kind}s; keep one of them")
    key, value = given[0]
    if not isinstance(value, list):
        value = [value]
    elif key == "video" and value and not isinstance(value[0], list):
        value = [value]  # the frames of one video
    for number, one in enumerate(value, start=1):
        if one is None:
            raise ValueError(f"{kind} {number} of {len(value)} is null")
    return value


def _turns(raw: object) -> list[Turn]:
    """The turns of a conversation, with the roles that they have for every layout."""
    if not isinstance(raw, list):
        raise ValueError(f"the turns are no list but a {type(raw).__name__}")
    if not raw:
        raise ValueError("no turns")
    turns = []
    for number, turn in enumerate(raw, start=1):
        if not isinstance(turn, dict):
            raise ValueError(f"turn {number} is no object")
        said = "from" if turn.get("from") is not None else "role"
        role, content = turn.get(said), turn.get("value" if said == "from" else "content")
        if not isinstance(role, str) or role not in _ROLES:
            raise ValueError(f"unknown {'speaker' if said == 'from' else 'role'} {shown(role)!r}")
        if content is None:
            raise ValueError(f"turn {number} has no content (null)")
        turns.append((_ROLES[role], content))
    return turns


def _questions(raw: dict) -> list[Turn]:
    """The turns of a question and its answer, where a row has them; else none."""
    for asked, answers in (
        ("question", ("answer", "answers")),
        ("query", ("response",)),
        ("instruction", ("output",)),
    ):
        if raw.get(asked) is None:
            continue
        question, more = raw[asked], raw.get("input") if asked == "instruction" else None
        if isinstance(more, str) and more:
            question = f"{question}\n{more}"
        turns: list[Turn] = []
        history = raw.get("history") or []  # earlier questions and their answers
        if not isinstance(history, list) or any(
            not isinstance(pair, list) or len(pair) != 2 for pair in history
        ):
            raise ValueError("a history that is no list of pairs")
        for earlier, said in history:
            turns += [("user", earlier), ("assistant", said)]
        turns.append(("user", question))
        said = next((raw[key] for key in answers if raw.get(key) is not None), None)
        if (answer := _answer(said)) is not None:
            turns.append(("assistant", answer))
        return turns
    return []


def _answer(value: Any) -> str | None:
    """The answer of a row, and the first one where it has several."""
    if isinstance(value, list):
        value = value[0] if value else None
    if isinstance(value, dict):
        value = value.get("answer", value.get("text"))
    return str(value) if isinstance(value, int | float) else value


def _messages(
    turns: list[Turn], listed: dict[str, list[Any]], *, always: set[str], loose: bool
) -> tuple[list[dict], list[Any]]:
    """`conversation` of turns. What is listed takes the places of placeholders without a name.

    always: kinds whose placeholders in a text are no text, even where nothing is listed.
    loose: what has no placeholder at all stands before the text of the last question.
    """
    kinds = {kind for kind, things in listed.items() if things} | always
    contents = [_parts(content, kinds) for _, content in turns]
    if any(part["type"] != "text" for parts in contents for part in parts if "marked" not in part):
        # Parts say where images go, and `<image>` in a text beside them is text.
        contents = [_parts(content, set()) for _, content in turns]
    bare = [p["type"] for parts in contents for p in parts if p.get("of", p) is None]
    if loose and not bare:
        last = max(n for n, (role, _) in enumerate(turns) if role == "user")
        media = [{"type": kind, "of": one} for kind, things in listed.items() for one in things]
        contents[last] = media + contents[last]
    else:
        for kind, things in listed.items():
            if (places := bare.count(kind)) != len(things):
                raise ValueError(f"{places} {kind} placeholders for {len(things)} {kind}s")
    waiting = {kind: iter(things) for kind, things in listed.items()}
    messages, images = [], []
    for (role, _), parts in zip(turns, contents):
        content: list[Part] = []
        for part in parts:
            if part["type"] == "text":
                content.append(part)
                continue
            one = next(waiting[part["type"]]) if part["of"] is None else part["of"]
            frames = [one] if part["type"] == "image" else _frames(one)
            images += frames
            content += [{"type": "image"} for _ in frames]
        messages.append({"role": role, "content": content})
    return messages, images


def _parts(content: Any, kinds: set[str]) -> list[Part]:
    """The parts of a content. In texts, placeholders of these kinds are parts of their own."""
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise ValueError(f"a content that is neither text nor a list ({type(content).__name__})")
    parts: list[Part] = []
    for part in map(_part, content):
        if part["type"] == "text" and kinds and isinstance(part["text"], str):
            parts += _split(part["text"], kinds)
        else:
            parts.append(part)
    return parts


def _split(text: str, kinds: set[str]) -> Iterator[Part]:
    """The parts of a text with placeholders of these kinds."""
    before = ""
    for piece in _PLACEHOLDER.split(text):
        kind = piece.strip("\n").strip("<>")
        if kind in kinds and _PLACEHOLDER.fullmatch(piece):
            if before:
                yield {"type": "text", "text": before}
            before = ""
            yield {"type": kind, "of": None, "marked": True}
        else:
            before += piece
    if before:
        yield {"type": "text", "text": before}


def _part(part: Any) -> Part:
    """A part of a content, in whichever way it is written. What it is of may be None."""
    if not isinstance(part, dict):
        raise ValueError(f"a part of a content is no object ({type(part).__name__})")
    kind = part.get("type")
    if kind is None:  # Qwen's own: {"image": …} and {"text": …}
        kind = next((k for k in ("text", "image", "video") if part.get(k) is not None), None)
    if kind in ("text", "input_text"):
        return {"type": "text", "text": part.get("text")}
    if kind in ("image", "image_url", "input_image"):
        return {"type": "image", "of": _named(part)}
    if kind == "video":
        frames = (part.get(key) for key in ("video", "frames", "path", "url"))
        return {"type": "video", "of": next((v for v in frames if v is not None), None)}
    if kind == "video_url":
        raise ValueError(_FRAMES)
    raise ValueError(f"content of type {shown(kind)!r} is not supported")


def _named(part: dict) -> Any:
    """The image that a part names, or None."""
    if part.get("base64") is not None:
        return f"data:;base64,{part['base64']}"
    names = (part.get(key) for key in ("image", "path", "url", "image_url"))
    name = next((name for name in names if name is not None), None)
    return name.get("url", name) if isinstance(name, dict) else name


def _frames(video: Any) -> list[Any]:
    """The frames of a video, as images. Raises ValueError for a file of a video."""
    if not isinstance(video, list):
        raise ValueError(f"video {shown(video)}: {_FRAMES}")
    if not video or any(frame is None for frame in video):
        raise ValueError("a video without frames, or with null for one")
    return video
