"""Mistral 3 in ONNX Runtime: what no other family has, and faults that only it can have."""

from __future__ import annotations

import shutil

import numpy as np
import onnx
import pytest
import torch

from runtime_tests.test_onnx import assert_all_pass, export, run_check
from tests.artifacts import GRIDS
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.onnx.proof.runner import FEATURES, OnnxRunner, run
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE
from vlmq_export.formats.proof.checks import CheckSettings, relative_error

SETTINGS = CheckSettings(images=1, questions=1, threads=1)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(family) → (reference, folder), made once."""
    made = {}

    def get(arch="ministral3"):
        if arch not in made:
            folder = tmp_path_factory.mktemp(arch)
            source = make_tiny(folder / "model", arch)
            made[arch] = export(folder, GRIDS["w4g128"], source, rows=2)
        return made[arch]

    return get


@pytest.mark.parametrize("arch", ["ministral3", pytest.param("mistral3", marks=pytest.mark.slow)])
def test_every_gate_passes(arch, exported):
    """Queries of Ministral 3 grow from position 16 on, which the prompts reach."""
    assert_all_pass(run_check(*exported(arch), settings=SETTINGS))


def test_images_of_several_sizes(exported):
    """What fills the smaller ones up is cut off, and each goes in alone."""
    reference, folder = exported()
    sizes, runner = torch.tensor([[56, 168], [140, 84], [28, 224]]), OnnxRunner(folder)
    pixels = torch.randn(3, 3, 140, 224, generator=torch.Generator().manual_seed(0))
    for image, (height, width) in zip(pixels, sizes.tolist()):
        image[:, height:], image[:, :, width:] = 0, 0
    with torch.no_grad():
        parts = reference.model.model.get_image_features(pixels, sizes).pooler_output
    assert [len(part) for part in parts] == [2 * 6, 5 * 3, 1 * 8]
    got = runner.features(pixels.numpy(), sizes.numpy())
    assert relative_error(got, torch.cat(list(parts)).numpy()) <= FORMAT_GATE


def test_images_of_one_size_in_one_run(exported):
    reference, folder = exported()
    pixels = torch.randn(3, 3, 112, 84, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        sizes = torch.tensor([[112, 84]] * 3)
        parts = reference.model.model.get_image_features(pixels, sizes).pooler_output
    got = run(OnnxRunner(folder).vision, {"pixel_values": pixels.numpy()}, [FEATURES])[0]
    assert relative_error(got, torch.cat(list(parts)).numpy()) <= FORMAT_GATE


def changed(made, tmp_path, graph, change):
    """The same (reference, folder) with constants of one graph changed in place."""
    reference, folder = made
    copy = shutil.copytree(folder, tmp_path / "onnx")
    model = onnx.load(copy / f"{graph}.onnx", load_external_data=False)
    nodes = [n for n in model.graph.node if n.op_type == "Constant"]
    constants = [a.t for n in nodes for a in n.attribute if a.name == "value"]
    found = 0
    for tensor in [*model.graph.initializer, *constants]:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            before = onnx.numpy_helper.to_array(tensor)
            after = change(tensor.name, before.copy())
            found += not np.array_equal(before, after)
            tensor.CopyFrom(onnx.numpy_helper.from_array(after, tensor.name))
    assert found == 1, f"{found} constants are changed"
    (copy / f"{graph}.onnx").write_bytes(model.SerializeToString())
    return reference, copy


def test_queries_that_grow_otherwise_are_caught(exported, tmp_path):
    """The factor is a number of the graph: 0.1 in this model, as in the published ones."""
    a_tenth = np.float32(0.1)
    made = changed(
        exported(), tmp_path, "text", lambda _, x: x * 0.9 if x.size == 1 and x == a_tenth else x
    )
    rows = run_check(*made, settings=SETTINGS)
    assert next(c for c in rows if c.name.startswith("logits at")).status == "failed"


def test_a_changed_frequency_of_the_tower_is_caught(exported, tmp_path):
    made = changed(
        exported(),
        tmp_path,
        "vision",
        lambda name, x: np.nextafter(x, np.float32(1)) if name == "vision.inv_freq" else x,
    )
    rows = run_check(*made, settings=SETTINGS)
    assert "vision.inv_freq" in [c.worst for c in rows if c.status == "failed"]
