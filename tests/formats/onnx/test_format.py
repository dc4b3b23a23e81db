"""The ONNX files, without ONNX Runtime: packing, sizes, our reader, and files that are refused."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, rtn_artifact
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.model_plan import artifact_plan
from vlmq_export.formats.onnx.passes.packing import block_size_for, pack_bits, pack_linear
from vlmq_export.formats.onnx.read import Linear, OnnxFolder
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact


def slow_decode(codes, scales, zeros, g_idx):
    """float32 [out, in]: scale · (code − zero_point), weight by weight."""
    out = np.empty(codes.shape, np.float32)
    for n in range(codes.shape[0]):
        for k in range(codes.shape[1]):
            g = g_idx[k]
            out[n, k] = np.float32(scales[n, g]) * np.float32(int(codes[n, k]) - int(zeros[n, g]))
    return out


@settings(deadline=None)
@given(st.sampled_from([2, 4, 8]), st.integers(1, 40), st.integers(0, 2**32 - 1))
def test_packing_is_a_stream_from_the_low_bit(bits, count, seed):
    values = np.random.default_rng(seed).integers(0, 2**bits, count, dtype=np.uint8)
    stream = sum(int(v) << (i * bits) for i, v in enumerate(values))
    expected = stream.to_bytes(-(-count * bits // 8), "little")
    assert pack_bits(values, bits).tobytes() == expected


def test_golden_bytes():
    assert pack_bits(np.array([1, 2, 3, 4, 5], np.uint8), 4).tobytes() == bytes([0x21, 0x43, 0x05])
    assert pack_bits(np.array([0, 1, 2, 3, 1], np.uint8), 2).tobytes() == bytes([0xE4, 0x01])


@settings(deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    group=st.sampled_from([-1, 16, 32, 48, 96, 128, 512]),
    groups=st.integers(1, 3),
    permuted=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_a_packed_linear_decodes_to_the_same_weights(bits, group, groups, permuted, seed):
    rng = np.random.default_rng(seed)
    columns = 300 if group == -1 else group * groups
    groups = 1 if group == -1 else groups
    codes = rng.integers(0, 2**bits, (5, columns), dtype=np.uint8)
    zeros = rng.integers(0, 2**bits, (5, groups), dtype=np.uint8)
    scales = rng.uniform(1e-4, 1, (5, groups)).astype(np.float16)
    g_idx = (np.arange(columns) // (columns // groups)).astype(np.int32)
    if permuted:
        g_idx = rng.permutation(g_idx)
    p = pack_linear(codes, scales, zeros, g_idx, bits, group)
    linear = Linear(
        "x", p.bits, p.block_size, p.weight, p.scales, p.zero_points, p.order, columns, 0
    )
    assert np.array_equal(linear.decode(), slow_decode(codes, scales, zeros, g_idx))


def test_blocks_of_every_group_size():
    blocks = {-1: 256, 16: 16, 32: 32, 48: 16, 96: 32, 128: 128, 256: 256, 512: 256, 1024: 256}
    assert {group: block_size_for(group) for group in blocks} == blocks
    assert block_size_for(40) is None and block_size_for(0) is None


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    artifact = rtn_artifact(tmp_path_factory.mktemp("artifact"), GRIDS["w3g128"])
    folder = tmp_path_factory.mktemp("onnx")
    FORMATS["onnx"].write(artifact, folder, FormatOptions(onnx_accuracy_level=4))
    return artifact, folder


def test_every_linear_is_in_one_node_that_says_its_level(written):
    artifact, folder = written
    assert sorted(OnnxFolder(folder).linears) == sorted(artifact.linear_names())
    graph = onnx.load(folder / "text.onnx", load_external_data=False).graph
    nodes = [n for n in graph.node if n.op_type == "MatMulNBits"]
    names = [part for n in nodes for part in n.name.rpartition(".")[2].split("|")]
    assert sorted(names) == sorted(n.rpartition(".")[2] for n in artifact.linear_names())
    for node in nodes:
        attributes = {a.name: a.i for a in node.attribute}
        # three bits are stored in the container of four
        assert attributes["accuracy_level"] == 4 and attributes["bits"] == 4
        # the fourth input is the zero-points, the fifth would be g_idx
        assert len(node.input) == 4 and node.input[3]


def test_our_reader_finds_every_weight(written):
    artifact, folder = written
    read, weights = OnnxFolder(folder), Weights(artifact.path)
    for name, want in weights.items():
        got = read.weight(name)
        assert got is not None and np.array_equal(got, want), name


def test_the_plan_tells_the_size_before(written):
    artifact, folder = written
    plan = FORMATS["onnx"].plan(artifact_plan(artifact), FormatOptions(onnx_accuracy_level=4))
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert plan.refusals == [] and plan.size_bytes == pytest.approx(size, rel=0.02)
    assert any("4-bit container" in n for n in plan.notes)
    found = FORMATS["onnx"].inspect(folder)
    assert found.bits_per_weight == pytest.approx(plan.bits_per_weight, rel=0.02)


def test_the_plan_of_float16_tells_the_size_before(tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"])
    folder, options = tmp_path / "onnx", FormatOptions(onnx_dtype="float16")
    folder.mkdir()
    FORMATS["onnx"].write(artifact, folder, options)
    plan = FORMATS["onnx"].plan(artifact_plan(artifact), options)
    size = sum(f.stat().st_size for f in folder.iterdir())
    assert plan.size_bytes == pytest.approx(size, rel=0.02)
    assert any("float16" in n for n in plan.notes)


def test_a_number_beyond_float16_is_refused_by_name(tmp_path):
    """A plain conversion to float16 would make it infinite without an error."""
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"])
    file = next(artifact.path.glob("float-*.safetensors"))
    tensors = load_file(file)
    tensors["model.norm.weight"][3] = 1e5
    save_file(tensors, file)
    folder, options = tmp_path / "onnx", FormatOptions(onnx_dtype="float16")
    folder.mkdir()
    said = r"model\.norm\.weight holds numbers beyond 65504; use --onnx-dtype float32"
    with pytest.raises(FormatError, match=said):
        FORMATS["onnx"].write(Artifact(artifact.path), folder, options)


def test_files_can_be_read_by_everyone_and_writing_again_does_not_append(written, tmp_path):
    artifact, folder = written
    FORMATS["onnx"].write(artifact, tmp_path, FormatOptions(onnx_accuracy_level=4))
    FORMATS["onnx"].write(artifact, tmp_path, FormatOptions(onnx_accuracy_level=4))
    for name in ("vision", "embedding", "text"):
        for file in (f"{name}.onnx", f"{name}.onnx.data"):
            assert (tmp_path / file).read_bytes() == (folder / file).read_bytes()
            assert (tmp_path / file).stat().st_mode & 0o777 == 0o644


@pytest.fixture
def copy(written, tmp_path):
    for file in written[1].iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def redirect(folder, location):
    """Point every external tensor of text.onnx at `location`."""
    model = onnx.load(folder / "text.onnx", load_external_data=False)
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = location
    (folder / "text.onnx").write_bytes(model.SerializeToString())


@pytest.mark.parametrize("location", ["../text.onnx.data", "/etc/passwd", "a/../../x", ""])
def test_data_outside_the_folder_is_refused(copy, location):
    redirect(copy, location)
    with pytest.raises(FormatError, match="outside the folder"):
        OnnxFolder(copy)


def test_damaged_files_are_named(copy):
    data = copy / "text.onnx.data"
    whole = data.read_bytes()
    for damaged in (whole[:-1], whole + b"\0"):  # ONNX Runtime would accept the longer one
        data.write_bytes(damaged)
        with pytest.raises(FormatError, match=r"text\.onnx\.data"):
            OnnxFolder(copy)
    data.unlink()
    with pytest.raises(FormatError, match="missing"):
        OnnxFolder(copy)
    (copy / "vision.onnx").write_bytes(b"\xff" * 100)
    with pytest.raises(FormatError, match=r"vision\.onnx"):
        OnnxFolder(copy)


def test_a_symbolic_link_is_refused(copy, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "data"
    (copy / "text.onnx.data").rename(elsewhere)
    (copy / "text.onnx.data").symlink_to(elsewhere)
    with pytest.raises(FormatError, match="outside the folder"):
        OnnxFolder(copy)


def edit(folder, change, graph="text"):
    """Rewrite one graph's protobuf after `change(model)`."""
    model = onnx.load(folder / f"{graph}.onnx", load_external_data=False)
    change(model)
    (folder / f"{graph}.onnx").write_bytes(model.SerializeToString())


def nbits(model):
    """One of the nodes of quantized linears, the fourth."""
    return [n for n in model.graph.node if n.op_type == "MatMulNBits"][3]


def set_attribute(name, value):
    def change(model):
        next(a for a in nbits(model).attribute if a.name == name).i = value

    return change


def drop_bits(model):
    node = nbits(model)
    kept = [a for a in node.attribute if a.name != "bits"]
    del node.attribute[:]
    node.attribute.extend(kept)


def reshape(model):
    tensor = next(t for t in model.graph.initializer if t.name == nbits(model).input[1])
    tensor.dims[0] *= 2
    tensor.dims[2] //= 2


def at_offset(value):
    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == nbits(model).input[1])
        next(e for e in tensor.external_data if e.key == "offset").value = value

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_bits, "lacks the attribute bits"),
        (set_attribute("bits", 3), "3 bits"),
        (set_attribute("K", 0), "bits"),
        (set_attribute("block_size", 48), "blocks of 48"),
        (set_attribute("N", 7), "its node asks for"),
        (reshape, "its node asks for"),
        (at_offset("abc"), "'abc'"),
        (at_offset("-8"), "'-8'"),
    ],
)
def test_a_malformed_node_is_one_line_of_error(copy, change, words):
    """Without checks, each would be a KeyError, a ValueError from numpy, or no error at all."""
    edit(copy, change)
    with pytest.raises(FormatError, match=words) as e:
        OnnxFolder(copy)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("place", ["node", "subgraph", "function"])
def test_data_outside_the_folder_is_refused_wherever_a_tensor_can_be(copy, place):
    outside = onnx.TensorProto(name="x", data_type=1, dims=[4], data_location=1)
    for key, value in (("location", "../../etc/passwd"), ("length", "16")):
        outside.external_data.add(key=key, value=value)
    constant = onnx.helper.make_node("Constant", [], ["unused"], value=outside)

    body = onnx.helper.make_graph([constant], "body", [], [])
    branches = onnx.helper.make_node("If", [""], ["z"], then_branch=body, else_branch=body)

    def change(model):
        if place == "function":
            model.functions.add(name="f", domain="x").node.append(constant)
        else:
            model.graph.node.insert(0, constant if place == "node" else branches)

    edit(copy, change)
    with pytest.raises(FormatError, match="outside the folder"):
        OnnxFolder(copy)


def test_an_order_that_is_no_permutation_is_refused(tmp_path_factory):
    folder = tmp_path_factory.mktemp("onnx")
    artifact = rtn_artifact(tmp_path_factory.mktemp("artifact"), GRIDS["w4g128-dynamic"])
    FORMATS["onnx"].write(artifact, folder, FormatOptions())
    name = "model.layers.0.self_attn.q_proj"

    def change(model):
        tensor = next(t for t in model.graph.initializer if t.name == f"{name}.order")
        entry = {e.key: e.value for e in tensor.external_data}
        file, offset = folder / entry["location"], int(entry["offset"])
        order = np.memmap(file, "<i8", "r+", offset, tuple(tensor.dims))
        order[5] = order[6]
        order.flush()

    edit(folder, change)
    with pytest.raises(FormatError, match=r"q_proj\.order is not an order"):
        OnnxFolder(folder).linear(name)


def test_a_models_own_processor_config_is_kept(written, tmp_path):
    """onnxruntime-genai's own file of this name gets another name then.

    The second write finds the files of the first in the folder.
    """
    artifact, folder = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"]), tmp_path / "onnx"
    own = '{"processor_class": "Qwen2_5_VLProcessor"}'
    (artifact.source / "processor_config.json").write_text(own)
    folder.mkdir()
    for _ in range(2):
        FORMATS["onnx"].write(artifact, folder, FormatOptions())
        assert (folder / "processor_config.json").read_text() == own
        config = json.loads((folder / "genai_config.json").read_text())
        steps = json.loads((folder / config["model"]["vision"]["config_filename"]).read_text())
        assert steps["processor"]["transforms"][-1]["operation"]["type"] == "PatchImage"


def test_writing_says_nothing_on_stdout(tmp_path, capfd):
    """stdout is for the result of `--json`."""
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w2"])
    (tmp_path / "onnx").mkdir()
    capfd.readouterr()
    FORMATS["onnx"].write(artifact, tmp_path / "onnx", FormatOptions())
    assert capfd.readouterr().out == ""
