"""A quantized vision tower in llama.cpp and in ONNX Runtime, and changed files that are caught."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

from runtime_tests import test_gguf, test_onnx
from tools.reference_vlm import random_checkpoint
from tools.reference_vlm.tiny_checkpoints import make_tiny
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export.bundled import CALIBRATION, HELDOUT
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gguf.types.table import TYPES
from vlmq_export.formats.model_plan import artifact_plan, model_plan
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import VISION_TYPES, QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

SETTINGS = CheckSettings(images=2, questions=4, threads=1)
# Options of make_tiny. llama.cpp's Qwen2.5-VL repeats its pattern of windows, and Qwen3-VL needs
# more layers than there are stacked features.
SHAPE = {"qwen2_5_vl": {"depth": 4}, "qwen3_vl": {"layers": 3}}
ODD = "llava_onevision, odd"  # rows of 500 columns, as SigLIP has some of 4304
GATED = "qwen2_5_vl, odd"  # the 3B's shape divided by 8: its gated MLP has rows of 427 columns
# A tower as wide as the blocks of K types, and one whose MLP alone has other rows.
BLOCKS = ["idefics3, blocks", "internvl, blocks", "llava_onevision, some blocks"]
SHAPES = {
    "odd": {"intermediate_size": 500},
    "blocks": {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 512},
    "some blocks": {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 500},
}
CONFIG = QuantConfig(method="gptq", bits=4, group_size=64, vision_bits=8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(family, format, bits) → (reference, folder); each is made once."""
    solved, made = {}, {}

    def solve(arch, bits):
        if (arch, bits) not in solved:
            folder = tmp_path_factory.mktemp(f"{arch.replace(', ', '-')}-{bits}")
            family, *odd = arch.split(", ")
            shape = {"shape": {"vision_config": SHAPES[odd[0]]}} if odd else {}
            if arch == GATED:
                source = random_checkpoint.make(folder / "source", layers=2, scale=8)
            else:
                source = make_tiny(folder / "source", family, **SHAPE.get(family, {}), **shape)
            preprocessor = Preprocessor(source)
            samples = [preprocessor.sample(row) for row in read_rows(CALIBRATION)[:3]]
            changed = {"vision_bits": bits, "vision_short": bool(odd)}
            if arch in BLOCKS:
                changed["vision_type"] = VISION_TYPES[bits][0]
            config = QuantConfig(**CONFIG.to_dict() | changed)
            given = {"name": "tiny-vlm", "calibration": {}, "device": "cpu"}
            quantize(Checkpoint(source), samples, config, folder / "artifact", **given)
            solved[arch, bits] = folder
        return solved[arch, bits]

    def get(arch, name, bits=8):
        if (arch, name, bits) not in made:
            folder = solve(arch, bits)
            (folder / name).mkdir()
            FORMATS[name].write(Artifact(folder / "artifact"), folder / name, FormatOptions())
            made[arch, name, bits] = folder / name
        reference = Reference(made[arch, name, bits].parent / "artifact", read_rows(HELDOUT)[:4])
        return reference, made[arch, name, bits]

    return get


CASES = ["qwen2_5_vl", "llava_onevision", "internvl", "idefics3", ODD, GATED]
OTHERS = [a for a in ARCHES if a not in CASES]


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


def slow_cases(*cases):
    return [pytest.param(*case, marks=pytest.mark.slow) for case in cases]


def check(name, reference, folder):
    return FORMATS[name].check(folder, reference, FormatOptions(), SETTINGS)


def size_of(folder) -> int:
    return sum(
        f.stat().st_size for f in folder.iterdir() if f.suffix in (".gguf", ".onnx", ".data")
    )


@pytest.mark.parametrize("arch", [*CASES, *slow(*OTHERS)])
def test_eight_bits_pass_every_gate_of_llama_cpp(arch, exported):
    reference, folder = exported(arch, "gguf")
    rows = check("gguf", reference, folder)
    test_gguf.assert_all_pass(rows)
    assert test_gguf.row(rows, "every product of the vision tower").value < 1e-7
    assert test_gguf.row(rows, "image embeddings of the mmproj's float32 twin").value < 1e-3
    mmproj = find_files(folder)[1]
    assert mmproj.name.endswith("-Q8_0.gguf")
    types = {t.type for t in GGUFFile(mmproj).tensors.values()}
    assert types == {"F32", "Q8_0"}
    if arch == "internvl":  # computed after the twin's run, whose arrays are others
        other = test_gguf.row(rows, "image embeddings with the class token's position row")
        assert "this build wants it last" in other.detail


@pytest.mark.parametrize("arch", [*CASES[:1], *slow(*CASES[1:], *OTHERS)])
def test_eight_bits_pass_every_gate_of_onnx_runtime(arch, exported):
    reference, folder = exported(arch, "onnx")
    test_onnx.assert_all_pass(check("onnx", reference, folder))
    tower = [n for n in OnnxFolder(folder).linears if reference.architecture.family.is_vision(n)]
    assert tower and {OnnxFolder(folder).linear(n).bits for n in tower} == {8}
    assert {OnnxFolder(folder).linear(n).block_size for n in tower} == {32}


@pytest.mark.parametrize("bits", [8, *slow(2, 3, 4)])
def test_rows_with_a_short_last_group_pass_every_gate_of_onnx_runtime(bits, exported):
    reference, folder = exported(ODD, "onnx", bits)
    test_onnx.assert_all_pass(check("onnx", reference, folder))
    written = OnnxFolder(folder)
    odd = [written.linear(n) for n in written.linears if written.linear(n).in_features == 500]
    assert odd and {linear.block_size for linear in odd} == {32}
    assert {linear.scales.shape[1] for linear in odd} == {16}


@pytest.mark.parametrize("bits", [4, *slow(2, 3)])
@pytest.mark.parametrize("name", ["gguf", *slow("onnx")])
def test_other_widths_pass_too(name, bits, exported):
    reference, folder = exported("llava_onevision", name, bits)
    rows = check(name, reference, folder)
    (test_gguf if name == "gguf" else test_onnx).assert_all_pass(rows)
    if name == "gguf":
        types = {t.type for t in GGUFFile(find_files(folder)[1]).tensors.values()}
        assert types == {"F32", "Q4_0"}


@pytest.mark.parametrize(
    ("arch", "bits", "types"),
    [
        (BLOCKS[0], 3, {"F32", "Q3_K"}),
        (BLOCKS[2], 6, {"F32", "Q6_K", "Q8_0"}),
        *slow_cases(
            (BLOCKS[0], 2, {"F32", "Q2_K"}),
            (BLOCKS[1], 5, {"F32", "Q5_K"}),
            (BLOCKS[2], 3, {"F32", "Q3_K", "Q4_0"}),
        ),
    ],
)
def test_block_types_pass_every_gate_of_llama_cpp(arch, bits, types, exported):
    """Where no block of 256 divides a row, groups of 32 take its place, with zeros behind them."""
    reference, folder = exported(arch, "gguf", bits)
    rows = check("gguf", reference, folder)
    test_gguf.assert_all_pass(rows)
    assert test_gguf.row(rows, "every product of the vision tower").value < 1e-7
    mmproj = find_files(folder)[1]
    assert {t.type for t in GGUFFile(mmproj).tensors.values()} == types
    assert mmproj.name.endswith(f"-{VISION_TYPES[bits][0]}.gguf")


def test_both_formats_hold_the_same_integers(exported):
    """Q8_0's codes and scales, byte for byte, are those of MatMulNBits."""
    _, folder = exported("llava_onevision", "gguf")
    file = GGUFFile(find_files(folder)[1])
    onnx = OnnxFolder(exported("llava_onevision", "onnx")[1])
    name = next(n for n in onnx.linears if n.endswith("layers.1.mlp.fc1"))
    blocks = file.raw("v.blk.1.ffn_up.weight").reshape(-1, 34)
    node = onnx.linear(name)
    scales = blocks[:, :2].copy().view("<f2").reshape(node.scales.shape)
    assert (scales == node.scales).all()
    codes = blocks[:, 2:].view("i1").astype(int).reshape(node.weight.shape)
    assert (codes == node.weight.astype(int) - 128).all()
    assert (node.zero_points == 128).all()


def test_zeros_stand_behind_an_mlp_that_blocks_do_not_fill(exported):
    """The file's MLP is 512 wide and the source's 500; what is there of it is ONNX's."""
    _, folder = exported(ODD, "gguf")
    file, onnx = GGUFFile(find_files(folder)[1]), OnnxFolder(exported(ODD, "onnx")[1])
    assert file.metadata["clip.vision.feed_forward_length"] == 512
    up, down = (file.array(f"v.blk.1.ffn_{n}.weight") for n in ("up", "down"))
    assert up.shape[0] == down.shape[1] == 512 and not up[500:].any() and not down[:, 500:].any()
    bias = file.array("v.blk.1.ffn_up.bias")
    assert bias.shape == (512,) and bias[:500].any() and not bias[500:].any()
    for name, values in (("fc1", up[:500]), ("fc2", down[:, :500])):
        node = onnx.linear(next(n for n in onnx.linears if n.endswith(f"layers.1.mlp.{name}")))
        scales = node.scales.astype(np.float32).repeat(32, axis=1)[:, : values.shape[1]]
        codes = node.weight.reshape(len(values), -1)[:, : values.shape[1]].astype(np.float32) - 128
        assert (codes * scales == values).all()


# mobius' graphs are 8 % of so small a Qwen2.5-VL, with the option or without, and are estimated.
PLANNED = [
    ("gguf", "qwen2_5_vl", 8),
    ("gguf", BLOCKS[2], 6),
    *((n, a, 8) for n in ("gguf", "onnx") for a in (CASES[1], ODD)),
]


@pytest.mark.parametrize(("name", "arch", "bits"), PLANNED)
def test_the_plan_of_the_artifact_is_that_of_the_source(name, arch, bits, exported):
    _, folder = exported(arch, name, bits)
    artifact = Artifact(folder.parent / "artifact")
    source = model_plan(Checkpoint(folder.parent / "source"), artifact.config, "tiny-vlm")
    sizes = [
        FORMATS[name].plan(model, FormatOptions()).size_bytes
        for model in (source, artifact_plan(artifact))
    ]
    assert sizes[0] == sizes[1]
    assert abs(sizes[0] / size_of(folder) - 1) < 0.02


# --- changed files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arch", "bits", "kind", "byte"),
    [
        ("llava_onevision", 8, "Q8_0", 0),
        ("llava_onevision", 8, "Q8_0", 5),
        (BLOCKS[0], 3, "Q3_K", 40),
        (BLOCKS[2], 6, "Q6_K", 200),
    ],
    ids=["scale", "code", "code of a block", "scale of a block"],
)
def test_one_changed_byte_of_the_mmproj_is_caught_and_named(
    arch, bits, kind, byte, exported, tmp_path
):
    reference, folder = exported(arch, "gguf", bits)
    file = find_files(shutil.copytree(folder, tmp_path / "gguf"))[1]
    name = "v.blk.1.ffn_up.weight"
    t = GGUFFile(file).tensors[name]
    assert t.type == kind
    data = bytearray(file.read_bytes())
    data[t.offset + 7 * TYPES[kind].nbytes + byte] ^= 1
    file.write_bytes(data)
    rows = check("gguf", reference, tmp_path / "gguf")
    caught = [r for r in rows if r.level == "L1" and r.status == "failed"]
    assert len(caught) == 3 and all(name in r.worst for r in caught)
    product = test_gguf.row(rows, "every product of the vision tower")
    assert product.status == "failed" and name in product.worst


@pytest.mark.parametrize("name", ["v.blk.1.ffn_down.weight", "v.blk.1.ffn_up.bias"])
def test_a_number_where_zeros_fill_the_mlp_is_caught_and_named(name, exported, tmp_path):
    reference, folder = exported(ODD, "gguf")
    file = find_files(shutil.copytree(folder, tmp_path / "gguf"))[1]
    t = GGUFFile(file).tensors[name]
    data = bytearray(file.read_bytes())
    row = TYPES[t.type].row_bytes(512)
    data[t.offset + row - 1] ^= 64  # the last column of the first row
    file.write_bytes(data)
    rows = check("gguf", reference, tmp_path / "gguf")
    caught = [r for r in rows if r.level == "L1" and r.status == "failed"]
    assert len(caught) == 3 and all(name in r.worst for r in caught)


@pytest.mark.parametrize(
    ("arch", "module", "at"),
    [("llava_onevision", "mlp.fc1", 99), (ODD, "mlp.fc2", 7 * 512 + 499)],
    ids=["whole", "the last code of a short group"],
)
def test_one_changed_code_of_vision_onnx_is_caught_and_named(arch, module, at, exported, tmp_path):
    reference, folder = exported(arch, "onnx")
    shutil.copytree(folder, tmp_path / "onnx")
    written = OnnxFolder(tmp_path / "onnx")
    name = next(n for n in written.linears if n.endswith(f"layers.1.{module}"))
    node, _ = written._linears[name]
    entry = {e.key: e.value for e in node.weight.external_data}
    data = tmp_path / "onnx" / entry["location"]
    content = bytearray(data.read_bytes())
    content[int(entry["offset"]) + at] ^= 1
    data.write_bytes(content)
    rows = check("onnx", reference, tmp_path / "onnx")
    caught = [r for r in rows if r.status == "failed"]
    assert {r.level for r in caught} >= {"L1", "L2"}
    assert all(name in r.worst for r in caught if r.level in ("L1", "L2"))
