"""Calibration rows: files, truncation as in the paper, errors that name every bad row."""

import json

import pytest
import torch
from PIL import Image

from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples.companions import _with_pillow
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.samples.sample import truncate
from vlmq_export.sources.calibration import draw


@pytest.fixture
def images(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (84, 84), "white").save(tmp_path / name)
    return tmp_path


@pytest.fixture(scope="module")
def preprocessor():
    return Preprocessor(REFERENCE_VLM)


def llava(image="a.png", question="<image>\nWhat?", **more):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "red"}]
    return {"id": "1", "image": image, "conversations": turns, **more}


def chat(image="a.png"):
    content = [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]
    user = {"role": "user", "content": content}
    return {"messages": [user, {"role": "assistant", "content": "red"}]}


def write(folder, *rows, name="rows.json"):
    text = json.dumps(list(rows)) if name.endswith(".json") else "\n".join(map(json.dumps, rows))
    (folder / name).write_text(text)
    return folder / name


def test_both_layouts_are_the_same_sample(images, preprocessor):
    one = read_rows(write(images, llava()))[0]
    two = read_rows(write(images, chat(), name="rows.jsonl"))[0]
    a, b = preprocessor.sample(one), preprocessor.sample(two)
    assert torch.equal(a.input_ids, b.input_ids) and torch.equal(a.pixel_values, b.pixel_values)
    assert preprocessor.tokenizer.decode(a.input_ids[a.answer]) == "red<|im_end|>\n"
    assert int(a.vision.sum()) == (84 // 28) ** 2


@pytest.mark.parametrize(
    ("row", "says"),
    [
        (llava(image="gone.png"), "gone.png"),
        (llava(question="no placeholder"), "0 image placeholders for 1 images"),
        (llava(image="https://x/y.png"), "URL"),
        ({"id": "x"}, "neither conversations nor messages"),
        ("text", "not an object"),
        (llava() | {"conversations": [{"from": "robot", "value": "x"}]}, "robot"),
        (llava() | {"conversations": []}, "no turns"),
        ({"messages": [{"role": "user"}]}, "turn 1 has no content"),
    ],
)
def test_bad_rows_are_named_together(images, row, says):
    with pytest.raises(CalibrationError) as e:
        read_rows(write(images, llava(), row, row))
    for part in (says, "2 bad rows", "row 1", "row 2"):
        assert part in str(e.value)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("x.json", b"{", "not JSON"),
        ("x.json", b"{}", "list"),
        ("x.json", b"[]", "no rows"),
        ("x.jsonl", b"{}\n{", "line 2"),
        ("x.json", b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_files_that_are_no_rows(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CalibrationError, match=says):
        read_rows(tmp_path / name)


def test_truncation_drops_a_sample_whose_image_would_be_cut(images, preprocessor):
    sample = preprocessor.sample(read_rows(write(images, llava()))[0])
    end = int(sample.vision.nonzero().max()) + 1
    assert truncate(sample, len(sample.input_ids)) is sample
    assert len(truncate(sample, end).input_ids) == end
    assert truncate(sample, end - 1) is None


@pytest.mark.parametrize("size", [(30, 500), (1, 300), (97, 41), (84, 84), (2000, 1000)])
def test_fit_leaves_nothing_for_a_runtime_to_resize(preprocessor, size):
    unit = 28
    w, h = preprocessor.fit(Image.new("RGB", size)).size
    low, high = preprocessor.images.pixel_limits()
    assert w % unit == 0 and h % unit == 0
    assert max(low, 8 * unit**2) <= w * h <= min(high, 4096 * unit**2)
    features = preprocessor.image_processor(images=[Image.new("RGB", (w, h))], return_tensors="pt")
    assert features["image_grid_thw"][0, 1:].tolist() == [h // 14, w // 14]


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n" + b"\x00" * 20])
def test_unreadable_image_is_one_line(tmp_path, content):
    (tmp_path / "x.png").write_bytes(content)
    with pytest.raises(CalibrationError, match="cannot be read as an image"):
        load_image(tmp_path / "x.png")


def test_images_are_turned_upright_and_made_rgb(tmp_path):
    image = Image.new("L", (10, 20))
    exif = image.getexif()
    exif[0x0112] = 6  # rotate by 90 degrees
    image.save(tmp_path / "x.jpg", exif=exif)
    loaded = load_image(tmp_path / "x.jpg")
    assert loaded.mode == "RGB" and loaded.size == (20, 10)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "WEBP", "P", "RGB", "L"])
def test_transparent_images_are_put_on_white(tmp_path, mode):
    """Black writing on nothing, in every mode in which a PNG or GIF can say so."""
    image = Image.new("RGBA", (20, 10), (0, 0, 0, 0))
    image.paste((0, 0, 0, 255), (5, 2, 15, 8))
    if mode == "RGBA":
        image.putpixel((0, 0), (0, 0, 0, 128))
    file, more = tmp_path / "x.png", {}
    if mode == "P":
        file, more = tmp_path / "x.gif", {"transparency": 0}
        image = Image.new("P", (20, 10))
        image.putpalette([9, 9, 9, 0, 0, 0])
        image.paste(1, (5, 2, 15, 8))
    elif mode in ("RGB", "L"):  # one colour of the file is transparent
        image = Image.new(mode, (20, 10), "red" if mode == "RGB" else 7)
        image.paste("black", (5, 2, 15, 8))
        more = {"transparency": (255, 0, 0) if mode == "RGB" else 7}
    elif mode == "WEBP":
        file = tmp_path / "x.webp"
        more = {"lossless": True, "exact": True}
    else:
        image = image.convert(mode)
    image.save(file, **more)
    loaded = load_image(file)
    assert loaded.mode == "RGB"
    assert loaded.getpixel((19, 0)) == (255, 255, 255)
    assert loaded.getpixel((8, 5)) == (0, 0, 0)
    if mode == "RGBA":
        assert loaded.getpixel((0, 0)) == (127, 127, 127)


def test_bundled_rows_read():
    rows = read_rows(HELDOUT)
    assert len(rows) == 512 and all(row.answer and row.task for row in rows)


def test_the_seed_draws_the_samples():
    rows = read_rows(HELDOUT)
    assert draw(rows, 512, seed=3) == draw(rows, 600, seed=0) == rows
    some = draw(rows, 32, seed=1)
    assert some == draw(rows, 32, seed=1) != draw(rows, 32, seed=2)
    assert len(some) == 32 and [r for r in rows if r in some] == some


class _StandIn(type):
    """What transformers 5.17 exports as AutoImageProcessor where torchvision is missing."""

    def __getattribute__(cls, key):
        if key.startswith("_"):
            return super().__getattribute__(key)
        raise ImportError("AutoImageProcessor requires the Torchvision library")


def test_the_processor_is_found_behind_a_stand_in_for_it(preprocessor):
    found = _with_pillow(_StandIn("AutoImageProcessor", (), {}), REFERENCE_VLM)
    assert type(found) is type(preprocessor.image_processor)


def test_without_any_processor_the_missing_package_is_named(tmp_path):
    (tmp_path / "preprocessor_config.json").write_text('{"image_processor_type": "None"}')
    with pytest.raises(ImportError, match="Torchvision"):
        _with_pillow(_StandIn("AutoImageProcessor", (), {}), tmp_path)
