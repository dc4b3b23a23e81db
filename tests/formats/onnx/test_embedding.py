"""A package with a quantized embedding: what is in it, and what a reader refuses."""

import shutil

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from tests.formats.onnx.test_format import edit
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.onnx.inspect import inspect
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize

NAME = "model.embed_tokens"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(artifact, its ONNX folder) of a tied model with four bits in the embedding."""
    folder = tmp_path_factory.mktemp("embedding")
    source = make_random_checkpoint(folder / "model", "qwen2_vl", layers=1, depth=1, tied=True)
    config = QuantConfig("rtn", 4, 128, embedding_bits=4)
    path = folder / "artifact"
    quantize(Checkpoint(source), [], config, path, name="m", calibration={}, device="cpu")
    (folder / "onnx").mkdir()
    FORMATS["onnx"].write(Artifact(path), folder / "onnx", FormatOptions())
    return Artifact(path), folder / "onnx"


@pytest.fixture
def copy(written, tmp_path):
    return shutil.copytree(written[1], tmp_path / "onnx")


def test_table_and_output_matrix_decode_to_the_artifact_s_weights(written):
    artifact, folder = written
    read, want = OnnxFolder(folder), artifact.linear(NAME).decode().numpy()
    assert read.linear(NAME).looked_up and not read.linear("lm_head").looked_up
    for name in (NAME, "lm_head"):
        found = read.weight(f"{name}.weight")
        assert found is not None and np.array_equal(found, want)


def test_inspect_counts_the_table(written):
    """Four bits a code, and a float16 scale and a zero-point of four bits for 32 of them."""
    found = inspect(written[1] / "embedding.onnx")
    assert found.bits_per_weight == pytest.approx(4 + (16 + 4) / 32)


def table(model):
    return next(n for n in model.graph.node if n.op_type == "GatherBlockQuantized")


def of_table(name, value):
    def change(model):
        node = table(model)
        attribute = next(a for a in node.attribute if a.name == name)
        attribute.i = value

    return change


def without_zero_points(model):
    del table(model).input[3:]


def with_other_scales(model):
    (scales,) = (t for t in model.graph.initializer if t.name == f"{NAME}.scales")
    scales.CopyFrom(numpy_helper.from_array(np.ones((2, 2), np.float32), scales.name))


def with_other_cast(model):
    """The scales pass through a Cast that rounds them, and the runtime refuses its type."""
    (cast,) = (n for n in model.graph.node if table(model).input[2] in n.output)
    cast.attribute[0].i = onnx.TensorProto.BFLOAT16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_zero_points, "lacks scales or zero_points"),
        (with_other_scales, "has shape"),
        (with_other_cast, "lacks scales or zero_points"),
        (of_table("bits", 3), "3 bits in blocks of 32"),
        (of_table("bits", 0), "damaged graph"),
        (of_table("block_size", 48), "4 bits in blocks of 48"),
        (of_table("gather_axis", 1), "does not take rows"),
    ],
)
def test_a_malformed_table_is_one_line_of_error(copy, change, words):
    edit(copy, change, "embedding")
    with pytest.raises(FormatError, match=words) as e:
        OnnxFolder(copy)
    assert "\n" not in str(e.value)


def test_the_bytes_of_a_tied_table_are_in_the_package_once(written):
    """Two initializers of other shapes point at one place in one file."""
    places = {}
    for graph, module in (("embedding", NAME), ("text", "lm_head")):
        model = onnx.load(written[1] / f"{graph}.onnx", load_external_data=False)
        for t in model.graph.initializer:
            if t.name.startswith(f"{module}."):
                where = {e.key: e.value for e in t.external_data}
                part = places.setdefault(t.name.removeprefix(f"{module}."), [])
                part.append((where["location"], where["offset"], where["length"], tuple(t.dims)))
    assert set(places) == {"qweight", "scales", "zero_points"}
    for (*ours, _), (*theirs, _) in places.values():
        assert ours == theirs and ours[0] == "embedding.onnx.data"
    (*_, flat), (*_, blocks) = places["qweight"]
    assert len(flat) == 2 and len(blocks) == 3
