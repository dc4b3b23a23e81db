"""Float tensors in the bytes of the source: what they take, and that no number changes for it.

The packages are compared with the same ones whose 16-bit constants are widened to float32. Scales
are among them.
"""

import random
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from runtime_tests import test_head
from runtime_tests.test_onnx import assert_all_pass, damage, export, run_check, weight_rows
from tests.artifacts import GRIDS
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import REFERENCE_VLM
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.onnx import write as writer
from vlmq_export.formats.onnx.passes.widen import widen
from vlmq_export.formats.onnx.proof.runner import OnnxRunner
from vlmq_export.formats.proof.checks import relative_error
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.storage.tensors import DTYPES

GRAPHS = ("vision", "embedding", "text")
SHORT = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)
KINDS = ("fused", "single", "plain")


def written(folder, graph="fused", source=REFERENCE_VLM, **options):
    """(reference with two held-out rows, folder) of a model."""
    return export(folder, GRIDS["w4g128"], source, FormatOptions(onnx_graph=graph, **options), 2)


@pytest.fixture(scope="module")
def packages(tmp_path_factory):
    """get(graph) → (reference, folder) of the reference VLM, written once."""
    made = {}

    def get(graph="fused"):
        if graph not in made:
            made[graph] = written(tmp_path_factory.mktemp(graph), graph)
        return made[graph]

    return get


def load(folder, graph, **options):
    return onnx.load(folder / f"{graph}.onnx", **options)


def stored_bytes(folder, names):
    """Bytes that the constants of these names take in a folder, each place counted once."""
    places, inline = set(), 0
    for graph in GRAPHS:
        for tensor in load(folder, graph, load_external_data=False).graph.initializer:
            entry = {e.key: e.value for e in tensor.external_data}
            if tensor.name in names and entry:
                places.add((entry["location"], entry["offset"], int(entry["length"])))
            elif tensor.name in names:
                inline += len(tensor.raw_data)
    return inline + sum(length for *_, length in places)


def float_bytes(artifact):
    """Name → bytes of every float tensor of an artifact, the biases of its linears included."""
    sizes = {n: DTYPES[kind].itemsize * int(np.prod(s)) for n, s, kind in artifact.float_info()}
    biases = {f"{r.name}.bias": 2 * r.out_features for r in artifact.records.values() if r.bias}
    return sizes | biases


def assert_no_float_is_wider_than_in_the_source(reference, folder):
    sizes = float_bytes(Artifact(reference.artifact))
    # A head that is tied to the embedding has its bytes.
    assert stored_bytes(folder, {*sizes, "lm_head.weight"}) == sum(sizes.values())


def widened(folder, out):
    """The same package in float32, without Casts, and each graph with its own copy of a table."""
    shutil.copytree(folder, out)
    for name in GRAPHS:
        model = load(folder, name)
        short = [t for t in model.graph.initializer if t.data_type in SHORT]
        for tensor in short:
            values = numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(values, tensor.name))
        remove_casts(model.graph, {t.name for t in short})
        kept = [v for v in model.graph.value_info if v.type.tensor_type.elem_type not in SHORT]
        del model.graph.value_info[:]
        model.graph.value_info.extend(kept)
        (out / f"{name}.onnx").write_bytes(model.SerializeToString())
    return out


def remove_casts(graph, short):
    """Remove the Casts of these constants, and of rows that are taken from them."""
    renamed = {}
    for node in list(graph.node):
        for i, value in enumerate(node.input):
            node.input[i] = renamed.get(value, value)
        if node.op_type == "Cast" and node.input[0] in short:
            renamed[node.output[0]] = node.input[0]
            graph.node.remove(node)
        elif node.op_type in ("Gather", "Slice") and node.input[0] in short:
            short.add(node.output[0])
    assert renamed or not short


def numbers(reference, folder):
    """Image features, and logits of a prompt that is decoded token by token from its middle."""
    runner, prompt = OnnxRunner(folder), reference.prompts[0]
    positions, half = reference.position_ids(prompt), len(prompt.input_ids) // 2
    return runner.prompt_features(prompt), runner.stepwise(prompt, positions, half)


def assert_numbers_are_those_of_float32_constants(reference, folder, scratch):
    same = numbers(reference, widened(folder, scratch / "wide"))
    for got, want in zip(numbers(reference, folder), same, strict=True):
        assert np.array_equal(got, want)


@pytest.mark.parametrize("graph", KINDS)
def test_floats_take_the_bytes_of_the_source_and_no_number_changes(packages, tmp_path, graph):
    reference, folder = packages(graph)
    assert_no_float_is_wider_than_in_the_source(reference, folder)
    assert_numbers_are_those_of_float32_constants(reference, folder, tmp_path)


def scales(graph):
    """The scales of a graph, whatever the runtime calls them once they are cast."""
    return [t for t in graph.initializer if ".scales" in t.name]


@pytest.mark.parametrize("graph", KINDS)
def test_scales_are_float16_and_merged_ones_too(packages, graph):
    _, folder = packages(graph)
    assert {t.data_type for t in scales(load(folder, "text").graph)} == {onnx.TensorProto.FLOAT16}


def test_every_quantized_part_of_a_tied_model_computes_what_it_did(tmp_path):
    """The tower, the embedding, and the output matrix that shares its scales."""
    source = make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=2, depth=3, tied=True)
    config = QuantConfig("rtn", 4, 128, vision_bits=8, embedding_bits=8)
    reference, folder = test_head.export(tmp_path, config, source, "onnx")
    for graph, module in (
        ("vision", "visual.blocks.0."),
        ("embedding", "model.embed_tokens"),
        ("text", "lm_head"),
    ):
        found = scales(load(folder, graph).graph)
        assert any(t.name.startswith(module) for t in found)
        assert {t.data_type for t in found} == {onnx.TensorProto.FLOAT16}
        cast = scales(optimized(folder, graph, tmp_path))
        assert {t.data_type for t in cast} == {onnx.TensorProto.FLOAT}
    assert_numbers_are_those_of_float32_constants(reference, folder, tmp_path)


# Without fused operators activations differ in their last bits, and level 4 rounds them to 8 bits.
UNFUSED = {0: 1e-6, 4: 1e-2}


@pytest.mark.parametrize("level", UNFUSED)
def test_a_session_without_graph_optimization_computes_the_same(tmp_path, monkeypatch, level):
    """No Cast is folded there. Scales of level 4 have none: its kernel would compute nonsense."""
    reference, folder = written(tmp_path, onnx_accuracy_level=level)
    want = numbers(reference, folder)
    off = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    monkeypatch.setattr(onnxruntime.GraphOptimizationLevel, "ORT_ENABLE_ALL", off)
    for got, expected in zip(numbers(reference, folder), want, strict=True):
        assert relative_error(got, expected) < UNFUSED[level]


def test_a_head_of_its_own_takes_the_bytes_of_the_source(tmp_path):
    source = make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=2, depth=3, tied=False)
    reference, folder = written(tmp_path, source=source)
    assert_no_float_is_wider_than_in_the_source(reference, folder)
    assert_numbers_are_those_of_float32_constants(reference, folder, tmp_path)


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "lm_head.weight"])
def test_one_bit_of_a_shared_table_is_caught_in_both_places(packages, tmp_path, name):
    """The output matrix lies in the data of embedding.onnx. Its place there is a number."""
    reference, folder = packages()
    shutil.copytree(folder, tmp_path / "onnx")
    if name == "lm_head.weight":
        model = load(folder, "text", load_external_data=False)
        head = next(t for t in model.graph.initializer if t.name == name)
        place = {entry.key: entry for entry in head.external_data}
        assert place["location"].value == "embedding.onnx.data"
        head.dims[0] -= 1
        place["offset"].value = str(int(place["offset"].value) + 2 * head.dims[1])
        place["length"].value = str(int(place["length"].value) - 2 * head.dims[1])
        (tmp_path / "onnx" / "text.onnx").write_bytes(model.SerializeToString())
    else:
        damage(tmp_path / "onnx", "embedding", name, "bit", random.Random(1))
    for row in weight_rows(run_check(reference, tmp_path / "onnx", images=1, questions=1)):
        assert row.status == "failed" and "model.embed_tokens.weight" in row.worst


def optimized(folder, graph, scratch):
    """A graph as ONNX Runtime runs it."""
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    options.log_severity_level = 3
    cpu = ["CPUExecutionProvider"]
    onnxruntime.InferenceSession(str(folder / f"{graph}.onnx"), options, providers=cpu)
    return onnx.load(scratch / "optimized.onnx", load_external_data=False).graph


@pytest.mark.parametrize("name", ["vision", "text"])
@pytest.mark.parametrize("graph", ["fused", "plain"])
def test_the_runtime_casts_constants_once_when_it_loads_a_graph(packages, tmp_path, graph, name):
    _, folder = packages(graph)
    short = [t for t in load(folder, name).graph.initializer if t.data_type in SHORT]
    assert short
    run = optimized(folder, name, tmp_path)
    assert not [t.name for t in run.initializer if t.data_type in SHORT]


def test_only_the_rows_of_the_tokens_are_cast(packages, tmp_path):
    _, folder = packages()
    graph = optimized(folder, "embedding", tmp_path)
    (gather,) = (n for n in graph.node if n.input[0] == "model.embed_tokens.weight")
    (cast,) = (n for n in graph.node if gather.output[0] in n.input)
    assert (gather.op_type, cast.op_type) == ("Gather", "Cast")


# -- a head that is too large for one step ---------------------------------------------------------


@pytest.fixture
def in_pieces(monkeypatch):
    """Products of the decoder that are written in pieces of 128 rows of the reference VLM."""

    def cut(model):
        widen(model, *([128 * 256 * 4] if model.graph.name == "text" else []))

    monkeypatch.setattr(writer, "widen", cut)


@pytest.mark.parametrize("graph", KINDS)
def test_a_head_in_pieces_gives_the_same_numbers(packages, in_pieces, tmp_path, graph):
    reference, whole = packages(graph)
    _, folder = written(tmp_path, graph)
    products = [n for n in load(folder, "text").graph.node if n.op_type.endswith("MatMul")]
    assert len(products) == 3  # of 384 rows
    for got, want in zip(numbers(reference, folder), numbers(reference, whole), strict=True):
        assert np.array_equal(got, want)
    run = optimized(folder, "text", tmp_path)
    assert not [t.name for t in run.initializer if t.data_type in SHORT]


def test_a_float16_head_in_pieces_passes_every_gate(in_pieces, tmp_path):
    reference, folder = written(tmp_path, onnx_dtype="float16")
    assert_no_float_is_wider_than_in_the_source(reference, folder)
    options = FormatOptions(onnx_dtype="float16")
    assert_all_pass(run_check(reference, folder, options, images=1, questions=1))
