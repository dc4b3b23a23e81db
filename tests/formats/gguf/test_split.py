"""A text model split over several files: the same tensors, under the names that llama.cpp wants.

A set of files that is not whole is refused.
"""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest

from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.completeness import complete
from vlmq_export.formats.gguf.proof.twin_file import write_twin
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.recipes.recipe import Recipe

gguf = FORMATS["gguf"]
LIMIT = 500_000  # bytes


@pytest.fixture(scope="module")
def split(artifacts, tmp_path_factory):
    """(artifact, folder with a split text model)."""
    artifact, folder = artifacts("w4g128"), tmp_path_factory.mktemp("split")
    gguf.write(artifact, folder, FormatOptions(name="tiny-vlm", gguf_split_bytes=LIMIT))
    return artifact, folder


def test_the_files_hold_what_one_file_holds(split, gguf_files):
    artifact, folder = split
    whole, (text, mmproj) = read.GGUFFile(gguf_files[1]), read.find_files(folder)
    file = read.GGUFFile(text)
    assert len(file.parts) == len(list(folder.glob("*.gguf"))) - 1 > 3
    assert text.name == f"{gguf_files[1].stem}-00001-of-{len(file.parts):05d}.gguf"
    assert mmproj.name == gguf_files[2].name
    assert list(file.tensors) == list(whole.tensors)
    assert all(np.array_equal(file.raw(n), whole.raw(n)) for n in whole.tensors)
    counts = {"split.count": len(file.parts), "split.tensors.count": len(whole.tensors)}
    assert file.metadata == whole.metadata | {"split.no": 0} | counts
    assert complete(text, Layout.of(artifact.architecture), artifact.source) == []
    for part in file.parts:
        sizes = [t.nbytes for t in read.GGUFFile(part).tensors.values() if part != text]
        assert sum(sizes) <= LIMIT or len(sizes) == 1
    unsplit = gguf.inspect(gguf_files[1].parent)
    assert gguf.inspect(folder).bits_per_weight == unsplit.bits_per_weight


def test_three_readers_agree_over_all_files(split):
    text = read.find_files(split[1])[0]
    ours = dict(read.decode_ours(text))
    for reader in (read.decode_gguf_py, read.decode_libggml):
        theirs = dict(reader(text))
        assert theirs.keys() == ours.keys()
        assert all(np.array_equal(theirs[n], ours[n]) for n in ours)


def test_the_twin_is_one_file(split, tmp_path):
    text = read.find_files(split[1])[0]
    write_twin(text, tmp_path / "twin.gguf")
    twin = read.GGUFFile(tmp_path / "twin.gguf")
    assert twin.tensors.keys() == read.GGUFFile(text).tensors.keys()
    assert not [k for k in twin.metadata if "split" in k]


def test_a_set_that_is_not_whole_is_refused(split, tmp_path):
    folder = shutil.copytree(split[1], tmp_path / "gguf")
    text = read.find_files(folder)[0]
    second, third = read.GGUFFile(text).parts[1:3]
    kept = second.read_bytes()
    second.write_bytes(third.read_bytes())
    with pytest.raises(FormatError, match=f"{second.name}: not part 2 of"):
        read.GGUFFile(text)
    second.unlink()
    with pytest.raises(FormatError, match=f"{second.name}: no such file"):
        read.GGUFFile(text)
    second.write_bytes(kept)
    renamed = text.rename(text.with_name("other.gguf"))
    with pytest.raises(FormatError, match="does not fit the name of the file"):
        read.GGUFFile(renamed)


def test_nothing_is_left_of_a_split_model_that_fails(split, tmp_path, monkeypatch):
    from vlmq_export.formats.gguf import completeness

    monkeypatch.setattr(completeness, "_key_problems", lambda *_: ["key x is missing"])
    with pytest.raises(FormatError, match="key x is missing"):
        gguf.write(split[0], tmp_path, FormatOptions(name="tiny-vlm", gguf_split_bytes=LIMIT))
    assert not list(tmp_path.iterdir())


def test_a_model_below_the_limit_is_one_file_with_a_plain_name(split, tmp_path):
    gguf.write(split[0], tmp_path, replace(FormatOptions(name="tiny-vlm"), gguf_split_bytes=10**9))
    assert not [f.name for f in tmp_path.iterdir() if "-of-" in f.name]


def test_sizes_of_the_option():
    for size, wanted in (("500M", 500 * 10**6), ("2G", 2 * 10**9), (None, 0)):
        recipe = Recipe(format=["gguf"], split_max_size=size)
        assert recipe.format_options("x").gguf_split_bytes == wanted
    for wrong in ("2", "0G", "2 G", "2T", "-1G"):
        with pytest.raises(ValueError, match="split_max_size"):
            Recipe(format=["gguf"], split_max_size=wrong)
