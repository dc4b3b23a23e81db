"""Bad inputs and faults: calibration and held-out data (the rows of test_bad_inputs.py)."""

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

from tests.attacks import seeds
from tests.attacks.cases import llava, rows_file, said
from tests.test_cli import refused
from vlmq_export import bundled
from vlmq_export.errors import CalibrationError
from vlmq_export.quantizer import calibration
from vlmq_export.quantizer.calibration import Preprocessor, load_image, read_rows

# --- calibration data --------------------------------------------------------------------------------------------------


def test_row_22_every_kind_of_image_is_read_or_refused_with_the_reason(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    rgb = Image.fromarray(pixels)
    sixteen = Image.fromarray((np.arange(600, dtype=np.uint16) * 100).reshape(20, 30))
    kinds = {
        "rgb.png": rgb, "alpha.png": rgb.convert("RGBA"), "palette.png": rgb.quantize(16), "grey.png": rgb.convert("L"),
        "two.png": rgb.convert("1"), "cmyk.jpg": rgb.convert("CMYK"), "sixteen.png": sixteen, "cmyk.tiff": rgb.convert("CMYK"),
        "one.webp": rgb, "one.bmp": rgb, "text.png": b"these are words", "none.png": b"", "half.jpg": None, "vector.eps": rgb,
    }  # fmt: skip
    for name, image in kinds.items():
        if image is None:
            (tmp_path / name).write_bytes(seeds.image("JPEG")[:-200])
        elif isinstance(image, bytes):
            (tmp_path / name).write_bytes(image)
        else:
            image.save(tmp_path / name)
    frames = [rgb, rgb.transpose(Image.Transpose.FLIP_LEFT_RIGHT)]
    frames[0].save(tmp_path / "moving.gif", save_all=True, append_images=frames[1:])
    for name in (*kinds, "moving.gif"):
        if name in ("text.png", "none.png", "half.jpg", "vector.eps"):  # Pillow starts Ghostscript for the last one
            assert f"{name}: cannot be read as an image" in said(load_image, tmp_path / name)
        else:
            loaded = load_image(tmp_path / name)
            assert loaded.mode == "RGB" and loaded.size == (30, 20), name
    grey = np.asarray(load_image(tmp_path / "sixteen.png"))
    assert grey.max() == 59_900 // 256 and grey[0, 3, 0] == 300 // 256  # divided, not clipped


def png_header(width: int, height: int) -> bytes:
    """A valid PNG of any size in some bytes: what a decompression bomb begins with."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(4096))) + chunk(b"IEND", b"")


def test_row_23_bombs_strips_and_specks(tmp_path, monkeypatch):
    file = tmp_path / "x.png"
    for size, says in (
        ((30_000, 30_000), "limit"),
        ((2**31 - 1, 1), "limit"),
        ((10_000, 1), "200 times"),
        ((0, 5), "x.png"),
    ):
        file.write_bytes(png_header(*size))
        with warnings.catch_warnings(action="error"):
            assert says in said(load_image, file)
    monkeypatch.setattr(calibration, "MAX_IMAGE_BYTES", 100)
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
    with tarfile.open(tmp_path / "rows.json", "w") as t:  # whatever its name says
        t.add(tmp_path / "rows.zip", "/etc/rows.zip")
    for name in ("rows.zip", "rows.json"):
        assert "an archive; unpack it" in said(read_rows, tmp_path / name)
    assert "a folder" in said(read_rows, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.zip"]


@pytest.mark.parametrize(
    "name", ["https://h/x.png", "http://169.254.169.254/", "file:///etc/passwd", "file:x", "data:image/png;base64,AA==", "//h/share/x",
             "\\\\h\\share\\x", "ftp://h/x", "../secret.png", "/etc/hostname", "sub/../../secret.png", "a\0b", "\ud800", "x" * 5000],
)  # fmt: skip
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
    assert "row" in said(read_rows, path, tmp_path)  # a.png alone is not under this one
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path.parent / "outside.png")
    assert "not under" in said(read_rows, rows_file(tmp_path, llava(image="../outside.png")), Path())


def test_row_26_every_bad_row_is_listed_with_its_line(tmp_path):
    chat = {"messages": [{"role": "robot", "content": "x"}]}
    path = rows_file(
        tmp_path, llava(), "{not json", "", chat, llava(question="<image>\n", answer=" "), llava(question="<image><image>"),
        llava(answer="x" * (calibration.MAX_TEXT + 1)),
    )  # fmt: skip
    err = said(read_rows, path)
    for part in ("5 bad rows", "line 2: not JSON", "line 4: unknown role 'robot'", "line 5: turn 2 is empty",
                 "line 6: 2 image placeholders for 1 images", "line 7: 262"):  # fmt: skip
        assert part in err


def test_row_26_layouts_that_editors_and_scripts_write(tmp_path):
    """A byte-order mark, CRLF, no newline at the end, U+2028 inside a text, names beyond ASCII, blank lines."""
    Image.new("RGB", (84, 84)).save(tmp_path / "bild ü 图.png")
    rows = [llava(image="bild ü 图.png", answer="eins\u2028zwei"), llava(image="bild ü 图.png", answer="drei\x85vier")]
    text = "\r\n\r\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert [r.answer for r in read_rows(tmp_path / "rows.jsonl")] == ["eins\u2028zwei", "drei\x85vier"]


def test_row_26_special_tokens_in_a_text_are_no_images(tmp_path):
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    for row in (
        llava(question=f"<image>\n{preprocessor.image_token}?"),
        {"messages": [{"role": "user", "content": preprocessor.image_token}]},
    ):
        with pytest.raises(CalibrationError, match="chat template kept"):
            preprocessor.sample(read_rows(rows_file(tmp_path, row))[0])


def test_row_26_copies_are_said(tmp_path, caplog):
    logging.getLogger("vlmq_export").propagate = True
    with caplog.at_level(logging.WARNING, "vlmq_export"):
        assert len(read_rows(rows_file(tmp_path, llava(id=1), llava(id=2), llava(answer="blue")))) == 3
    assert "1 of 3 rows" in caplog.text


def test_row_26_held_out_images_are_looked_at_before_the_work(tmp_path):
    (tmp_path / "broken.png").write_bytes(seeds.image()[:60])
    path = rows_file(tmp_path, llava(), llava(image="broken.png"))
    err = refused("--format", "gptq", "--method", "rtn", "--verify-data", path, "--out", tmp_path / "out", code=1)
    assert "broken.png" in err and "1 bad images" in err and not (tmp_path / "out").exists()
