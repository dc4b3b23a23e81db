"""Gemma 3 in ONNX Runtime and onnxruntime-genai: what no other family has, and faults in it."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from runtime_tests import test_head
from runtime_tests.test_onnx import assert_all_pass, damage, export, run_check, two_images
from tests.artifacts import GRIDS, edit
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.onnx.graphs import traced_text
from vlmq_export.formats.onnx.proof.genai import GenaiModel, genai_rows, image_files
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE, HALF_GATE
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import CheckSettings, Steps, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

SETTINGS = CheckSettings(images=2, questions=2, threads=1)
GRAPHS = ("fused", "single", "plain")
# Seven layers, of which the sixth sees all tokens, as published.
PUBLISHED = {"layers": 7, "shape": {"text_config": {"sliding_window_pattern": 6}}}
# A window shorter than an image, and queries that are divided by another number than √128.
NARROW = {"shape": {"text_config": {"sliding_window": 9, "query_pre_attn_scalar": 80}}}
# Images of 256 tokens, which onnxruntime-genai asks for.
SIDE = 224
AS_GENAI = {"shape": {"vision_config": {"image_size": SIDE}, "mm_tokens_per_image": 256}}
LOGITS = "logits at accuracy_level 0"


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(graph, dtype, **options of make_tiny) → (reference, folder), made once."""
    made = {}

    def get(graph="fused", dtype="float32", **options):
        key = f"{graph} {dtype} {options}"
        if key not in made:
            folder = tmp_path_factory.mktemp("gemma3")
            source = make_tiny(folder / "source", "gemma3", **options)
            if options == AS_GENAI:
                size = {"size": {"height": SIDE, "width": SIDE}, "image_seq_length": 256}
                edit(source / "preprocessor_config.json", lambda j: j.update(size))
                edit(source / "processor_config.json", lambda j: j.update(image_seq_length=256))
            written = FormatOptions(onnx_graph=graph, onnx_dtype=dtype)
            made[key] = export(folder, GRIDS["w4g128"], source, written, rows=4)
        return made[key]

    return get


def row(rows, name):
    return next(r for r in rows if r.name.startswith(name))


def words(reference, text):
    """A prompt without an image."""
    turn = {"role": "user", "content": [{"type": "text", "text": text}]}
    given = replace(reference.rows[0], id=text, images=(), messages=(turn,))
    return reference.preprocessor.sample(given, prompt_only=True)


# --- windows and images ---------------------------------------------------------------------------


@pytest.mark.slow
def test_the_published_layers_and_a_tied_output_pass(exported):
    assert_all_pass(run_check(*exported(tied=True, **PUBLISHED), settings=SETTINGS))


@pytest.mark.parametrize("graph", ["fused", *slow("single", "plain")])
def test_a_window_shorter_than_an_image_passes_every_gate(exported, graph):
    reference, folder = exported(graph, **NARROW)
    options = FormatOptions(onnx_graph=graph)
    assert_all_pass(run_check(reference, folder, options, SETTINGS))


@pytest.mark.parametrize("graph", GRAPHS)
def test_prompts_far_longer_than_the_window(exported, graph):
    """At once, and then token by token through the cache, with images and without."""
    reference, folder = exported(graph, **NARROW)
    runner = OnnxRunner(folder)
    long = words(reference, "How many bars are shown, and which of them is the tallest? " * 4)
    for prompt in (long, two_images(reference)):
        positions, length = reference.position_ids(prompt), len(prompt.input_ids)
        assert length > 5 * 9
        want = reference.logits(prompt)
        got = runner.logits(prompt, positions)[:, : reference.vocabulary]
        assert relative_error(got, want) <= FORMAT_GATE
        images = prompt.vision.nonzero()
        split = int(images.max()) + 1 if len(images) else 3
        got = runner.stepwise(prompt, positions, split)[:, : reference.vocabulary]
        assert relative_error(got, want) <= FORMAT_GATE
        answer = runner.answer(prompt, positions, stop=reference.stop_ids)
        assert reference.judge(prompt, answer, FORMAT_GATE) != "other"


def test_the_cache_in_one_buffer(exported):
    """GroupQueryAttention that is not causal must not look behind the tokens that there are."""
    reference, folder = exported(**NARROW)
    runner, prompt = OnnxRunner(folder), reference.prompts[0]
    positions, length = reference.position_ids(prompt), len(prompt.input_ids)
    _, past = runner.prefill(prompt, positions)
    room = [(0, 0), (0, 0), (0, 20), (0, 0)]
    longer = {n: np.pad(c, room, constant_values=1000.0) for n, c in past.items()}
    token = runner.embed(np.array([[7]]))
    mask, at = np.ones((1, length + 1), np.int64), positions[..., -1:] + 1
    want, _ = runner.step(token, mask, at, past)
    feeds = {"inputs_embeds": token, "attention_mask": mask, "position_ids": at}
    binding = runner.text.io_binding()
    values = {n: onnxruntime.OrtValue.ortvalue_from_numpy(c) for n, c in longer.items()}
    for name, value in feeds.items():
        binding.bind_cpu_input(name, value)
    for name, value in values.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
    binding.bind_output("logits")
    runner.text.run_with_iobinding(binding)
    got = binding.copy_outputs_to_cpu()[-1]
    assert np.array_equal(got, want)
    after = values["past_key_values.0.key"].numpy()
    assert (after[:, :, length + 1 :] == 1000).all() and (after[:, :, length] != 1000).all()


# --- options --------------------------------------------------------------------------------------


def test_float16_has_a_gate_of_its_own(exported):
    reference, folder = exported(dtype="float16")
    options = FormatOptions(onnx_dtype="float16")
    rows = run_check(reference, folder, options, SETTINGS)
    assert_all_pass(rows)
    value, gate = row(rows, LOGITS).value, row(rows, LOGITS).gate
    assert gate == HALF_GATE and value is not None and value > FORMAT_GATE


@pytest.mark.parametrize("tied", [True, *slow(False)])
def test_tower_embedding_and_head_in_eight_bits_pass_every_gate(tmp_path, tied):
    source = make_tiny(tmp_path / "source", "gemma3", tied=tied)
    head = 0 if tied else 8
    config = QuantConfig("gptq", 4, 64, vision_bits=8, embedding_bits=8, head_bits=head)
    preprocessor = Preprocessor(source)
    samples = [preprocessor.sample(given) for given in read_rows(CALIBRATION)[:3]]
    given = {"name": "m", "calibration": {}, "device": "cpu"}
    quantize(Checkpoint(source), samples, config, tmp_path / "artifact", **given)
    folder = tmp_path / "onnx"
    folder.mkdir()
    FORMATS["onnx"].write(Artifact(tmp_path / "artifact"), folder, FormatOptions())
    reference = Reference(tmp_path / "artifact", read_rows(HELDOUT)[:2])
    assert_all_pass(run_check(reference, folder, settings=SETTINGS))
    written = OnnxFolder(folder)
    eight = [n for n in written.linears if written.linear(n).bits == 8]
    assert sum(reference.architecture.family.is_vision(n) for n in eight) == 3 * 6
    assert reference.architecture.family.embedding in eight


@pytest.mark.slow
def test_a_tied_head_of_its_own_passes(tmp_path):
    source = make_tiny(tmp_path / "source", "gemma3", tied=True)
    reference, folder = test_head.export(tmp_path, test_head.HEAD8, source)
    assert_all_pass(run_check(reference, folder, settings=SETTINGS))


# --- faults ---------------------------------------------------------------------------------------


def all_alike(attention_mask, image, window):
    """No layer has a window."""
    full = SEEN(attention_mask, image, window)["full_attention"]
    return {"full_attention": full, "sliding_attention": full}


SEEN = traced_text.seen_keys
FAULTS = {
    "no layer has a window": (traced_text, "seen_keys", all_alike),
    "image tokens see backwards alone": (
        traced_text,
        "seen_keys",
        lambda mask, image, window: SEEN(mask, torch.zeros_like(image), window),
    ),
    "no norm behind a sub-block": (traced_text.Text, "_behind", lambda self, layer, block, x: x),
    "a window of one token more": (
        traced_text,
        "seen_keys",
        lambda mask, image, window: SEEN(mask, image, window + 1),
    ),
    "words see both ways too": (
        traced_text,
        "seen_keys",
        lambda mask, image, window: SEEN(mask, torch.ones_like(image), window),
    ),
    "norms multiply by the weight": (
        traced_text.Text,
        "_norm",
        lambda self, norm, x: traced_text.rms_norm(norm, x),
    ),
    "embeddings are not scaled": (
        traced_text.Embedding,
        "_words",
        lambda self, ids: torch.nn.functional.embedding(ids, self.embed_tokens.weight),
    ),
}


@pytest.mark.parametrize("fault", [*list(FAULTS)[:3], *slow(*list(FAULTS)[3:])])
def test_a_graph_with_a_fault_is_caught_by_its_logits(exported, tmp_path, monkeypatch, fault):
    """All weights are right, and so are the image features."""
    reference, _ = exported(**NARROW)
    monkeypatch.setattr(*FAULTS[fault])
    FORMATS["onnx"].write(Artifact(reference.artifact), tmp_path, FormatOptions())
    rows = run_check(reference, tmp_path, settings=SETTINGS, images=1)
    assert row(rows, LOGITS).status == "failed"
    right = ("weights by", "rotary", "each MatMulNBits at level 0", "image features")
    assert all(r.status == "passed" for r in rows if r.name.startswith(right))


def copied(folder, target):
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_exchanged_rotary_bases_are_caught(exported, tmp_path):
    reference, folder = exported()
    path = copied(folder, tmp_path) / "text.onnx"
    model = onnx.load(path, load_external_data=False)
    names = [f"text.rotary.{kind}_attention_inv_freq" for kind in ("full", "sliding")]
    tensors = [next(t for t in model.graph.initializer if t.name == n) for n in names]
    assert tensors[0].raw_data != tensors[1].raw_data
    for tensor, other in zip(tensors, [t.raw_data for t in reversed(tensors)]):
        tensor.raw_data = other
    path.write_bytes(model.SerializeToString())
    rows = run_check(reference, tmp_path, settings=SETTINGS, images=1)
    assert row(rows, "rotary frequencies").worst == ", ".join(names)
    assert row(rows, LOGITS).status == "failed"


@pytest.mark.parametrize(
    ("graph", "name", "kind"),
    [
        ("text", "language_model.model.layers.1.mlp.down_proj.scales", "ulp"),
        ("text", "language_model.model.layers.0.self_attn.q_proj.qweight", "bit"),
        ("text", "language_model.model.layers.1.post_feedforward_layernorm.weight", "bit"),
        ("vision", "multi_modal_projector.mm_input_projection_weight", "bit"),
    ],
)
def test_one_changed_value_is_caught_and_named(exported, tmp_path, graph, name, kind):
    reference, folder = exported()
    damage(copied(folder, tmp_path), graph, name, kind, random.Random(0))
    rows = run_check(reference, tmp_path, settings=SETTINGS, images=1)
    caught = [r for r in rows if r.status == "failed" and r.name.startswith("weights by")]
    parts = (".scales", ".qweight", ".weight")
    module = next((name.removesuffix(p) for p in parts if name.endswith(p)), name)
    assert len(caught) == 2 and all(module in r.worst for r in caught)


# --- onnxruntime-genai ----------------------------------------------------------------------------


def genai_checks(reference, folder):
    steps = Steps(lambda *_: None, {"image files": 1})
    return {r.name: r for r in genai_rows(folder, reference, SETTINGS, 0, FORMAT_GATE, steps)}


@pytest.mark.parametrize("graph", ["fused", *slow("single", "plain")])
def test_genai_answers_as_the_reference(exported, graph, genai):
    """Its image tokens see both ways: the mark of them comes with the embeddings."""
    reference, folder = exported(graph, **AS_GENAI)
    rows = genai_checks(reference, folder)
    assert rows["onnxruntime-genai: greedy answers that differ"].status == "passed"
    assert rows["onnxruntime-genai: greedy answers that differ"].value == 0
    assert rows["onnxruntime-genai: pixels of images that keep their size"].status == "passed"
    model, prompt = GenaiModel(folder), words(reference, "What is shown here?")
    answer = model.answer(prompt, [], reference.stop_ids)
    assert answer == reference.answer(prompt)


def test_genai_takes_one_image_and_says_so_of_two(exported, genai):
    """It makes room for the features of one. The proof leaves such prompts out."""
    reference, folder = exported(**AS_GENAI)
    prompt = two_images(reference)
    with image_files(prompt.images) as files, pytest.raises(RuntimeError, match="image_features"):
        GenaiModel(folder).answer(prompt, files, reference.stop_ids)
    got = OnnxRunner(folder).logits(prompt, reference.position_ids(prompt))
    assert relative_error(got[:, : reference.vocabulary], reference.logits(prompt)) <= FORMAT_GATE
    few = Reference(reference.artifact, reference.rows[:1])
    few.__dict__["prompts"] = [prompt]
    (only,) = genai_checks(few, folder).values()
    assert only.status == "not run" and "more than 1" in only.detail


def test_genai_with_image_tokens_that_see_backwards_alone_is_caught(exported, tmp_path, genai):
    """A folder whose embedding.onnx marks no token."""
    reference, folder = exported(**AS_GENAI)
    path = copied(folder, tmp_path) / "embedding.onnx"
    model = onnx.load(path, load_external_data=False)
    last = next(n for n in model.graph.node if n.output[0] == "inputs_embeds")
    zero = onnx.helper.make_node("Sub", [last.input[1]] * 2, ["no mark"])
    last.input[1] = "no mark"
    model.graph.node.insert(list(model.graph.node).index(last), zero)
    path.write_bytes(model.SerializeToString())
    row = genai_checks(reference, tmp_path)["onnxruntime-genai: greedy answers that differ"]
    assert row.status == "failed"


def test_genai_is_told_the_wide_embeddings_and_the_tokens(exported):
    reference, folder = exported(**AS_GENAI)
    model = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
    assert (model["type"], model["decoder"]["hidden_size"]) == ("gemma3", 256 + 1)
    assert model["image_token_id"] == reference.preprocessor.image_token_id
