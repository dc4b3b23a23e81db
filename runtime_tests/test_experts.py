"""Experts in GPTQ and GGUF: every gate, and faults that change no shape and no name."""

import re
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from runtime_tests.test_gguf import export, native, run_check
from runtime_tests.test_gguf import row as row_of
from tests.artifacts import GRIDS, rtn_artifact
from vlmq_export import bundled
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gguf.proof.rows import Exported
from vlmq_export.formats.gguf.proof.weights import weights_read_back
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gptq.proof.check import check
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.gptq.requirements import missing
from vlmq_export.formats.gptq.write import write
from vlmq_export.formats.in_transformers.proof.rows import own_decoder
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.samples.rows import read_rows

SETTINGS = CheckSettings(images=2, threads=1)
MODULE = "model.language_model.layers.1.mlp.experts."

pytestmark = pytest.mark.skipif(
    bool(missing()) and "gptq" not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)


@pytest.fixture(scope="module")
def exported(tiny, tmp_path_factory):
    """(reference, folder) of a tiny Qwen3-VL-MoE at 4 bits."""
    folder = tmp_path_factory.mktemp("experts")
    artifact = rtn_artifact(folder / "artifact", GRIDS["w4g128"], tiny("qwen3_vl_moe"))
    (folder / "gptq").mkdir()
    write(artifact, folder / "gptq", FormatOptions())
    return Reference(artifact.path, read_rows(bundled.HELDOUT)[:2]), folder / "gptq"


def test_gptqmodel_loads_every_expert(exported):
    """transformers has no place for their integers, and GPTQModel.load makes one."""
    reference, folder = exported
    rows = check(folder, reference, FormatOptions(), SETTINGS)
    assert [r.status for r in rows] == ["passed"] * 6 + ["info"], rows
    assert rows[2].compared == reference.weights.count
    assert rows[3].compared == len(reference.weights.linears) == 2 * (4 + 3 * 6)


def changed(folder, out, change):
    """A copy of the folder with other tensors."""
    shutil.copytree(folder, out)
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def swap(tensors) -> None:
    """Two experts change places, the router does not."""
    for name in [n for n in tensors if n.startswith(f"{MODULE}2.")]:
        other = name.replace(f"{MODULE}2.", f"{MODULE}4.")
        tensors[name], tensors[other] = tensors[other], tensors[name]


def damage(tensors) -> None:
    """One code of one expert."""
    tensors[f"{MODULE}3.up_proj.qweight"][5, 7] ^= 1 << 8


@pytest.mark.parametrize(
    ("change", "experts"), [(swap, (2, 4)), (damage, (3,))], ids=["swapped", "damaged"]
)
def test_a_fault_of_an_expert_is_caught_and_named(exported, tmp_path, change, experts):
    reference, folder = exported
    row = own_decoder(GptqFolder(changed(folder, tmp_path / "gptq", change)), reference)
    assert row.status == "failed"
    assert any(f"{MODULE}{e}." in row.worst for e in experts), row


@pytest.fixture(scope="module", params=["w4g128", "Q4_K_M"])
def gguf(request, tiny, tmp_path_factory):
    """(reference, folder) of one with a layer behind those that take DeepStack's features."""
    folder, model = tmp_path_factory.mktemp("experts"), tiny("qwen3_vl_moe", layers=3)
    if request.param in GRIDS:
        return export(folder, GRIDS[request.param], model)
    return native(folder, request.param, model)


def test_every_expert_is_in_its_place_of_a_stack(gguf):
    """One tensor of each kind has all experts of a layer, and the router stays float32."""
    reference, folder = gguf
    file = GGUFFile(find_files(folder)[0])
    assert file.tensors["blk.1.ffn_gate_inp.weight"].type == "F32"
    for kind in ("gate", "up", "down"):
        stack = file.array(f"blk.1.ffn_{kind}_exps.weight")
        for e, matrix in enumerate(stack):
            want = reference.weights.array(f"{MODULE}{e}.{kind}_proj.weight")
            assert np.array_equal(matrix, want)


def swap_in_stack(data: np.ndarray) -> None:
    """Two experts change places."""
    data[[2, 4]] = data[[4, 2]]


def damage_in_stack(data: np.ndarray) -> None:
    """One bit of one expert's blocks."""
    data[3, 77] ^= 1


@pytest.mark.parametrize(
    ("change", "experts"),
    [(swap_in_stack, (2, 4)), (damage_in_stack, (3,))],
    ids=["swapped", "damaged"],
)
def test_a_fault_in_a_stack_is_caught_and_named(gguf, tmp_path, change, experts):
    reference, folder = gguf
    folder = shutil.copytree(folder, tmp_path / "gguf")
    path = find_files(folder)[0]
    tensor = GGUFFile(path).tensors["blk.1.ffn_up_exps.weight"]
    data = np.memmap(path, np.uint8, "r+", tensor.offset, (6, tensor.nbytes // 6))
    change(data)
    data.flush()
    rows = [*weights_read_back(Exported.open(folder, reference, SETTINGS))]
    assert [row.status for row in rows] == ["failed"] * 3  # by three readers
    for row in rows:
        assert re.findall(r"experts\.(\d).up_proj.weight", row.worst) == [*map(str, experts)], row


@pytest.mark.slow
def test_llama_cpp_computes_something_else_with_swapped_experts(gguf, tmp_path):
    reference, folder = gguf
    folder = shutil.copytree(folder, tmp_path / "gguf")
    path = find_files(folder)[0]
    tensor = GGUFFile(path).tensors["blk.1.ffn_up_exps.weight"]
    data = np.memmap(path, np.uint8, "r+", tensor.offset, (6, tensor.nbytes // 6))
    swap_in_stack(data)
    data.flush()
    rows = run_check(reference, folder, SETTINGS)
    assert row_of(rows, "every product of the language model").status == "failed"
    assert row_of(rows, "float32 twin, text prompts").status == "failed"


@pytest.mark.slow
def test_the_runtime_sees_swapped_experts_too(exported, tmp_path):
    reference, folder = exported
    rows = check(changed(folder, tmp_path / "gptq", swap), reference, FormatOptions(), SETTINGS)
    failed = {r.level for r in rows if r.status == "failed"}
    assert failed == {"L1", "L2", "L3"}, rows
    assert rows[2].status == "failed" and f"{MODULE}2." in rows[2].worst
