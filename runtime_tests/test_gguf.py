"""llama.cpp against the fake-quantized reference, and changed files that must be caught by name."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import dataclass

import gguf
import numpy as np
import pytest
from PIL import Image

from tests.artifacts import GRIDS, edit, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.errors import MissingRuntime
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.files.container import Entry, write_container
from vlmq_export.formats.gguf.proof import check
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.runtime import llama, runner
from vlmq_export.formats.gguf.runtime.prompts import Prompts
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.recipes.recipe import Recipe
from vlmq_export.sources.locate import open_source

SETTINGS = CheckSettings(images=3, questions=5, threads=1)
# tag of GRIDS → the block types that may hold it
HOMES = {
    "w4g128": {"Q4_1"},
    "w4": {"Q4_K"},
    "w4g128-sym": {"Q4_0"},
    "w8g128": {"Q8_0"},
    "w2": {"Q2_K", "TQ2_0"},
    "w3-sym": {"Q3_K"},
    "w3g128": {"Q4_0"},
    "w2g128": {"Q4_0"},
}


def export(folder, config, source=REFERENCE_VLM, options=None, config_edit=None):
    """(reference, GGUF folder) of a model that is rounded to nearest.

    `config_edit` changes the config.json in the artifact.
    """
    artifact = rtn_artifact(folder / "artifact", config, source)
    if config_edit:
        edit(artifact.source / "config.json", config_edit)
        artifact = Artifact(artifact.path)
    (folder / "gguf").mkdir()
    FORMATS["gguf"].write(artifact, folder / "gguf", options or FormatOptions())
    return Reference(artifact.path, read_rows(HELDOUT)[:6]), folder / "gguf"


def hub_names(reference) -> dict[str, str]:
    """GGUF name → hub name, of the text model."""
    return {n: x.hub for n, x in Layout.of(reference.architecture).text.items()}


def run_check(reference, folder, settings=SETTINGS):
    return FORMATS["gguf"].check(folder, reference, FormatOptions(), settings)


def assert_all_pass(rows):
    wrong = [c for c in rows if c.status not in ("passed", "info")]
    assert not wrong, wrong
    assert {c.level for c in rows if c.status == "passed"} == {"L1", "L2", "L3"}


def row(rows, name):
    """The first row whose name begins with `name`."""
    return next(c for c in rows if c.name.startswith(name))


@pytest.fixture(scope="module")
def q4_1(tmp_path_factory):
    return export(tmp_path_factory.mktemp("q4_1"), GRIDS["w4g128"])


@pytest.fixture(scope="module")
def q4_k(tmp_path_factory):
    return export(tmp_path_factory.mktemp("q4_k"), GRIDS["w4"])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A random model of two layers, because the nearest points of a lattice take long to find."""
    return make_random_checkpoint(tmp_path_factory.mktemp("few"), layers=2)


@pytest.fixture(scope="module")
def natives(few, tmp_path_factory):
    mixes = ("Q2_K", "IQ4_XS", "IQ2_XXS")
    return {mix: native(tmp_path_factory.mktemp(mix), mix, few) for mix in mixes}


# --- everything right -----------------------------------------------------------------------------


@pytest.mark.parametrize("tag", HOMES)
def test_every_home_passes_every_gate(tag, tmp_path):
    reference, folder = export(tmp_path, GRIDS[tag])
    types = {t.type for t in GGUFFile(find_files(folder)[0]).tensors.values()}
    quantized = types - {"F32", "F16", "BF16"}
    assert quantized and quantized <= HOMES[tag]
    rows = run_check(reference, folder)
    assert_all_pass(rows)
    readers = [c for c in rows if c.name.startswith("weights by")]
    assert len(readers) == 3
    assert {c.compared for c in readers} == {reference.weights.count}
    tower = 4 * 7 + 2  # four blocks, and the projector
    assert row(rows, "linears seen").compared == len(reference.weights.linears) + tower


def native(folder, mix, source):
    """(reference, GGUF folder) of a model that is rounded to nearest on the types of a mix."""
    recipe = Recipe(method="rtn", gguf_type=mix, format=["gguf"])
    checkpoint = Checkpoint(source)
    config = open_source(str(source)).plan(recipe).model.config
    quantize(checkpoint, [], config, folder / "artifact", name="tiny-vlm", calibration={})
    (folder / "gguf").mkdir()
    FORMATS["gguf"].write(Artifact(folder / "artifact"), folder / "gguf", FormatOptions())
    return Reference(folder / "artifact", read_rows(HELDOUT)[:6]), folder / "gguf"


K_MIXES = ("Q2_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")
PLAIN_MIXES = ("TQ2_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL")
I_MIXES = ("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS")
SLOW_MIXES = [pytest.param(m, marks=pytest.mark.slow) for m in (*K_MIXES, *PLAIN_MIXES, *I_MIXES)]


@pytest.mark.parametrize("mix", ["Q2_K", "Q8_0", "IQ3_XXS", *SLOW_MIXES])
def test_every_mix_passes_every_gate(mix, few, tmp_path):
    reference, folder = native(tmp_path, mix, few if mix.startswith("IQ") else REFERENCE_VLM)
    text, _ = find_files(folder)
    assert mix in text.name
    types = {t.type for t in GGUFFile(text).tensors.values()} - {"F32"}
    assert types == set(Artifact(tmp_path / "artifact").config.types.values())
    rows = run_check(reference, folder)
    assert_all_pass(rows)
    assert row(rows, "weights by llama.cpp").compared == reference.weights.count


@pytest.mark.parametrize(
    ("mix", "name", "byte"),
    [
        ("Q2_K", "blk.0.attn_q.weight", 5),
        ("Q2_K", "blk.1.ffn_up.weight", 83),
        ("IQ4_XS", "blk.1.ffn_up.weight", 3),
        ("IQ2_XXS", "blk.0.attn_q.weight", 2),
    ],
    ids=["scale and minimum of a sub-block", "dmin", "upper bits of a scale", "point"],
)
def test_one_changed_byte_of_a_block_is_caught_and_named(mix, name, byte, natives, tmp_path):
    reference, folder = natives[mix]
    file, _ = find_files(shutil.copytree(folder, tmp_path / "gguf"))
    t = GGUFFile(file).tensors[name]
    assert t.type == mix
    data = bytearray(file.read_bytes())
    data[t.offset + 7 * TYPES[mix].nbytes + byte] ^= 0x10
    file.write_bytes(data)
    rows = run_check(reference, tmp_path / "gguf")
    caught = [r for r in rows if r.level == "L1" and r.status == "failed"]
    assert len(caught) == 3 and all(hub_names(reference)[name] in r.worst for r in caught)


@pytest.mark.parametrize(
    ("arch", "tied"), [("qwen2_vl", True), ("qwen2_vl", False), ("qwen2_5_vl", False)]
)
def test_random_models_pass_every_gate(arch, tied, tmp_path):
    make_random_checkpoint(tmp_path / "model", arch=arch, tied=tied)
    options = FormatOptions(mmproj_dtype="f16" if tied else "f32")
    reference, folder = export(tmp_path, GRIDS["w4g128"], tmp_path / "model", options)
    assert_all_pass(run_check(reference, folder))


def test_two_images_of_other_shapes_and_a_prompt_without_one(tmp_path):
    reference, folder = export(tmp_path, GRIDS["w4"])
    for name, size in (("wide", (224, 84)), ("tall", (56, 168))):
        Image.effect_noise(size, 90).convert("RGB").save(tmp_path / f"{name}.png")
    answer = {"from": "gpt", "value": "x"}
    two = [{"from": "human", "value": "<image>\n<image>\nRead the text."}, answer]
    none = [{"from": "human", "value": "Read the text."}, answer]
    rows = [
        {"id": "a/two", "image": ["wide.png", "tall.png"], "conversations": two},
        {"id": "none", "conversations": none},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    both = read_rows(tmp_path / "rows.json")
    checked = run_check(Reference(reference.artifact, both), folder)
    assert_all_pass(checked)
    assert row(checked, "prompts tokenized").compared == 1
    bare = run_check(Reference(reference.artifact, both[1:]), folder)
    assert {c.level for c in bare if c.status == "not run"} == {"L2", "L3"}
    assert "no held-out prompt has an image" in row(bare, "float32 twin").detail


def test_the_epsilon_comes_from_the_load_log_and_its_effect_is_a_row_of_its_own(q4_1):
    rows = run_check(*q4_1)
    plain = row(rows, "float32 twin against the unmodified reference")
    assert plain.status == "info"
    assert plain.value > 10 * row(rows, "float32 twin, image prompts").value
    assert "(0)" in row(rows, "float32 twin, text prompts").detail


# --- changed files --------------------------------------------------------------------------------


@dataclass
class Bytes:
    """A copy of an exported folder whose bytes a test changes in place."""

    reference: Reference
    folder: object
    draw: random.Random

    def tensor(self, name):
        path = next(f for f in find_files(self.folder) if name in GGUFFile(f).tensors)
        return path, GGUFFile(path).tensors[name]

    def block(self, name):
        """(file, start of a randomly drawn block)."""
        path, t = self.tensor(name)
        kind = TYPES[t.type]
        return path, t.offset + self.draw.randrange(t.nbytes // kind.nbytes) * kind.nbytes

    @staticmethod
    def patch(path, at, change, size=2):
        """Replace the integer of `size` bytes at an offset by `change` of it."""
        data = bytearray(path.read_bytes())
        new = change(int.from_bytes(data[at : at + size], "little"))
        data[at : at + size] = new.to_bytes(size, "little")
        path.write_bytes(data)

    def scale_up(self, name):
        """d of one block, with which blocks of Q4_1 and Q4_K begin, by one unit."""
        path, at = self.block(name)
        self.patch(path, at, lambda half: half + 1)

    def zero_up(self, name):
        """One zero-point by one: m = −s·z of Q4_1, or the minimum of a sub-block of Q4_K."""
        path, at = self.block(name)
        if self.tensor(name)[1].type == "Q4_1":
            raw = path.read_bytes()
            d, m = np.frombuffer(raw, "<f2", 2, at).astype(np.float32)
            self.patch(path, at + 2, lambda _: int(np.float16(m - d).view(np.uint16)))
        else:  # six bits of this byte are the minimum of the first sub-block
            self.patch(path, at + 8, lambda b: (b & 0xC0) | ((b & 63) + 1), size=1)

    def code_up(self, name):
        """One code by one."""
        path, at = self.block(name)
        start = {"Q4_1": 4, "Q4_K": 16}[self.tensor(name)[1].type]
        size = TYPES[self.tensor(name)[1].type].nbytes - start
        self.patch(path, at + start + self.draw.randrange(size), lambda b: b ^ 1, size=1)


def copy_of(exported, tmp_path, seed):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "gguf")
    return Bytes(reference, tmp_path / "gguf", random.Random(seed))


def names_at_random(draw, layers):
    """One linear each of the first, a middle and the last layer."""
    kinds = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]
    chosen = (0, draw.randrange(1, layers - 1), layers - 1)
    return [f"blk.{layer}.{draw.choice(kinds)}.weight" for layer in chosen]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("home", ["q4_1", "q4_k"])
def test_a_scale_a_zero_a_code_and_an_mmproj_weight_are_caught_by_decoding(
    home, seed, request, tmp_path
):
    fault = copy_of(request.getfixturevalue(home), tmp_path, seed)
    hit = names_at_random(fault.draw, 6)
    changes = (fault.scale_up, fault.zero_up, fault.code_up)
    for change, name in zip(changes, fault.draw.sample(hit, 3)):
        change(name)
    vision = f"v.blk.{fault.draw.randrange(4)}.ffn_up.weight"
    path, t = fault.tensor(vision)
    fault.patch(path, t.offset + 2 * fault.draw.randrange(t.nbytes // 2), lambda half: half ^ 1)
    rows = run_check(fault.reference, fault.folder)
    hub = hub_names(fault.reference)
    for c in [c for c in rows if c.name.startswith("weights by")]:
        assert c.status == "failed"
        for name in [hub[n] for n in hit] + [vision]:
            assert name in c.worst, c
    products = row(rows, "every product of the language model")
    assert products.status == "failed"
    for name in hit:
        assert hub[name] in products.worst, products


@pytest.mark.parametrize("home", ["q4_1", "q4_k"])
def test_one_ulp_of_one_scale_is_above_the_gate_of_every_linear(home, request, tmp_path):
    fault = copy_of(request.getfixturevalue(home), tmp_path, seed=7)
    text = GGUFFile(find_files(fault.folder)[0])
    linears = [n for n, t in text.tensors.items() if TYPES[t.type].block > 1]
    for name in linears[:: len(linears) // 8]:
        fault.scale_up(name)
    rows = run_check(fault.reference, fault.folder)
    assert row(rows, "weights by llama.cpp").worst.count("(") == 8  # as many as a row names
    products = row(rows, "every product of the language model")
    assert products.status == "failed"
    assert products.worst.count(" row ") == 8
    assert products.value > 2e-6
    # no gate on logits can see such changes
    assert row(rows, "shipped file through mtmd").status == "passed"


def rewrite(path, *, drop_tensor="", drop_key=""):
    """The same GGUF without one tensor or one key."""
    file = GGUFFile(path)

    def metadata(writer):
        for key, value in file.metadata.items():
            kind = gguf.GGUFValueType(file.types[key])
            if key in ("general.architecture", drop_key):
                continue
            if isinstance(value, list):
                writer.add_key_value(key, value, gguf.GGUFValueType.ARRAY, sub_type=kind)
            else:
                writer.add_key_value(key, value, kind)

    entries = [
        Entry(t.name, t.shape, t.type, lambda name=t.name: file.raw(name).copy())
        for t in file.tensors.values()
        if t.name != drop_tensor
    ]
    write_container(path, file.metadata["general.architecture"], metadata, entries)


def test_a_rewritten_file_is_still_right(q4_1, tmp_path):
    fault = copy_of(q4_1, tmp_path, 0)
    rewrite(find_files(fault.folder)[0])
    assert_all_pass(run_check(fault.reference, fault.folder))


def test_a_dropped_bias_is_caught_by_completeness_weights_and_twin(q4_1, tmp_path):
    fault = copy_of(q4_1, tmp_path, 0)
    layer = fault.draw.randrange(6)
    name = f"blk.{layer}.attn_q.bias"
    rewrite(find_files(fault.folder)[0], drop_tensor=name)
    rows = run_check(fault.reference, fault.folder)
    assert f"tensor {name} is missing" in row(rows, "metadata and names").worst
    missing = f"model.layers.{layer}.self_attn.q_proj.bias (missing)"
    readers = [c for c in rows if c.name.startswith("weights by")]
    assert all(c.status == "failed" and missing in c.worst for c in readers)
    assert row(rows, "float32 twin, text prompts").status == "failed"
    assert row(rows, "float32 twin, image prompts").status == "failed"
    # products are compared without their biases
    assert row(rows, "every product of the language model").status == "passed"


def test_a_dropped_rope_base_is_caught_by_completeness_and_twin(tmp_path):
    """Without the key llama.cpp assumes 10000, so the model here is given another rope base."""

    def theta(config):
        config["text_config"]["rope_parameters"]["rope_theta"] = 1e6

    reference, folder = export(tmp_path, GRIDS["w4g128"], config_edit=theta)
    assert_all_pass(run_check(reference, folder))
    rewrite(find_files(folder)[0], drop_key="qwen2vl.rope.freq_base")
    rows = run_check(reference, folder)
    assert "qwen2vl.rope.freq_base is missing" in row(rows, "metadata and names").worst
    assert row(rows, "float32 twin, text prompts").status == "failed"
    assert row(rows, "float32 twin, image prompts").status == "failed"
    assert row(rows, "weights by llama.cpp").status == "passed"


# --- a runtime that refuses, crashes or is not there ----------------------------------------------


def test_a_file_that_llama_cpp_refuses_is_failed_rows_of_one_line(q4_1, tmp_path):
    fault = copy_of(q4_1, tmp_path, 0)
    rewrite(find_files(fault.folder)[0], drop_key="qwen2vl.rope.dimension_sections")
    rows = run_check(fault.reference, fault.folder)
    for name in ("every product", "shipped file through mtmd", "float32 twin"):
        c = row(rows, name)
        assert c.status == "failed"
        assert c.detail.startswith("loading ")
        assert "rope.dimension_sections" in c.detail
        assert "\n" not in c.detail


def test_an_assertion_inside_llama_cpp_is_a_failed_row_too(q4_1, tmp_path):
    """llama.cpp loads M-RoPE sections of zero, and aborts its process at the first token."""
    fault = copy_of(q4_1, tmp_path, 0)
    path = find_files(fault.folder)[0]
    raw, key = path.read_bytes(), b"qwen2vl.rope.dimension_sections"
    at = raw.index(key) + len(key) + 16  # after the types and the length of the array
    assert np.frombuffer(raw, "<i4", 4, at).tolist() == [8, 12, 12, 0]
    path.write_bytes(raw[:at] + bytes(16) + raw[at + 16 :])
    rows = run_check(fault.reference, fault.folder)
    c = row(rows, "every product")
    assert c.status == "failed"
    assert "GGML_ASSERT" in c.detail
    assert "running prompt" in c.detail
    assert "\n" not in c.detail
    assert row(rows, "float32 twin").status == "failed"


def test_a_truncated_file_is_one_failed_row(q4_1, tmp_path):
    fault = copy_of(q4_1, tmp_path, 0)
    path = find_files(fault.folder)[0]
    path.write_bytes(path.read_bytes()[:-4096])
    (c,) = run_check(fault.reference, fault.folder)
    assert c.status == "failed"
    assert path.name in c.detail


def test_a_missing_runtime_is_not_run_never_passed(q4_1, monkeypatch):
    def absent(*_):
        raise MissingRuntime("xllamacpp 1.0 is installed")

    monkeypatch.setattr(runner, "run", absent)
    rows = run_check(*q4_1)
    assert {c.level for c in rows if c.status == "not run"} == {"L2", "L3"}
    assert {c.level for c in rows if c.status == "passed"} == {"L1"}
    monkeypatch.setattr(check, "missing", lambda: "xllamacpp")
    rows = run_check(*q4_1)
    assert {c.status for c in rows} == {"not run"}
    assert {c.level for c in rows} == {"L1", "L2", "L3"}


def test_another_build_of_llama_cpp_is_refused(monkeypatch):
    monkeypatch.setattr(llama, "PIN", "1.0")
    with pytest.raises(MissingRuntime, match="struct layouts are not known"):
        llama.library_path()
    monkeypatch.undo()
    monkeypatch.setitem(llama._DEFAULTS["llama_context_default_params"], "n_batch", 4096)
    with pytest.raises(MissingRuntime, match="another default for n_batch"):
        llama.load(lambda level, line: None)


# --- our driver of llama.cpp ----------------------------------------------------------------------


def test_a_cleared_context_is_a_fresh_one_and_nothing_reaches_our_output(q4_1, tmp_path, capfd):
    """A prompt has the same logits, bit for bit, whatever ran before it in the context.

    Capturing its products does not change them either.
    """
    reference, folder = q4_1
    text, mmproj = find_files(folder)
    a, b = reference.prompts[:2]
    requests = Prompts(reference, Layout.of(reference.architecture), tmp_path)
    prompts = [requests.exact(s, f"p{i}", logits=True) for i, s in enumerate((a, b, a, a))]
    prompts[3]["capture"] = True
    prompts += [requests.mtmd(s, f"m{i}", logits=True, answer=4) for i, s in enumerate((a, b, a))]
    capfd.readouterr()  # discards what transformers printed when it loaded the reference
    run = runner.run(tmp_path, text, mmproj, prompts, reference, 1, 4)
    np.testing.assert_array_equal(run.logits(0), run.logits(2))
    np.testing.assert_array_equal(run.logits(0), run.logits(3))
    np.testing.assert_array_equal(run.logits(4), run.logits(6))
    assert run.prompts[4]["answer"] == run.prompts[6]["answer"]
    assert not np.array_equal(run.logits(0)[-1], run.logits(1)[-1])
    assert capfd.readouterr() == ("", "")
    assert run.eps == 0
