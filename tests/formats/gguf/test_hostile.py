"""Hostile and damaged GGUF files: our parser refuses each within a second, by a FormatError.

gguf-py hangs on the first of them and accepts several others. That is why `inspect` and all readers
parse a file with our parser before anything else opens it.
"""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest

from vlmq_export.errors import FormatError
from vlmq_export.formats.gguf.files.parse import MAX_STRINGS, parse
from vlmq_export.formats.gguf.inspect import inspect
from vlmq_export.formats.gguf.read import GGUFFile, decode_gguf_py, decode_libggml, decode_ours

SECONDS = 1.0  # in which any file of this module must be parsed or refused
U8, U32, STRING, ARRAY = 0, 4, 8, 9


def string(s: str | bytes) -> bytes:
    raw = s if isinstance(s, bytes) else s.encode()
    return struct.pack("<Q", len(raw)) + raw


def key(name, kind: int, value: bytes) -> bytes:
    return string(name) + struct.pack("<I", kind) + value


def array(kind: int, n: int, data: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, n) + data


def tensor(name, dims, kind: int = 0, offset: int = 0, n_dims: int | None = None) -> bytes:
    head = string(name) + struct.pack("<I", len(dims) if n_dims is None else n_dims)
    return head + b"".join(struct.pack("<Q", d) for d in dims) + struct.pack("<IQ", kind, offset)


def container(
    keys=(),
    tensors=(),
    data: bytes = b"",
    *,
    version=3,
    n_keys=None,
    n_tensors=None,
    magic=b"GGUF",
    align=32,
) -> bytes:
    """A GGUF file. `n_keys` and `n_tensors` are the counts in its head; None: the true ones."""
    n_tensors = len(tensors) if n_tensors is None else n_tensors
    n_keys = len(keys) if n_keys is None else n_keys
    head = magic + struct.pack("<IQQ", version, n_tensors, n_keys)
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % align) + data


ARCH = key("general.architecture", STRING, string("qwen2vl"))
TWO_STRINGS = key("a", ARRAY, array(STRING, 2, string("x") + string("y")))
GOOD = container([ARCH, TWO_STRINGS], [tensor("t", [4, 2])], bytes(32))
# Parts of the damaged files.
ALIGNMENT = "general.alignment"
ONE = array(U8, 1, b"\1")
CUT = string("a") + struct.pack("<Q", 2**40)  # the second string ends after its length
NOT_UTF8 = string(b"\xff")
BOMB = container(keys=[key("x", ARRAY, array(U8, 2**40))])

HOSTILE = {
    "an array of 2^40 bytes": BOMB,
    "an array of 2^62 u64": container(keys=[key("x", ARRAY, array(10, 2**62))]),
    "an array of 2^64-1 strings": container(keys=[key("x", ARRAY, array(STRING, 2**64 - 1))]),
    "a string of 2^63 bytes": container(keys=[string("x") + struct.pack("<IQ", STRING, 2**63)]),
    "a key of 2^40 bytes": container(keys=[struct.pack("<Q", 2**40)]),
    "an array of arrays": container(keys=[key("x", ARRAY, array(ARRAY, 1, array(ARRAY, 1, ONE)))]),
    "a thousand nested arrays": container(keys=[key("x", ARRAY, array(ARRAY, 1) * 1000)]),
    "an unknown value type": container(keys=[key("x", 13, b"\0" * 8)]),
    "an unknown element type": container(keys=[key("x", ARRAY, array(99, 1, b"\0" * 8))]),
    "an element cut short": container(keys=[key("x", ARRAY, array(STRING, 2, CUT))]),
    "an element that is not UTF-8": container(keys=[key("x", ARRAY, array(STRING, 1, NOT_UTF8))]),
    "2^63 keys": container(n_keys=2**63),
    "2^40 tensors": container(n_tensors=2**40),
    "a key twice": container(keys=[ARCH, ARCH]),
    "an empty key": container(keys=[key("", U32, b"\0" * 4)]),
    "a key that is not UTF-8": container(keys=[key(b"\xff\xfe", U32, b"\0" * 4)]),
    "dims of 2^63": container([ARCH], [tensor("t", [2**63, 2])], bytes(32)),
    "dims whose product wraps": container([ARCH], [tensor("t", [2**32, 2**32])], bytes(32)),
    "a zero dimension": container([ARCH], [tensor("t", [0, 4])], bytes(32)),
    "no dimension": container([ARCH], [tensor("t", [])], bytes(32)),
    "five dimensions": container([ARCH], [tensor("t", [1, 1, 1, 1, 1])], bytes(32)),
    "2^32-1 dimensions": container([ARCH], [tensor("t", [1], n_dims=2**32 - 1)], bytes(32)),
    "an unknown tensor type": container([ARCH], [tensor("t", [4], kind=200)], bytes(32)),
    "a removed tensor type": container([ARCH], [tensor("t", [32], kind=4)], bytes(32)),
    "a row that is no multiple of its block": container([ARCH], [tensor("t", [33], 2)], bytes(64)),
    "a tensor twice": container([ARCH], [tensor("t", [4]), tensor("t", [4], offset=32)], bytes(64)),
    "a tensor without a name": container([ARCH], [tensor("", [4])], bytes(32)),
    "a name of 64 bytes": container([ARCH], [tensor("t" * 64, [4])], bytes(32)),
    "an offset past the end": container([ARCH], [tensor("t", [4], offset=2**20)], bytes(32)),
    "an offset of 2^64-32": container([ARCH], [tensor("t", [4], offset=2**64 - 32)], bytes(32)),
    "a tensor past the end": container([ARCH], [tensor("t", [9])], bytes(32)),
    "an offset out of line": container([ARCH], [tensor("t", [4], offset=4)], bytes(64)),
    "overlapping tensors": container(
        [ARCH], [tensor("t", [16]), tensor("u", [4], 0, 32)], bytes(96)
    ),
    "the same bytes twice": container([ARCH], [tensor("t", [8]), tensor("u", [8])], bytes(96)),
    "an alignment of 0": container([key(ALIGNMENT, U32, struct.pack("<I", 0))]),
    "an alignment of 48": container([key(ALIGNMENT, U32, struct.pack("<I", 48))]),
    "an alignment of 2^31": container([key(ALIGNMENT, U32, struct.pack("<I", 2**31))]),
    "an alignment in words": container([key(ALIGNMENT, STRING, string("32"))]),
    "an alignment as an array": container(
        [key(ALIGNMENT, ARRAY, array(U32, 1, struct.pack("<I", 32)))]
    ),
    "another magic": container(magic=b"GGML"),
    "version 1": container(version=1),
    "version 2": container(version=2),
    "big-endian": container(version=3 << 24),
    "nothing": b"",
    "three bytes": b"GGU",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_at_once(name, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name])
    start = time.perf_counter()
    with pytest.raises(FormatError, match=r"x\.gguf") as error:
        GGUFFile(path)
    assert time.perf_counter() - start < SECONDS
    assert len(str(error.value).splitlines()) == 1 and len(str(error.value)) < 500


@pytest.mark.parametrize("opener", [inspect, decode_gguf_py, decode_libggml, decode_ours])
def test_49_bytes_that_announce_a_huge_array_are_refused_at_once(opener, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(BOMB[:49])
    start = time.perf_counter()
    with pytest.raises(FormatError):
        list(opener(path))
    assert time.perf_counter() - start < SECONDS


def test_a_good_file_is_read(tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(GOOD)
    file = GGUFFile(path)
    assert file.metadata == {"general.architecture": "qwen2vl", "a": ["x", "y"]}
    assert file.tensors["t"].shape == (2, 4) and file.array("t").shape == (2, 4)
    assert [n for n, _ in decode_libggml(path)] == [n for n, _ in decode_gguf_py(path)] == ["t"]


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "x.gguf"
    for n in range(len(GOOD)):
        path.write_bytes(GOOD[:n])
        with pytest.raises(FormatError):
            GGUFFile(path)


def test_any_damage_is_one_of_our_errors_or_a_file_that_parses():
    """Random changes of a good file, with a fixed seed: single bytes, and words set to extremes."""
    rng = np.random.default_rng(0)
    extremes = [n.to_bytes(8, "little") for n in (0, 1, 2**31, 2**32 - 1, 2**62, 2**63, 2**64 - 1)]
    start, refused = time.perf_counter(), 0
    for _ in range(5000):
        raw = bytearray(GOOD)
        for _ in range(rng.integers(1, 4)):
            at = int(rng.integers(0, len(raw) - 8))
            if rng.random() < 0.5:
                raw[at] = rng.integers(0, 256)
            else:
                raw[at : at + 8] = extremes[rng.integers(len(extremes))]
        try:
            parse(Path("x.gguf"), bytes(raw))
        except FormatError as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 2000 and time.perf_counter() - start < 10 * SECONDS


def test_a_million_empty_strings_stay_under_a_second(tmp_path):
    path = tmp_path / "x.gguf"
    empty = array(STRING, MAX_STRINGS, bytes(8 * MAX_STRINGS))
    path.write_bytes(container([ARCH, key("a", ARRAY, empty)]))
    start = time.perf_counter()
    assert len(GGUFFile(path).metadata["a"]) == MAX_STRINGS
    within = time.perf_counter() - start
    path.write_bytes(container([key(name, ARRAY, empty) for name in "ab"]))
    with pytest.raises(FormatError, match="length of b"):
        GGUFFile(path)
    # It takes 0.4 s on a core of its own, and tests share cores.
    assert within < 3 * SECONDS


def test_names_of_a_file_cannot_drive_the_terminal(tmp_path):
    path = tmp_path / "x.gguf"
    title = key("evil\x1b[2J", STRING, string("\x1b]0;owned\x07 line\nline"))
    path.write_bytes(container([title], [tensor("t\x1b[31m", [4])], bytes(32)))
    seen = inspect(path)
    for text in (*seen.metadata, *seen.metadata.values(), *(t.name for t in seen.tensors)):
        assert text.isprintable()
    path.write_bytes(container([key("evil\x1b[2J", 99, b"")]))
    with pytest.raises(FormatError) as error:
        GGUFFile(path)
    assert str(error.value).isprintable()
