"""Gemma 3 in llama.cpp: what no other family has, and faults that only it can have."""

from __future__ import annotations

from functools import partial

import gguf
import numpy as np
import pytest
import torch

from runtime_tests.test_gguf import assert_all_pass, export, native, rewrite, row, run_check
from runtime_tests.test_gguf_families import copied, llama_tokens
from tests.artifacts import GRIDS
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.gguf.files.container import Entry, write_container
from vlmq_export.formats.gguf.proof.twin_file import copy_container
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.runtime.prompts import Prompts
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.proof.checks import CheckSettings

SETTINGS = CheckSettings(images=1, questions=1, threads=1)
# Seven layers, of which the sixth sees all tokens, as published.
PUBLISHED = {"layers": 7, "shape": {"text_config": {"sliding_window_pattern": 6}}}


def slow(*values):
    """Parameters that CI leaves out."""
    marks = pytest.mark.slow
    return [pytest.param(*(v if isinstance(v, tuple) else (v,)), marks=marks) for v in values]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(grid, **options of make_tiny) → (reference, folder), made once."""
    made = {}

    def get(grid="w4", **options):
        key = f"{grid} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("gemma3")
            source = make_tiny(folder / "source", "gemma3", **options)
            made[key] = export(folder, GRIDS[grid], source)
        return made[key]

    return get


def metadata_changed(path, **changes):
    """The same GGUF with other values of keys."""
    file = GGUFFile(path)

    def metadata(writer):
        for key, value in (file.metadata | changes).items():
            kind = gguf.GGUFValueType(file.types[key])
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
            elif key != "general.architecture":
                writer.add_key_value(key, value, kind)

    entries = [
        Entry(t.name, t.shape, t.type, lambda name=t.name: file.raw(name).copy())
        for t in file.tensors.values()
    ]
    write_container(path, file.metadata["general.architecture"], metadata, entries)


@pytest.mark.parametrize("grid", ["w4g32", "w8g128", *slow("w2g128")])
def test_every_grid_passes_every_gate(grid, exported):
    assert_all_pass(run_check(*exported(grid), SETTINGS))


def test_the_published_layers_and_a_tied_output_pass(exported):
    reference, folder = exported(tied=True, **PUBLISHED)
    file = GGUFFile(find_files(folder)[0])
    assert "gemma3.attention.sliding_window_pattern" not in file.metadata
    assert "output.weight" not in file.tensors
    assert_all_pass(run_check(reference, folder, SETTINGS))


def test_the_default_mix_passes_every_gate(tmp_path):
    source = make_tiny(tmp_path / "source", "gemma3", tied=True)
    reference, folder = native(tmp_path, "Q4_K_M", source)
    rows = run_check(reference, folder, SETTINGS)
    assert_all_pass(rows)
    assert row(rows, "weights by llama.cpp").compared == reference.weights.count


def test_one_changed_byte_is_caught_and_named(exported, tmp_path):
    reference, folder = copied(exported("w4g32"), tmp_path)
    file, name = find_files(folder)[0], "blk.1.ffn_down.weight"
    t = GGUFFile(file).tensors[name]
    data = bytearray(file.read_bytes())
    data[t.offset + 7 * TYPES[t.type].nbytes] ^= 1  # the last digit of a scale
    file.write_bytes(data)
    rows = run_check(reference, folder, SETTINGS)
    caught = [c for c in rows if c.status == "failed"]
    assert {"L1", "L2"} <= {c.level for c in caught}
    assert all("layers.1.mlp.down_proj" in c.worst for c in caught if c.level in ("L1", "L2"))


@pytest.mark.parametrize(
    "key",
    [
        "gemma3.attention.sliding_window_pattern",
        "gemma3.rope.scaling.factor",
        *slow(
            "gemma3.attention.sliding_window",
            "gemma3.rope.freq_base",
            "gemma3.attention.key_length",
        ),
    ],
)
def test_a_key_of_the_layers_that_is_missing(key, exported, tmp_path):
    """llama.cpp has defaults for each, and says nothing."""
    reference, folder = copied(exported(), tmp_path)
    rewrite(find_files(folder)[0], drop_key=key)
    rows = run_check(reference, folder, SETTINGS)
    assert f"{key} is missing" in row(rows, "metadata and names").worst
    assert row(rows, "float32 twin").status == "failed"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("gemma3.rope.freq_base_swa", 1e6),
        ("gemma3.attention.sliding_window", 25),
        *slow(
            ("gemma3.attention.sliding_window_pattern", [False, True]),
            ("gemma3.rope.scaling.factor", 4.0),
            ("gemma3.attention.layer_norm_rms_epsilon", 1e-5),
        ),
    ],
)
def test_another_value_of_a_key_of_the_layers(key, value, exported, tmp_path):
    reference, folder = copied(exported(), tmp_path)
    metadata_changed(find_files(folder)[0], **{key: value})
    rows = run_check(reference, folder, SETTINGS)
    assert key in row(rows, "metadata and names").worst
    if "epsilon" not in key:  # the reference takes that from llama.cpp, and says so
        assert row(rows, "float32 twin, image prompts").status == "failed"


@pytest.mark.parametrize(
    ("which", "name"),
    [
        (0, "blk.1.post_ffw_norm.weight"),
        (1, "mm.soft_emb_norm.weight"),
        *slow((0, "output_norm.weight")),
    ],
)
def test_a_norm_without_the_one_that_is_added(which, name, exported, tmp_path):
    reference, folder = copied(exported(), tmp_path)
    file = find_files(folder)[which]
    other = tmp_path / "other.gguf"
    copy_container(file, other, change=lambda n, a: a - 1 if n == name else a)
    other.replace(file)
    rows = run_check(reference, folder, SETTINGS)
    assert row(rows, "weights by our reader").status == "failed"
    seen = "image embeddings of mtmd" if which else "float32 twin, text prompts"
    assert row(rows, seen).status == "failed"


def test_image_tokens_that_see_backwards_alone(exported, monkeypatch):
    reference, folder = exported()
    exact = Prompts.exact

    def causal(self, sample, tag, **wanted):
        request = exact(self, sample, tag, **wanted)
        for segment in request["segments"]:
            segment["both ways"] = False
        return request

    monkeypatch.setattr(Prompts, "exact", causal)
    rows = run_check(reference, folder, SETTINGS)
    assert row(rows, "float32 twin, text prompts").status == "passed"
    assert row(rows, "float32 twin, image prompts").status == "failed"


def test_another_activation_of_the_mlps(exported, monkeypatch):
    """Far from zero SiLU is GELU. The row of the twin as it ships tells them apart."""
    reference, folder = exported()
    silu = partial(torch.nn.functional.silu)
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate="none": silu(x))
    for layer in reference.model.get_decoder().layers:
        monkeypatch.setattr(layer.mlp.act_fn, "act", silu)
    with reference.changed():
        rows = run_check(reference, folder, SETTINGS)
    assert row(rows, "float32 twin, text prompts").status == "passed"
    table = row(rows, "float32 twin with GELU from llama.cpp's table")
    assert table.status == "failed" and table.value > 1e-2


def test_what_mtmd_leaves_to_the_caller_is_told(exported):
    """The processor writes two line breaks before an image and behind it."""
    reference, folder = exported()
    rows = run_check(reference, folder, SETTINGS)
    bare = row(rows, "an image without the line breaks around it")
    assert bare.status == "info" and bare.value > 1e-3
    assert row(rows, "prompts tokenized by llama.cpp").status == "passed"


def test_llama_cpp_merges_characters_by_the_scores(exported, tmp_path):
    reference, folder = exported()
    file, tokenizer = find_files(folder)[0], reference.preprocessor.tokenizer
    words = ["How many  bars\n\n\nare shown?", "   text", "naïve façade…", "a\tb", "\n" * 9]
    words += [" " * n + "the" for n in range(12)]

    def differing(path):
        return [
            w
            for w in words
            if llama_tokens(path, w) != tokenizer(w, add_special_tokens=False)["input_ids"]
        ]

    assert differing(file) == []
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes())
    scores = GGUFFile(file).metadata["tokenizer.ggml.scores"]
    metadata_changed(other, **{"tokenizer.ggml.scores": [-s for s in scores]})
    assert differing(other)


def test_the_rows_of_an_image_are_pooled_by_the_factor(exported, tmp_path):
    reference, folder = copied(exported(), tmp_path)
    rewrite(find_files(folder)[1], drop_key="clip.vision.projector.scale_factor")
    rows = run_check(reference, folder, SETTINGS)
    assert "scale_factor is missing" in row(rows, "metadata and names").worst
    assert row(rows, "prompts tokenized by llama.cpp").status == "failed"


def test_the_projection_is_as_on_the_hub(exported):
    reference, folder = exported()
    written = GGUFFile(find_files(folder)[1]).array("mm.input_projection.weight")
    name = "multi_modal_projector.mm_input_projection_weight"
    assert np.array_equal(written, reference.weights.array(name))
