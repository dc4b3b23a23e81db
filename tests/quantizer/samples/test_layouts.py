"""Rows as other people write them: each layout gives the same conversation."""

import base64
import json

import pytest
from PIL import Image

from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.rows import read_rows


@pytest.fixture
def folder(tmp_path):
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("c d.png", "lime")):
        Image.new("RGB", (84, 84), colour).save(tmp_path / name)
    return tmp_path


def read(folder, *rows):
    (folder / "rows.json").write_text(json.dumps(rows), "utf-8")
    return read_rows(folder / "rows.json")


def refusal(folder, row) -> str:
    with pytest.raises(CalibrationError) as e:
        read(folder, row)
    return str(e.value)


def uri(file, kind="image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(file.read_bytes()).decode()}"


def turns(*content, answer="red", asked="role", said="content", names=("user", "assistant")):
    """Two turns. The content of the first is a text, or a list of parts."""
    first = content[0] if isinstance(content[0], str) else list(content)
    return [{asked: names[0], said: first}, {asked: names[1], said: answer}]


TEXT = {"type": "text", "text": "What?"}
SHAREGPT = {"asked": "from", "said": "value", "names": ("human", "gpt")}
ONE = {  # rows about a.png
    "LLaVA": {"image": "a.png", "conversations": turns("<image>\nWhat?", **SHAREGPT)},
    "LLaMA-Factory, conversations": {
        "images": ["a.png"],
        "conversations": turns("<image>What?", **SHAREGPT),
    },
    "LLaMA-Factory, messages": {"images": ["a.png"], "messages": turns("<image>What?")},
    "both keys": {
        "images": ["a.png"],
        "messages": turns("<image>What?"),
        "conversations": turns("<image>What?", **SHAREGPT),
    },
    "messages, from and value": {
        "images": ["a.png"],
        "messages": turns("<image>What?", **SHAREGPT),
    },
    "conversations, role and content": {"image": "a.png", "conversations": turns("<image>What?")},
    "transformers": {"messages": turns({"type": "image", "path": "a.png"}, TEXT)},
    "transformers, url": {"messages": turns({"type": "image", "url": "a.png"}, TEXT)},
    "TRL": {"images": ["a.png"], "messages": turns({"type": "image"}, TEXT)},
    "TRL, null": {"images": ["a.png"], "messages": turns({"type": "image", "image": None}, TEXT)},
    "Qwen": {"messages": turns({"image": "a.png"}, {"text": "What?"})},
    "OpenAI": {"messages": turns({"type": "image_url", "image_url": {"url": "a.png"}}, TEXT)},
    "OpenAI, string": {"messages": turns({"type": "image_url", "image_url": "a.png"}, TEXT)},
    "OpenAI, Responses": {
        "messages": turns(
            {"type": "input_image", "image_url": "a.png"}, {"type": "input_text", "text": "What?"}
        )
    },
    "question": {"image": "a.png", "question": "What?", "answer": "red"},
    "answers": {"images": ["a.png"], "question": "What?", "answers": ["red", "ruby"]},
    "VQA": {"image": "a.png", "question": "What?", "answers": [{"answer": "red"}]},
    "ms-swift": {"images": ["a.png"], "query": "<image>What?", "response": "red"},
    "Alpaca": {"images": ["a.png"], "instruction": "<image>What?", "input": "", "output": "red"},
    "a video's frame": {"videos": [["a.png"]], "messages": turns("<video>What?")},
}


@pytest.mark.parametrize("layout", ONE)
def test_every_layout_is_the_same_conversation(folder, layout):
    (row,) = read(folder, ONE[layout])
    assert row.messages == (
        {"role": "user", "content": [{"type": "image"}, TEXT]},
        {"role": "assistant", "content": [{"type": "text", "text": "red"}]},
    )
    assert row.images == (folder / "a.png",) and row.answer == "red"


def test_images_are_in_the_order_of_their_placeholders(folder):
    parts = [{"type": "image", "image": "a.png"}, {"type": "image"}, TEXT]
    assert read(folder, {"images": ["b.png"], "messages": turns(*parts)})[0].images == (
        folder / "a.png",
        folder / "b.png",
    )
    text = "<image> and <image>, which?"
    row = read(folder, {"images": ["b.png", "a.png"], "messages": turns(text)})[0]
    assert row.images == (folder / "b.png", folder / "a.png")
    kinds = [p.get("text", "image") for p in row.messages[0]["content"]]
    assert kinds == ["image", " and ", "image", ", which?"]


def test_a_placeholder_beside_image_parts_or_without_images_is_text(folder):
    named = {"type": "image", "image": "a.png"}
    row = read(folder, {"messages": turns(named, {"type": "text", "text": "an <image>?"})})[0]
    assert row.messages[0]["content"][1]["text"] == "an <image>?" and len(row.images) == 1
    row = read(folder, {"messages": turns("what is <image> in HTML?")})[0]
    assert row.messages[0]["content"] == [{"type": "text", "text": "what is <image> in HTML?"}]


def test_earlier_turns_a_system_message_and_an_input(folder):
    row = read(
        folder,
        {
            "system": "Be short.",
            "history": [["Hi", "Yes?"]],
            "instruction": "Name it.",
            "input": "<image>",
            "images": ["a.png"],
            "output": 3,
        },
    )[0]
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "user", "assistant"]
    assert row.messages[3]["content"] == [{"type": "text", "text": "Name it."}, {"type": "image"}]
    assert row.answer == "3" and len(row.images) == 1


@pytest.mark.parametrize(
    "row",
    [
        {"messages": turns("Hi"), "images": []},
        {"messages": turns("Hi"), "image": None},
        {"question": "Hi", "answer": "red"},
        {"query": "Hi", "response": "red", "images": None},
        {"instruction": "Hi", "output": "red"},
        {"conversations": turns("Hi", **SHAREGPT)},
    ],
)
def test_rows_of_text_alone(folder, row):
    (row,) = read(folder, row)
    assert row.images == () and row.answer == "red"
    assert row.messages[0]["content"] == [{"type": "text", "text": "Hi"}]


def test_a_question_without_an_answer(folder):
    (row,) = read(folder, {"image": "a.png", "question": "What?", "answer": None})
    assert len(row.messages) == 1 and row.answer == ""


@pytest.mark.parametrize("kind", ["image/png", "image/jpeg", ""])
def test_a_data_uri_is_decoded_in_memory(folder, kind):
    row = {
        "messages": turns(
            {"type": "image_url", "image_url": {"url": uri(folder / "a.png", kind)}}, TEXT
        )
    }
    image = read(folder, row)[0].images[0]
    assert load_image(image).getpixel((9, 9)) == (255, 0, 0)
    assert len(repr(image)) < 100 and str(image) == "image 1 of row 0"
    bare = {"type": "image", "base64": uri(folder / "a.png").partition(",")[2]}
    assert read(folder, {"messages": turns(bare, TEXT)})[0].images == (image,)


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ("data:image/png;base64,{}%%", "damaged base64"),
        ("data:image/png,{}", "not base64"),
        ("data:image/svg+xml;utf8,{}", "not base64"),
        ("https://x/{}", "URL"),
        ("{}/x.png", "not under"),
    ],
)
def test_an_image_is_never_dumped_into_a_message(folder, value, says):
    said = refusal(folder, {"image": value.format("A" * 5000), "question": "What?"})
    assert says in said and "row 0" in said and "A" * 101 not in said and len(said) < 500


def test_a_data_uri_has_the_limits_of_a_file(folder, monkeypatch):
    from vlmq_export.quantizer.samples import image_refs

    monkeypatch.setattr(image_refs, "MAX_IMAGE_BYTES", 20)
    row = {"image": uri(folder / "a.png"), "question": "What?"}
    assert "characters of base64" in refusal(folder, row)
    monkeypatch.undo()
    text = base64.b64encode(b"words").decode()
    image = read(folder, row | {"image": f"data:;base64,{text}"})[0].images[0]
    with pytest.raises(CalibrationError, match="image 1 of row 0: cannot be read as an image"):
        load_image(image)


def test_file_urls_are_paths_under_the_root(folder):
    name = (folder / "c d.png").as_uri()
    assert "%20" in name
    assert read(folder, {"image": name, "question": "What?"})[0].images == (folder / "c d.png",)
    assert "not under" in refusal(folder, {"image": "file:///etc/hostname", "question": "What?"})
    assert "another machine" in refusal(folder, {"image": "file://h/a.png", "question": "What?"})


def test_a_video_is_its_frames_in_order(folder):
    frames = ["b.png", "a.png", "b.png"]
    paths = tuple(folder / frame for frame in frames)
    part = {"type": "video", "video": frames}
    listed = {"videos": [frames], "images": ["a.png"]}
    for row, images in (
        ({"messages": turns(part, TEXT)}, paths),
        ({"messages": turns({"type": "video"}, TEXT), "video": frames}, paths),
        ({"messages": turns("<image><video>What?")} | listed, (folder / "a.png", *paths)),
        ({"question": "What?", "videos": [frames]}, paths),
    ):
        got = read(folder, row)[0]
        assert got.images == images
        assert got.messages[0]["content"] == [{"type": "image"}] * len(images) + [TEXT]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (
            {"videos": ["clip.mp4"], "messages": turns("<video>What?")},
            "video clip.mp4: videos are not decoded; give the frames",
        ),
        ({"messages": turns({"type": "video", "video": "clip.mp4"}, TEXT)}, "ffmpeg"),
        ({"messages": turns({"type": "video_url", "video_url": {"url": "x"}}, TEXT)}, "ffmpeg"),
        ({"video": "clip.mp4", "question": "What?"}, "ffmpeg"),
        ({"videos": [[]], "messages": turns("<video>What?")}, "without frames"),
        ({"audios": ["x.wav"], "messages": turns("<audio>What?")}, "audio is not supported"),
        ({"images": ["a.png", None], "messages": turns("<image>")}, "image 2 of 2 is null"),
        ({"image": "a.png", "images": ["a.png"], "question": "x"}, "both image and images"),
        ({"messages": [{"role": "user", "content": None}]}, "turn 1 has no content (null)"),
        ({"conversations": [{"from": "human", "value": None}]}, "turn 1 has no content (null)"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "unknown role 'tool'"),
        ({"messages": ["x"]}, "turn 1 is no object"),
        ({"messages": "x"}, "the turns are no list but a str"),
        ({"messages": turns(TEXT, "y")}, "a part of a content is no object"),
        ({"messages": turns("a"), "conversations": turns("b")}, "differ; keep one"),
        ({"image": "a.png", "messages": turns("no placeholder")}, "0 image placeholders for 1"),
        ({"messages": turns({"type": "image"}, TEXT)}, "1 image placeholders for 0 images"),
        ({"image": 3, "question": "What?"}, "image 1 of row 0 is no path but 3 (int)"),
        ({"query": "x", "history": 1}, "a history that is no list of pairs"),
        ({"text": "words", "label": 1}, "(its keys: text, label)"),
    ],
)
def test_what_is_wrong_is_said_in_words(folder, row, says):
    said = refusal(folder, row)
    assert "1 bad rows: row 0: " in said and says in said
