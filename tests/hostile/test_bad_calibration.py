"""Bad inputs and faults: calibration and held-out data. test_bad_inputs.py explains the rows."""

from __future__ import annotations

import json
import logging
import struct
import tarfile
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.hostile.attacks import seeds
from tests.hostile.attacks.cases import llava, rows_file, said
from tests.vlmq_export.test_cli import refused
from vlmq_export import bundled
from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer.samples import images
from vlmq_export.quantizer.samples.images import load_image
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import MAX_TEXT, read_rows


def test_row_22_every_kind_of_image_is_read_or_refused_with_the_reason(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    good = {
        "rgb.png": rgb,
        "alpha.png": rgb.convert("RGBA"),
        "palette.png": rgb.quantize(16),
        "grey.png": rgb.convert("L"),
        "two.png": rgb.convert("1"),
        "cmyk.jpg": rgb.convert("CMYK"),
        "sixteen.png": Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30)),
        "cmyk.tiff": rgb.convert("CMYK"),
        "one.webp": rgb,
        "one.bmp": rgb,
    }
    for name, image in good.items():
        image.save(tmp_path / name)
    turned = rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    rgb.save(tmp_path / "moving.gif", save_all=True, append_images=[turned])
    for name in (*good, "moving.gif"):
        loaded = load_image(tmp_path / name)
        assert loaded.mode == "RGB" and loaded.size == (30, 20), name
    # 16 bits a pixel are divided by 256, not clipped
    grey = np.asarray(load_image(tmp_path / "sixteen.png"))
    assert grey.max() == 59_900 // 256 and grey[0, 3, 0] == 300 // 256
    (tmp_path / "text.png").write_bytes(b"these are words")
    (tmp_path / "none.png").write_bytes(b"")
    (tmp_path / "half.jpg").write_bytes(seeds.image("JPEG")[:-200])
    rgb.save(tmp_path / "vector.eps")  # Pillow would start Ghostscript to read it
    for name in ("text.png", "none.png", "half.jpg", "vector.eps"):
        assert f"{name}: cannot be read as an image" in said(load_image, tmp_path / name)


def png_header(width: int, height: int) -> bytes:
    """A short PNG that claims to be of any size, as a decompression bomb does."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        length, check = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return length + kind + data + check

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    data = chunk(b"IDAT", zlib.compress(bytes(4096)))
    return b"\x89PNG\r\n\x1a\n" + head + data + chunk(b"IEND", b"")


def test_row_23_bombs_strips_and_specks(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    bad = {
        (30_000, 30_000): "limit",
        (2**31 - 1, 1): "limit",
        (10_000, 1): "200 times",
        (0, 5): "x.png",
    }
    for size, says in bad.items():
        file.write_bytes(png_header(*size))
        with warnings.catch_warnings(action="error"):
            assert says in said(load_image, file)
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 100)
    Image.new("RGB", (100, 100), "red").save(file)
    assert "100 is the limit" in said(load_image, file)
    monkeypatch.undo()
    path = rows_file(tmp_path, llava(image="speck.png"))
    Image.new("RGB", (1, 1), "red").save(tmp_path / "speck.png")
    sample = Preprocessor(bundled.REFERENCE_VLM).sample(read_rows(path)[0])
    assert int(sample.vision.sum()) >= 8


def test_row_24_archives_are_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as z:
        z.writestr("../../rows.json", "[]")
    with tarfile.open(tmp_path / "rows.json", "w") as t:  # the content decides, not the name
        t.add(tmp_path / "rows.zip", "/etc/rows.zip")
    for name in ("rows.zip", "rows.json"):
        assert "an archive; unpack it" in said(read_rows, tmp_path / name)
    assert "a folder" in said(read_rows, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.zip"]


@pytest.mark.parametrize(
    "name",
    [
        "https://h/x.png",
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "file:x",
        "data:image/png,AA",
        "data:image/png;base64,A",
        "data:image/png;base64,",
        "file://host/share/x.png",
        "//h/share/x",
        "\\\\h\\share\\x",
        "ftp://h/x",
        "../secret.png",
        "/etc/hostname",
        "sub/../../secret.png",
        "a\0b",
        "\ud800",
        "x" * 5000,
    ],
)
def test_row_25_images_are_files_under_the_root(tmp_path, name):
    data = tmp_path / "data"
    data.mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "secret.png")
    path = data / "rows.json"
    path.write_text(json.dumps([llava(image=name)]))
    assert "1 bad rows: row 0: " in said(read_rows, path)


def test_row_25_another_root_is_a_choice(tmp_path, monkeypatch):
    data = tmp_path / "data"
    data.mkdir()
    path = rows_file(data, llava(image=str(data / "a.png")), llava(image="../data/a.png"), llava())
    assert [r.images[0] for r in read_rows(path)] == [data / "a.png"] * 3
    # under the root tmp_path there is no a.png, which the last row names
    assert "row" in said(read_rows, path, tmp_path)
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    path = rows_file(tmp_path, llava(image="../outside.png"))
    assert "not under" in said(read_rows, path, Path())


def test_row_26_every_bad_row_is_listed_with_its_line(tmp_path):
    chat = {"messages": [{"role": "robot", "content": "x"}]}
    empty = llava(question="<image>\n", answer=" ")
    two_images = llava(question="<image><image>")
    long = llava(answer="x" * (MAX_TEXT + 1))
    path = rows_file(tmp_path, llava(), "{not json", "", chat, empty, two_images, long)
    err = said(read_rows, path)
    assert "5 bad rows" in err
    assert "line 2: not JSON" in err
    assert "line 4: unknown role 'robot'" in err
    assert "line 5: turn 2 is empty" in err
    assert "line 6: 2 image placeholders for 1 images" in err
    assert "line 7: 262" in err


def test_row_26_layouts_that_editors_and_scripts_write(tmp_path):
    """A byte-order mark, CRLF, blank lines, no newline at the end, names that are not ASCII.

    U+2028 and U+0085 are parts of a text: other readers take them for ends of lines.
    """
    image, answers = "bild ü 图.png", ["eins\u2028zwei", "drei\x85vier"]
    Image.new("RGB", (84, 84)).save(tmp_path / image)
    rows = [llava(image=image, answer=answer) for answer in answers]
    text = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r.answer for r in read_rows(tmp_path / "rows.jsonl")] == answers


def test_row_26_special_tokens_in_a_text_are_no_images(tmp_path):
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    with_image = llava(question=f"<image>\n{preprocessor.image_token}?")
    without = {"messages": [{"role": "user", "content": preprocessor.image_token}]}
    for row in (with_image, without):
        with pytest.raises(CalibrationError, match="which stands for an image"):
            preprocessor.sample(read_rows(rows_file(tmp_path, row))[0])


def test_row_26_copies_are_said(tmp_path, caplog):
    logging.getLogger("vlmq_export").propagate = True
    path = rows_file(tmp_path, llava(id=1), llava(id=2), llava(answer="blue"))
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        assert len(read_rows(path)) == 3
    assert "1 of 3 rows" in caplog.text


def test_row_26_held_out_images_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "broken.png").write_bytes(seeds.image()[:60])
    path = rows_file(tmp_path, llava(), llava(image="broken.png"))
    export = ("--format", "gptq", "--method", "rtn", "--out", tmp_path / "out")
    err = refused(*export, "--verify-data", path, code=1)
    assert "broken.png" in err and "1 bad images" in err and not (tmp_path / "out").exists()
