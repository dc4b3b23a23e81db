"""Experts in ONNX Runtime and onnxruntime-genai: every gate, and faults that change no shape."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable

import onnx
import pytest

from runtime_tests.test_onnx import assert_all_pass, damage, export, run_check, weight_rows
from tests.artifacts import GRIDS
from vlmq_export.formats.onnx.proof.experts import expert_places
from vlmq_export.formats.onnx.proof.weights import own_reader, runtime_reader
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import CheckSettings

SETTINGS = CheckSettings(images=1, questions=1, threads=1)
MODULE = "model.language_model.layers.1.mlp.experts."


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """(reference, folder) of a tiny Qwen3-VL-MoE at 4 bits."""
    folder = tmp_path_factory.mktemp("experts")
    return export(folder, GRIDS["w4g128"], tiny("qwen3_vl_moe"), rows=2)


def test_every_gate_passes_in_onnx_runtime_and_in_genai(exported):
    """genai takes the graphs as those of Qwen3-VL."""
    reference, folder = exported
    rows = run_check(reference, folder, settings=SETTINGS)
    assert_all_pass(rows)
    assert sum(r.name.startswith("onnxruntime-genai") for r in rows) == 4
    places = next(r for r in rows if r.name == "experts in their places")
    assert places.compared == 2 * 6 * 3  # layers, experts, linears


def test_each_expert_has_two_products(exported):
    _, folder = exported
    nodes = onnx.load(folder / "text.onnx", load_external_data=False).graph.node
    found = [n.name for n in nodes if n.op_type == "MatMulNBits" and ".experts." in n.name]
    layers = (MODULE.replace("1", str(layer)) for layer in range(2))
    kinds = ("gate_proj|up_proj", "down_proj")
    assert sorted(found) == sorted(
        f"{n}{e}.{kind}" for n in layers for e in range(6) for kind in kinds
    )


def changed(folder, out, change: Callable[[onnx.GraphProto], None]) -> OnnxFolder:
    """The folder with another decoder graph."""
    shutil.copytree(folder, out)
    model = onnx.load(out / "text.onnx", load_external_data=False)
    change(model.graph)
    (out / "text.onnx").write_bytes(model.SerializeToString())
    return OnnxFolder(out)


def exchange_weights(graph: onnx.GraphProto) -> None:
    """Two experts change places, the router does not."""
    for tensor in graph.initializer:
        for e, other in ((2, 4), (4, 2)):
            if tensor.name.startswith(f"{MODULE}{e}."):
                tensor.name = tensor.name.replace(f"{MODULE}{e}.", f"{MODULE}{other}.")
                break


def exchange_tokens(graph: onnx.GraphProto) -> None:
    """Two experts are given each other's tokens in one product."""
    two, four = (
        next(n for n in graph.node if n.name == f"{MODULE}{e}.gate_proj|up_proj") for e in (2, 4)
    )
    two.input[0], four.input[0] = four.input[0], two.input[0]


def exchange_results(graph: onnx.GraphProto) -> None:
    """What two experts give is taken for that of the other."""
    joined = next(n for n in graph.node if n.name == f"{MODULE}*.down_proj")
    joined.input[2], joined.input[4] = joined.input[4], joined.input[2]


def test_exchanged_weights_are_caught_and_named(exported, tmp_path):
    reference, folder = exported
    written = changed(folder, tmp_path / "onnx", exchange_weights)
    for row in [*own_reader(written, reference), *runtime_reader(written, reference, SETTINGS)]:
        assert row.status == "failed"
        assert f"{MODULE}2." in row.worst and f"{MODULE}4." in row.worst


def test_one_changed_bit_of_an_expert_is_caught_and_named(exported, tmp_path):
    reference, folder = exported
    shutil.copytree(folder, tmp_path / "onnx")
    damage(tmp_path / "onnx", "text", f"{MODULE}3.down_proj.qweight", "bit", random.Random(0))
    written = OnnxFolder(tmp_path / "onnx")
    for row in [*own_reader(written, reference), *runtime_reader(written, reference, SETTINGS)]:
        assert row.status == "failed" and f"{MODULE}3.down_proj.weight" in row.worst


@pytest.mark.parametrize(
    ("change", "kinds"),
    [(exchange_tokens, ("gate_proj", "up_proj")), (exchange_results, ("down_proj",))],
)
def test_exchanged_tokens_and_results_are_caught_and_named(exported, tmp_path, change, kinds):
    """No prompt need reach these experts."""
    reference, folder = exported
    (row,) = expert_places(changed(folder, tmp_path / "onnx", change), reference)
    wrong = [f"{MODULE}{e}.{kind}" for e in (2, 4) for kind in kinds]
    assert row.status == "failed" and row.worst == ", ".join(wrong)


@pytest.mark.slow
@pytest.mark.parametrize("change", [exchange_weights, exchange_results])
def test_the_runtime_computes_something_else_with_exchanged_experts(exported, tmp_path, change):
    reference, folder = exported
    changed(folder, tmp_path / "onnx", change)
    rows = run_check(reference, tmp_path / "onnx", settings=SETTINGS)
    failed = {r.level for r in rows if r.status == "failed"}
    assert failed == {"L1", "L3"} | ({"L2"} if change is exchange_weights else set()), rows
    assert {r.status for r in weight_rows(rows)} == {
        "failed" if change is exchange_weights else "passed"
    }
