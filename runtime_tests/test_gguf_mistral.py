"""Mistral 3 in llama.cpp: what no other family has, and faults that only it can have."""

from __future__ import annotations

import numpy as np
import pytest

from runtime_tests.test_gguf import assert_all_pass, export, native, rewrite, row, run_check
from runtime_tests.test_gguf_families import copied
from runtime_tests.test_gguf_gemma import metadata_changed, slow
from tests.artifacts import GRIDS
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.proof.twin_file import copy_container
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.runtime import prompts
from vlmq_export.formats.proof.checks import CheckSettings

SETTINGS = CheckSettings(images=1, questions=1, threads=1)
TEXT, MMPROJ = 0, 1
BREAK = "v.token_embd.img_break"
HALVES = {TEXT: 128, MMPROJ: 64}  # columns of a head


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(family) → (reference, folder), made once."""
    made = {}

    def get(arch="ministral3"):
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            source = make_tiny(folder / "source", arch)
            made[arch] = export(folder, GRIDS["w4"], source, FormatOptions(mmproj_dtype="f32"))
        return made[arch]

    return get


def changed(folder, which, change):
    """Put a float32 copy in the place of a file, with `change` made to its tensors."""
    file = find_files(folder)[which]
    other = folder / "other.gguf"
    copy_container(file, other, change=change)
    other.replace(file)


@pytest.mark.slow
@pytest.mark.parametrize("grid", ["w4g32", "w8g128", "w2g128"])
def test_other_grids_and_a_tied_output_pass_every_gate(grid, tmp_path):
    source = make_tiny(tmp_path / "source", "ministral3", tied=True)
    assert_all_pass(run_check(*export(tmp_path, GRIDS[grid], source), SETTINGS))


@pytest.mark.slow
def test_the_default_mix_passes_every_gate(tmp_path):
    """Its embedding is quantized, and the mmproj has the numbers that a row of it decodes to."""
    source = make_tiny(tmp_path / "source", "mistral3", tied=True)
    reference, folder = native(tmp_path, "Q4_K_M", source)
    assert_all_pass(run_check(reference, folder, SETTINGS))
    text, mmproj = map(GGUFFile, find_files(folder))
    number = reference.preprocessor.tokenizer.convert_tokens_to_ids("[IMG_BREAK]")
    assert text.tensors["token_embd.weight"].type == "Q6_K"
    assert np.array_equal(mmproj.array(BREAK), text.array("token_embd.weight")[number])


def test_a_tower_in_eight_bits_passes_every_gate(tmp_path):
    """Its float32 twin is held to the reference with the same matrices, in the source's order."""
    source, options = make_tiny(tmp_path / "source", "mistral3"), FormatOptions(mmproj_dtype="q8_0")
    rows = run_check(*export(tmp_path, GRIDS["w4"], source, options), SETTINGS)
    assert_all_pass(rows)
    assert row(rows, "image embeddings of the mmproj's float32 twin").value < 1e-3


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.temperature_scale", None),
        ("rope.scaling.type", None),
        *slow(
            ("rope.scaling.factor", None),
            ("rope.scaling.original_context_length", None),
            ("rope.scaling.yarn_log_multiplier", None),
            ("rope.freq_base", None),
            ("attention.temperature_scale", 0.11),
            ("rope.scaling.factor", 8.0),
            ("rope.scaling.original_context_length", 17),
            ("rope.scaling.yarn_log_multiplier", 0.5),
            ("rope.scaling.yarn_beta_fast", 0.5),
            ("rope.scaling.yarn_beta_slow", 2.0),
        ),
    ],
)
def test_a_key_of_the_positions_that_is_missing_or_changed(key, value, exported, tmp_path):
    """Queries grow from position 16 on in this model, which text and image prompts both reach."""
    reference, folder = copied(exported(), tmp_path)
    key, text = f"mistral3.{key}", find_files(folder)[TEXT]
    if value is None:
        rewrite(text, drop_key=key)
    else:
        metadata_changed(text, **{key: value})
    rows = run_check(reference, folder, SETTINGS)
    assert key in row(rows, "metadata and names").worst
    for kind in ("text", "image"):
        twin = row(rows, f"float32 twin, {kind} prompts")
        assert twin.status == "failed" and twin.value > 1e-4, (kind, twin.value)


@pytest.mark.parametrize("which", [TEXT, MMPROJ])
def test_rows_of_rotary_pairs_in_transformers_order(which, exported, tmp_path):
    """The weights are all there, and llama.cpp would turn the wrong ones together."""
    reference, folder = copied(exported(), tmp_path)
    head = HALVES[which]
    back = np.arange(head).reshape(-1, 2).T.ravel()  # of a head: from neighbours to halves

    def halves(name, array):
        if not name.endswith(("attn_q.weight", "attn_k.weight")):
            return array
        return array.reshape(-1, head, array.shape[1])[:, back].reshape(array.shape)

    changed(folder, which, halves)
    rows = run_check(reference, folder, SETTINGS)
    assert row(rows, "weights by our reader").status == "failed"
    seen = ("float32 twin, text prompts", "image embeddings of mtmd")[which]
    assert row(rows, seen).status == "failed"


@pytest.mark.parametrize(
    ("name", "change"),
    [
        (BREAK, lambda a: a[::-1]),
        *slow(
            (
                "mm.patch_merger.weight",
                lambda a: a.reshape(256, 256, 4)[..., ::-1].reshape(a.shape),
            ),
            ("mm.input_norm.weight", np.ones_like),
            ("v.pre_ln.weight", np.ones_like),
        ),
    ],
)
def test_a_changed_tensor_of_the_mmproj(name, change, exported, tmp_path):
    reference, folder = copied(exported(), tmp_path)
    changed(folder, MMPROJ, lambda n, a: change(a) if n == name else a)
    rows = run_check(reference, folder, SETTINGS)
    for reader in ("gguf-py", "llama.cpp's own decoder", "our reader"):
        assert name in row(rows, f"weights by {reader}").worst
    assert row(rows, "image embeddings of mtmd").status == "failed"


@pytest.mark.slow
@pytest.mark.parametrize("key", ["clip.vision.spatial_merge_size", "clip.use_silu"])
def test_a_key_that_the_tower_cannot_do_without(key, exported, tmp_path):
    reference, folder = copied(exported(), tmp_path)
    rewrite(find_files(folder)[MMPROJ], drop_key=key)
    rows = run_check(reference, folder, SETTINGS)
    assert f"{key} is missing" in row(rows, "metadata and names").worst
    assert any(c.status == "failed" for c in rows if c.level == "L3")


def test_breaks_that_are_not_looked_for_are_missed(exported, monkeypatch):
    """mtmd gives the embedding behind each line as a row, where transformers has a token."""
    reference, folder = exported()
    tokenizer = reference.preprocessor.tokenizer
    monkeypatch.setattr(tokenizer, "convert_tokens_to_ids", lambda _: -1, raising=False)
    rows = run_check(reference, folder, SETTINGS)
    assert row(rows, "prompts tokenized by llama.cpp").status == "failed"
    assert row(rows, "image embeddings of mtmd").value == float("inf")


def test_the_most_tokens_of_an_image_reach_mtmd(exported, monkeypatch):
    """It makes larger images smaller; its own limit is 1024, and that of a model may be 3025."""
    monkeypatch.setattr(prompts, "TOKENS", (8, 16))
    tokens = row(run_check(*exported(), SETTINGS), "prompts tokenized by llama.cpp")
    assert tokens.status == "failed"
