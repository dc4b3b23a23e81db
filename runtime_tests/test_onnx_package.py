"""The kinds of ONNX package in ONNX Runtime and onnxruntime-genai.

They are fused, single and plain graphs, float16, a shared cache, and linears merged for level 4.
"""

import json
import random
import shutil
from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnxruntime
import pytest

from runtime_tests.test_onnx import (
    SETTINGS,
    assert_all_pass,
    damage,
    export,
    left_padded,
    run_check,
    two_images,
    weight_rows,
)
from tests.artifacts import GRIDS, edit
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx.proof.genai import (
    PIXELS,
    GenaiModel,
    _odd_sizes,
    genai_rows,
    image_files,
)
from vlmq_export.formats.onnx.proof.runner import OnnxRunner, available
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE, HALF_GATE
from vlmq_export.formats.proof.checks import Steps, relative_error
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.samples.rows import read_rows

LAYERS = 6  # of the reference VLM
OURS = "com.microsoft"  # domain of ONNX Runtime's own operators


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """get(graph, dtype) → (reference, folder), written once."""
    made = {}

    def get(graph="fused", dtype="float32"):
        if (graph, dtype) not in made:
            folder = tmp_path_factory.mktemp(f"{graph}-{dtype}")
            options = FormatOptions(onnx_graph=graph, onnx_dtype=dtype)
            made[graph, dtype] = export(folder, GRIDS["w4g128"], options=options)
        return made[graph, dtype]

    return get


def operators(folder):
    """How often the text graph has each (domain, operator), and the names of its functions."""
    model = onnx.load(folder / "text.onnx", load_external_data=False)
    found = Counter((n.domain, n.op_type) for n in model.graph.node)
    return found, [f.name for f in model.functions]


def test_fused_has_the_runtimes_operators_and_plain_the_standard_ones(packages):
    fused, functions = operators(packages("fused")[1])
    assert fused[OURS, "GroupQueryAttention"] == LAYERS
    assert fused[OURS, "MRotaryEmbedding"] == 2 * LAYERS
    assert fused[OURS, "SkipSimplifiedLayerNormalization"] == 2 * LAYERS and functions == []
    standard = {op for domain, op in fused if domain == ""}
    assert not standard & {"Attention", "RotaryEmbedding", "Where"}
    # the head's matrix is multiplied as it is stored, and not transposed when the graph is loaded
    for graph in (fused, operators(packages("single")[1])[0]):
        assert graph["", "Transpose"] <= 1 and graph["", "MatMul"] == 0
        assert graph[OURS, "FusedMatMul"] == 1
    plain, functions = operators(packages("plain")[1])
    assert plain["", "Attention"] == LAYERS and plain["", "RotaryEmbedding"] == 2 * LAYERS
    # every other operator is standard, or has its definition in the file as a function
    private = {op for domain, op in plain if domain == OURS} - set(functions)
    assert private == {"MatMulNBits"}


@pytest.mark.parametrize(
    ("graph", "dtype"), [("fused", "float32"), ("plain", "float32"), ("fused", "float16")]
)
@pytest.mark.parametrize("fill", [0.0, 100.0])
def test_padding_on_the_left_reaches_no_logit_of_prompt_or_cached_step(
    packages, graph, dtype, fill
):
    """GroupQueryAttention by itself takes padding on the left for the start of the prompt."""
    reference, folder = packages(graph, dtype)
    runner, gate = OnnxRunner(folder), HALF_GATE if dtype == "float16" else FORMAT_GATE
    embeds, mask, positions, prompts = left_padded(reference, runner, fill)
    logits, past = runner.step(embeds, mask, positions, None)
    for row, p in zip(logits, prompts):
        got = row[-len(p.input_ids) :, : reference.vocabulary]
        assert relative_error(got, reference.logits(p)) <= gate
    alone = [runner.prefill(p, reference.position_ids(p)) for p in prompts]
    for step in range(3):
        ids = np.stack([a[0][0, -1:, : reference.vocabulary].argmax(-1) for a in alone])
        token = runner.embed(ids)
        mask = np.pad(mask, ((0, 0), (0, 1)), constant_values=1)
        at = positions.max(axis=(0, 2), keepdims=True).repeat(3, axis=0) + 1 + step
        logits, past = runner.step(token, mask, at, past)
        for b, p in enumerate(prompts):
            ones = np.ones((1, len(p.input_ids) + step + 1), np.int64)
            want, cache = runner.step(token[b : b + 1], ones, at[:, b : b + 1], alone[b][1])
            alone[b] = (want, cache)
            assert relative_error(logits[b], want[0]) <= gate


def test_several_new_tokens_after_a_cache(packages):
    """One row in every graph. Only the plain one takes more rows here (see passes/fuse.py)."""
    reference, _ = packages()
    p = reference.prompts[0]
    positions, half = reference.position_ids(p), len(p.input_ids) // 2
    for graph, rows in (("fused", 1), ("single", 1), ("plain", 1), ("plain", 2)):
        runner = OnnxRunner(packages(graph)[1])
        embeds = np.repeat(runner._embed_prompt(p), rows, axis=0)
        at = np.repeat(positions, rows, axis=1)
        mask = np.ones(embeds.shape[:2], np.int64)
        _, past = runner.step(embeds[:, :half], mask[:, :half], at[..., :half], None)
        logits, _ = runner.step(embeds[:, half:], mask, at[..., half:], past)
        for row in logits:
            got, want = row[:, : reference.vocabulary], reference.logits(p)[half:]
            assert relative_error(got, want) <= FORMAT_GATE


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_image_token_without_an_image_is_a_word_and_features_go_to_all_rows_in_order(
    packages, dtype
):
    """A model may generate its image token, and transformers then embeds it as a word."""
    reference, folder = packages(dtype=dtype)
    runner, token = OnnxRunner(folder), reference.preprocessor.image_token_id
    words = reference.weights.array("model.embed_tokens.weight")
    ids = np.array([[5, token, token], [token, 7, 8]])
    assert np.array_equal(runner.embed(ids), words[ids].astype(runner._dtype))
    features = np.arange(3 * words.shape[1]).reshape(3, -1).astype(runner._dtype)
    got = runner.embed(ids, features)
    assert np.array_equal(got[[0, 0, 1], [1, 2, 0]], features)
    assert np.array_equal(got[[0, 1, 1], [0, 1, 2]], words[[5, 7, 8]].astype(runner._dtype))
    with pytest.raises(Exception, match=r"(?i)index|indices"):
        runner.embed(ids, features[:2])


@pytest.mark.parametrize("graph", ["fused", "single"])
def test_past_and_present_in_one_buffer(packages, graph):
    """As genai_config.json asks for it: a cache of full length that is written in place.

    What lies beyond the mask is filled with large numbers, and must never be read.
    """
    reference, folder = packages(graph)
    p, runner = reference.prompts[0], OnnxRunner(folder)
    positions, embeds = reference.position_ids(p), runner._embed_prompt(p)
    capacity = len(p.input_ids) + 7
    cache = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(np.full_like(empty, 1e3))
        for name, empty in runner.empty_cache(1, capacity).items()
    }
    rows, split = [], len(p.input_ids) - 3
    for start, stop in ((0, split), *((i, i + 1) for i in range(split, len(p.input_ids)))):
        binding = runner.text.io_binding()
        feeds = {
            "inputs_embeds": embeds[:, start:stop],
            "attention_mask": np.ones((1, stop), np.int64),
            "position_ids": positions[..., start:stop],
        }
        for name, array in feeds.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        binding.bind_output("logits")
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        runner.text.run_with_iobinding(binding)
        rows.append(binding.copy_outputs_to_cpu()[0][0])
    got = np.concatenate(rows)[:, : reference.vocabulary]
    assert relative_error(got, reference.logits(p)) <= FORMAT_GATE


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize("tag", ["w4g128", slow("w2g128"), slow("w8g128")])
def test_float16_has_gates_of_its_own(packages, tmp_path, tag):
    options = FormatOptions(onnx_dtype="float16")
    if tag == "w4g128":
        reference, folder = packages("fused", "float16")
    else:
        reference, folder = export(tmp_path, GRIDS[tag], options=options)
    rows = run_check(reference, folder, options)
    assert_all_pass(rows)
    by_name = {r.name: r for r in rows}
    logits = by_name["logits at accuracy_level 0"]
    assert logits.gate == HALF_GATE
    assert logits.value > FORMAT_GATE  # it really computes in float16
    assert by_name["argmax agreement at accuracy_level 0"].value > 0.95
    single, half, integer = (
        onnx.TensorProto.FLOAT,
        onnx.TensorProto.FLOAT16,
        onnx.TensorProto.INT64,
    )
    # the pixels are float32, and every other float is float16
    for name, kinds in (("vision", {single, half}), ("embedding", {half}), ("text", {half})):
        graph = onnx.load(folder / f"{name}.onnx", load_external_data=False).graph
        found = {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)}
        assert found - {integer} == kinds, name


def test_one_bit_of_a_float16_scale_is_caught(packages, tmp_path):
    reference, folder = packages("fused", "float16")
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "text", "model.layers.0.mlp.up_proj.scales", "bit", random.Random(3))
    options = FormatOptions(onnx_dtype="float16")
    rows = run_check(reference, tmp_path / "onnx", options, images=1)
    for row in weight_rows(rows):
        assert row.status == "failed" and "layers.0.mlp.up_proj.weight" in row.worst


def test_cuda_is_not_run_where_it_is_absent(packages):
    if available("cuda"):
        pytest.fail(
            "a machine with CUDA: run `verify` with --onnx-provider cuda, "
            "and give this test its other half"
        )
    rows = run_check(*packages("plain"), FormatOptions(onnx_provider="cuda"))
    assert {r.status for r in rows if r.level != "L1"} == {"not run"}
    assert {r.status for r in rows if r.level == "L1"} == {"passed"}


@pytest.mark.parametrize("graph", ["fused", "single"])
def test_a_package_for_cuda_has_standard_attention_and_says_so_in_genai_config(tmp_path, graph):
    options = FormatOptions(
        onnx_provider="cuda", onnx_graph=graph, onnx_dtype="float16", onnx_accuracy_level=4
    )
    _, folder = export(tmp_path, GRIDS["w4g128"], options=options)
    onnx.checker.check_model(folder / "text.onnx")
    assert ("", "Attention") in operators(folder)[0]
    config = json.loads((folder / "genai_config.json").read_text())
    for part in ("decoder", "embedding", "vision"):
        session = config["model"][part]["session_options"]
        assert session["provider_options"] == [{"cuda": {}}]
    assert config["search"]["past_present_share_buffer"] is False


# -- onnxruntime-genai -----------------------------------------------------------------------------


def genai_checks(folder, reference, questions):
    """The rows of onnxruntime-genai by their names."""
    settings = replace(SETTINGS, questions=questions)
    steps = Steps(settings.tell, {"image files": 1})
    return {r.name: r for r in genai_rows(folder, reference, settings, 0, FORMAT_GATE, steps)}


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [
        ("fused", "float32"),
        ("single", "float32"),
        ("plain", "float32"),
        ("fused", "float16"),
        ("single", "float16"),
    ],
)
def test_genai_answers_as_the_reference_from_every_package(packages, graph, dtype, genai):
    reference, folder = packages(graph, dtype)
    rows = genai_checks(folder, reference, 6)
    assert rows["onnxruntime-genai: greedy answers that differ"].status == "passed"
    assert rows["onnxruntime-genai: pixels of images that keep their size"].status == "passed"
    assert rows["onnxruntime-genai: pixels of images that it resizes"].status == "info"


def test_genai_resizes_as_the_reference_does(packages, genai):
    """Both resize with Pillow's bicubic filter, and get the same pixels."""
    reference, folder = packages()
    (sample, images), *_ = _odd_sizes(reference, reference.prompts[:1])
    assert [i.size for i in images] != [i.size for i in sample.images]
    with image_files(images) as files:
        got = GenaiModel(folder).pixels(sample.text, files)
    assert relative_error(got, sample.pixel_values.numpy()) <= PIXELS


def test_wrong_pixels_in_genai_are_seen(packages, tmp_path, genai):
    reference, folder = packages()
    shutil.copytree(folder, tmp_path / "onnx")

    def darker(config):
        steps = {t["operation"]["type"]: t["operation"] for t in config["processor"]["transforms"]}
        steps["Normalize"]["attrs"]["mean"][0] += 0.01

    edit(tmp_path / "onnx" / "processor_config.json", darker)
    rows = genai_checks(tmp_path / "onnx", reference, 2)
    assert rows["onnxruntime-genai: pixels of images that keep their size"].status == "failed"


@pytest.mark.slow
def test_genai_answers_256_questions_from_image_files(tmp_path, genai):
    reference, folder = export(tmp_path, GRIDS["w4g128"])
    reference = Reference(reference.artifact, read_rows(HELDOUT)[:256])
    row = genai_checks(folder, reference, 256)["onnxruntime-genai: greedy answers that differ"]
    assert row.compared == 256 and row.status == "passed", row


def test_genai_with_two_images_in_one_prompt(packages, genai):
    reference, folder = packages()
    prompt = two_images(reference)
    with image_files(prompt.images) as files:
        answer = GenaiModel(folder).answer(prompt, files, reference.stop_ids)
    assert answer == reference.answer(prompt)


# -- every grid, on both vision towers -------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["reference", "qwen2_vl"])
@pytest.mark.parametrize("group", [32, 128, -1])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_width_and_group_passes_every_gate(bits, group, arch, tmp_path):
    source = REFERENCE_VLM
    if arch != "reference":
        source = make_random_checkpoint(tmp_path / "model", arch, layers=2, depth=3)
    config = QuantConfig("rtn", bits, group, symmetric=bits == 8)
    assert_all_pass(run_check(*export(tmp_path, config, source), images=2, questions=2))


# -- one prompt at a time --------------------------------------------------------------------------


def test_single_has_one_product_an_attention_that_rotates_it_and_passes_every_gate(packages):
    reference, folder = packages("single")
    found, _ = operators(folder)
    assert found[OURS, "MatMulNBits"] == 5 * LAYERS and found[OURS, "MRotaryEmbedding"] == 0
    graph = onnx.load(folder / "text.onnx", load_external_data=False).graph
    attentions = [n for n in graph.node if n.op_type == "GroupQueryAttention"]
    assert len(attentions) == LAYERS and all(n.input[1] == n.input[2] == "" for n in attentions)
    assert {a.i for n in attentions for a in n.attribute if a.name == "do_rotary"} == {1}
    assert_all_pass(run_check(reference, folder, FormatOptions(onnx_graph="single")))


def test_single_refuses_two_rows_by_name(packages):
    """GroupQueryAttention would rotate both rows by the positions of the first."""
    reference, folder = packages("single")
    runner = OnnxRunner(folder)
    embeds, mask, positions, _ = left_padded(reference, runner)
    with pytest.raises(Exception, match=r"inputs_embeds.*Got: 2 Expected: 1|Got: 2 Expected: 1"):
        runner.step(embeds, mask, positions, None)


def test_single_keeps_linears_apart_whose_columns_have_an_order_of_their_own(tmp_path):
    options = FormatOptions(onnx_graph="single")
    reference, folder = export(tmp_path, GRIDS["w4g128-dynamic"], options=options)
    assert operators(folder)[0][OURS, "MatMulNBits"] == 7 * LAYERS
    assert_all_pass(run_check(reference, folder, options, images=1, questions=1))


def wrong_heads(graph):
    """The rows of queries, keys and values are split into other heads."""
    for node in (n for n in graph.node if n.op_type == "GroupQueryAttention"):
        next(a for a in node.attribute if a.name == "num_heads").i = 12


def wrong_axis(graph):
    """The slowest frequency turns by another of the three positions.

    In a short prompt it turns too little for any logit to show it.
    """
    tensor = next(t for t in graph.initializer if t.name == "rotary.axis")
    axis = np.frombuffer(tensor.raw_data, np.int64).copy()
    axis[-1] = 0
    tensor.raw_data = axis.tobytes()


@pytest.mark.parametrize(
    ("change", "levels"), [(wrong_heads, {"L1", "L2", "L3"}), (wrong_axis, {"L1"})]
)
def test_a_changed_single_graph_is_caught(packages, tmp_path, change, levels):
    reference, folder = packages("single")
    shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(tmp_path / "onnx" / "text.onnx", load_external_data=False)
    change(model.graph)
    (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    options = FormatOptions(onnx_graph="single")
    rows = run_check(reference, tmp_path / "onnx", options, images=2, questions=1)
    assert {r.level for r in rows if r.status == "failed"} == levels


# -- linears merged for level 4 --------------------------------------------------------------------

LEVEL_4 = FormatOptions(onnx_accuracy_level=4)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    return export(tmp_path_factory.mktemp("level4"), GRIDS["w4g128"], options=LEVEL_4)


def test_at_level_4_linears_of_one_input_are_one_node_and_nothing_else_changes(packages, merged):
    reference, folder = merged
    found, _ = operators(folder)
    assert found[OURS, "MatMulNBits"] == 4 * LAYERS and found["", "Split"] == 2 * LAYERS
    rows = run_check(reference, folder, LEVEL_4)
    assert_all_pass(rows)
    assert next(r for r in rows if r.name == "logits at accuracy_level 0").value <= FORMAT_GATE
    apart = OnnxRunner(packages()[1], accuracy_level=4)
    p, positions = reference.prompts[0], reference.position_ids(reference.prompts[0])
    assert np.array_equal(OnnxRunner(folder).logits(p, positions), apart.logits(p, positions))


def test_columns_in_an_order_of_their_own_are_not_merged(tmp_path):
    reference, folder = export(tmp_path, GRIDS["w4g128-dynamic"], options=LEVEL_4)
    assert operators(folder)[0][OURS, "MatMulNBits"] == 7 * LAYERS
    assert_all_pass(run_check(reference, folder, LEVEL_4, images=1, questions=1))


@pytest.mark.parametrize(
    ("linear", "sizes"),
    [("self_attn.q_proj|k_proj|v_proj", [128, 256, 128]), ("mlp.gate_proj|up_proj", [512, 256])],
)
def test_a_split_at_the_wrong_row_is_caught(merged, tmp_path, linear, sizes):
    reference, folder = merged
    shutil.copytree(folder, tmp_path / "onnx")
    file = tmp_path / "onnx" / "text.onnx"
    model = onnx.load(file, load_external_data=False)
    tensor = next(t for t in model.graph.initializer if t.name == f"model.layers.0.{linear}.sizes")
    tensor.raw_data = np.array(sizes, np.int64).tobytes()
    file.write_bytes(model.SerializeToString())
    try:
        rows = run_check(reference, tmp_path / "onnx", LEVEL_4, images=1, questions=1)
    except FormatError as e:
        assert "is not split into" in str(e) and sum(sizes) != 1024
    else:
        assert {r.status for r in weight_rows(rows)} == {"failed"}
