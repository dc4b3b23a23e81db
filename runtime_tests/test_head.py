"""A quantized output head in ONNX Runtime and llama.cpp: a change in it is caught and named."""

import random
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest

from runtime_tests.test_gguf import hub_names
from runtime_tests.test_onnx import SETTINGS, assert_all_pass, damage, overwrite, weight_rows
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export.bundled import HELDOUT, REFERENCE_VLM
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.rows import read_rows

HEAD8 = QuantConfig("rtn", 4, 128, head_bits=8)
LINEARS = 6 * 7 + 1  # of the reference VLM


def export(folder, config=HEAD8, source=REFERENCE_VLM, format="onnx", options=None):
    """(reference, folder of the format) of a model with a quantized head."""
    path = folder / "artifact"
    quantize(Checkpoint(source), [], config, path, name="m", calibration={}, device="cpu")
    (folder / format).mkdir()
    FORMATS[format].write(Artifact(path), folder / format, options or FormatOptions())
    return Reference(path, read_rows(HELDOUT)[:4]), folder / format


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("head"))


def check(folder, reference, format="onnx", **options):
    settings = replace(SETTINGS, images=2, questions=2)
    return FORMATS[format].check(folder, reference, FormatOptions(**options), settings)


@pytest.mark.parametrize(("tied", "bits"), [(True, 4), (False, 2)])
def test_onnx_of_random_weights_passes_every_gate(tied, bits, tmp_path):
    source = make_random_checkpoint(tmp_path / "model", "qwen2_vl", layers=2, depth=3, tied=tied)
    config = replace(HEAD8, head_bits=bits, group_size=-1)
    assert_all_pass(check(tmp_path / "onnx", export(tmp_path, config, source)[0]))


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["qwen3_vl", "internvl"])
def test_families_that_are_traced(arch, tiny, tmp_path):
    reference, folder = export(tmp_path, HEAD8, tiny(arch, tied=True))
    assert_all_pass(check(folder, reference))


def test_the_embedding_is_the_source_s_and_the_head_one_node_that_makes_the_logits(exported):
    reference, folder = exported
    rows = check(folder, reference)
    assert_all_pass(rows)
    by_name = {r.name: r for r in rows}
    assert by_name["each MatMulNBits at level 0"].compared == LINEARS
    graph = onnx.load(folder / "text.onnx", load_external_data=False).graph
    (node,) = (n for n in graph.node if "logits" in n.output)
    assert node.op_type == "MatMulNBits"
    assert next(a.i for a in node.attribute if a.name == "bits") == 8
    embedding = onnx.load(folder / "embedding.onnx", load_external_data=False).graph
    kinds = [t.data_type for t in embedding.initializer if "embed_tokens" in t.name]
    assert kinds == [onnx.TensorProto.BFLOAT16]
    source = Checkpoint(REFERENCE_VLM).tensor("model.embed_tokens.weight").float().numpy()
    assert np.array_equal(reference.weights.array("model.embed_tokens.weight"), source)


def test_level_4_and_float16(tmp_path):
    options = {"onnx_accuracy_level": 4, "onnx_dtype": "float16"}
    reference, folder = export(tmp_path, options=FormatOptions(**options))
    assert_all_pass(check(folder, reference, **options))


@pytest.mark.parametrize(
    ("part", "kind"), [("scales", "ulp"), ("zero_points", "bit"), ("qweight", "bit")]
)
def test_one_changed_value_of_the_head_is_caught_and_named(exported, tmp_path, part, kind):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "text", f"lm_head.{part}", kind, random.Random(part))
    for row in weight_rows(check(tmp_path / "onnx", reference)):
        assert row.status == "failed" and "lm_head.weight" in row.worst


def test_every_level_sees_a_wrong_scale_of_the_head(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")

    def change(scales):
        scales[7] *= 1.01

    overwrite(tmp_path / "onnx", "text", "lm_head.scales", change)
    failed = {r.level: r for r in check(tmp_path / "onnx", reference) if r.status == "failed"}
    assert set(failed) == {"L1", "L2", "L3"} and failed["L2"].worst == "lm_head"


def test_llama_cpp_computes_with_the_head_of_its_own(tmp_path):
    """The head is tied to the embedding in the source. The GGUF has an output.weight all the same.

    The embedding keeps its type.
    """
    reference, folder = export(tmp_path, replace(HEAD8, bits=3, group_size=-1), format="gguf")
    rows = check(folder, reference, "gguf")
    assert_all_pass(rows)
    seen = next(r for r in rows if r.name == "linears seen in the run")
    assert seen.status == "passed" and seen.compared >= LINEARS
    text, _ = find_files(folder)
    types = {name: t.type for name, t in GGUFFile(text).tensors.items()}
    assert types["output.weight"] == "Q8_0" and types["token_embd.weight"] in ("F16", "BF16", "F32")
    assert hub_names(reference)["output.weight"] == "lm_head.weight"


def test_llama_cpp_reads_a_changed_head_and_says_so(tmp_path):
    reference, folder = export(tmp_path, format="gguf")
    text, _ = find_files(folder)
    tensor = GGUFFile(text).tensors["output.weight"]
    data = bytearray(text.read_bytes())
    data[tensor.offset + 40] ^= 1  # a code of the second block
    text.write_bytes(data)
    weights = [r for r in check(folder, reference, "gguf") if r.name.startswith("weights by")]
    assert len(weights) == 3
    assert all(r.status == "failed" and "lm_head.weight" in r.worst for r in weights)
