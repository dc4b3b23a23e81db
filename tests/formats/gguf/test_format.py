"""GGUF files of whole models: three readers decode the artifact's weights from them.

Small checkpoints of Qwen2-VL and Qwen2.5-VL, with nested and flat configs and with tied and untied
output matrices. Then the plan, and `inspect`. llama.cpp runs such files in runtime_tests.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, architecture_of, edit, rtn_artifact, tower_of
from vlmq_export import bundled
from vlmq_export.errors import FormatError
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf import read
from vlmq_export.formats.gguf.files.metadata import file_stem
from vlmq_export.formats.gguf.files.text import write_text
from vlmq_export.formats.gguf.tables.layout import Layout
from vlmq_export.formats.model_plan import LinearSpec, ModelPlan, TensorSpec, artifact_plan
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig

gguf = FORMATS["gguf"]
SIZE_TOLERANCE = 0.03  # of the planned size: metadata and padding are estimated
# tag of GRIDS → bits per weight of the planned block type
BITS = {
    "w4g128": 5.0,
    "w4g32": 5.0,
    "w4g256": 4.5,
    "w4": 4.5,
    "w4g128-sym": 4.5,
    "w3g128": 4.5,
    "w3-sym": 3.4375,
    "w2g128": 4.5,
    "w2": 2.625,
    "w8g128": 8.5,
}
# What is written where it takes less than the plan: every zero-point of this artifact is 1 or 2, so
# TQ2_0 holds it. The plan does not know the zero-points.
WRITTEN = {"w2": 2.0625}
READERS = (read.decode_ours, read.decode_gguf_py, read.decode_libggml)


def assert_text(path: Path, artifact: Artifact, reader) -> None:
    weights, places = Weights(artifact.path), Layout.of(artifact.architecture).text
    seen = set()
    for name, array in reader(path):
        assert array.dtype == np.float32, name
        assert np.array_equal(array, weights.array(places[name].hub)), name
        seen.add(places[name].hub)
    assert seen == {n for n in weights.names() if not n.startswith("visual.")}


def assert_vision(path: Path, artifact: Artifact, reader, dtype: str) -> None:
    got = dict(reader(path))
    expected = tower_of(artifact, dtype)
    assert set(got) == set(expected)
    for name, array in expected.items():
        assert np.array_equal(got[name], array), name


# --- whole files ----------------------------------------------------------------------------------


@pytest.mark.parametrize("tag", BITS)
def test_three_readers_find_the_artifacts_weights(tag, artifacts, tmp_path):
    artifact = artifacts(tag)
    plan = gguf.plan(artifact_plan(artifact), FormatOptions(name="tiny-vlm"))
    assert not plan.refusals and plan.bits_per_weight == BITS[tag]
    notes = gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    text, mmproj = read.find_files(tmp_path)
    for reader in READERS:
        assert_text(text, artifact, reader)
        assert_vision(mmproj, artifact, reader, "f16")
    seen, size = gguf.inspect(text), text.stat().st_size + mmproj.stat().st_size
    assert seen.bits_per_weight == WRITTEN.get(tag, plan.bits_per_weight)
    if tag not in WRITTEN:
        assert abs(plan.size_bytes - size) < SIZE_TOLERANCE * size
    assert notes[0].startswith("GGUF block types: 42 linears")


def test_a_flat_config_and_an_output_matrix_of_its_own(artifacts, qwen2_vl, tmp_path):
    artifact = artifacts("w4g128", qwen2_vl)
    assert not artifact.architecture.tied and "lm_head.weight" in artifact.float_names()
    gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm", mmproj_dtype="f32"))
    text, mmproj = read.find_files(tmp_path)
    assert mmproj.name.endswith("-F32.gguf")
    for reader in READERS:
        assert_text(text, artifact, reader)
        assert_vision(mmproj, artifact, reader, "f32")
    assert read.GGUFFile(text).tensors["output.weight"].type == "BF16"
    assert read.GGUFFile(mmproj).metadata["clip.projector_type"] == "qwen2vl_merger"


def test_the_twin_is_the_same_file_in_float32(gguf_files):
    artifact, text, _, twin = gguf_files
    assert_text(twin, artifact, read.decode_ours)
    one, other = read.GGUFFile(text), read.GGUFFile(twin)
    assert {t.type for t in other.tensors.values()} == {"F32"}
    shapes, twins = ({n: t.shape for n, t in f.tensors.items()} for f in (one, other))
    assert shapes == twins
    differing = {k for k in one.metadata if one.metadata[k] != other.metadata.get(k)}
    assert differing == {"general.file_type"} and set(one.metadata) == set(other.metadata)


def test_a_wrong_scale_by_one_ulp_is_seen_by_every_reader(gguf_files, tmp_path):
    """The readers decode the file and not the artifact, so a changed bit of a scale must show."""
    artifact, text, _, _ = gguf_files
    at = read.GGUFFile(text).tensors["blk.3.ffn_down.weight"].offset
    raw = bytearray(text.read_bytes())
    raw[at] ^= 1
    path = tmp_path / text.name
    path.write_bytes(raw)
    for reader in READERS:
        with pytest.raises(AssertionError, match=r"blk\.3\.ffn_down"):
            assert_text(path, artifact, reader)


def test_the_same_artifact_gives_the_same_bytes(gguf_files, tmp_path):
    artifact, text, mmproj, _ = gguf_files
    gguf.write(artifact, tmp_path, FormatOptions(name="tiny-vlm"))
    for file in (text, mmproj):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()


def test_names_of_files(gguf_files):
    _, text, mmproj, _ = gguf_files
    assert (text.name, mmproj.name) == ("tiny-vlm-3.6M-Q4_1.gguf", "mmproj-tiny-vlm-3.6M-F16.gguf")
    qwen = "Qwen2.5-VL-7B-Instruct"  # names its size already
    assert file_stem(qwen, 7_600_000_000, "Q4_1") == f"{qwen}-Q4_1"
    assert file_stem("a name/with parts", 2_000_000_000, "f16") == "a-name-with-parts-2.0B-F16"


@settings(max_examples=100, deadline=None)
@given(st.text(min_size=1, max_size=120), st.integers(1, 10**12))
def test_any_name_makes_a_file_name(name, parameters):
    stem = file_stem(name, parameters, "Q4_1")
    assert Path("x", f"{stem}.gguf").name == f"{stem}.gguf" and "\0" not in stem
    assert not stem.startswith(("mmproj-", "-", "."))
    assert stem.endswith("-Q4_1") and len(stem.encode()) < 250


def test_odd_names():
    assert file_stem("a/../b", 10_000_000, "Q4_1") == "a-..-b-10M-Q4_1"
    assert file_stem("../../etc/passwd", 10_000_000, "Q4_1") == "etc-passwd-10M-Q4_1"
    assert file_stem("mmproj-x", 10_000_000, "Q4_1") == "x-10M-Q4_1"
    assert file_stem("/", 10_000_000, "f16") == "model-10M-F16"


def test_float_dtypes_of_the_source_are_kept(artifacts, qwen2_vl, tmp_path):
    """The matrices that are not quantized keep their dtype. Vectors are always stored as F32."""
    for dtype, kind in ((torch.float16, "F16"), (torch.float32, "F32")):
        source = tmp_path / f"source-{kind}"
        shutil.copytree(qwen2_vl, source)
        file = source / "model.safetensors"
        save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file, {"format": "pt"})
        artifact = rtn_artifact(tmp_path / f"artifact-{kind}", GRIDS["w4g128"], source)
        path = tmp_path / f"{kind}.gguf"
        write_text(artifact, Layout.of(artifact.architecture), path, FormatOptions())
        types = {n: t.type for n, t in read.GGUFFile(path).tensors.items()}
        assert types["token_embd.weight"] == types["output.weight"] == kind
        assert types["output_norm.weight"] == "F32"
        assert_text(path, artifact, read.decode_gguf_py)


# --- plan and inspect -----------------------------------------------------------------------------


def model_plan(
    config: QuantConfig, shapes=((256, 512),), source: Path = bundled.REFERENCE_VLM
) -> ModelPlan:
    down = "model.layers.{}.mlp.down_proj"
    linears = [LinearSpec(down.format(i), *s, bias=False) for i, s in enumerate(shapes)]
    floats = [TensorSpec("model.embed_tokens.weight", (384, 256), "BF16")]
    return ModelPlan("m", architecture_of(source), linears, floats, config, source)


@pytest.mark.parametrize(
    "config, said",
    [
        (QuantConfig(bits=8, group_size=128), "use --sym"),
        (QuantConfig(bits=4, group_size=128, act_order="dynamic"), "--act-order"),
        (QuantConfig(bits=4, group_size=16), "--group-size 32"),
    ],
)
def test_refusals_name_the_option(config, said):
    refusals = gguf.plan(model_plan(config), FormatOptions()).refusals
    assert len(refusals) == 1 and said in refusals[0]


def test_refusals_are_raised_before_anything_is_written(tmp_path):
    refused = {
        "--sym": QuantConfig(bits=8, group_size=128),
        "--act-order": QuantConfig(act_order="dynamic"),
    }
    for said, config in refused.items():
        artifact = rtn_artifact(tmp_path / f"a{config.bits}", config)
        with pytest.raises(FormatError, match=said):
            gguf.write(artifact, tmp_path / "out", FormatOptions())
    assert not (tmp_path / "out").exists()


def test_dynamic_order_with_one_group_a_row_is_written(tmp_path):
    config = QuantConfig(bits=4, group_size=-1, act_order="dynamic")
    assert not gguf.plan(model_plan(config), FormatOptions()).refusals


def test_a_row_that_no_block_divides_is_refused_by_name():
    plan = model_plan(QuantConfig(bits=4, group_size=-1), [(64, 512), (64, 3420)])
    assert gguf.plan(plan, FormatOptions()).refusals == [
        "model.layers.1.mlp.down_proj has rows of 3420 columns, not a multiple of 32; "
        "GGUF cannot hold this layer quantized"
    ]


@pytest.mark.parametrize(
    "bits, group_size, symmetric, cheaper",
    [
        (2, 128, False, "--group-size -1 (or groups of 256) costs 2.625 in Q2_K"),
        (2, 32, True, "costs 2.0625 in TQ2_0"),
        (3, 128, False, "--sym --group-size -1 (or groups of 256) costs 3.4375 in Q3_K"),
        (3, -1, False, "--sym --group-size -1 (or groups of 256) costs 3.4375 in Q3_K"),
        (3, 128, True, "costs 3.4375 in Q3_K"),
        (2, -1, False, None),
        (3, -1, True, None),
        (4, 128, False, None),
        (8, 128, True, None),
    ],
)
def test_dear_containers_name_the_cheaper_choice(bits, group_size, symmetric, cheaper):
    config = QuantConfig(bits=bits, group_size=group_size, symmetric=symmetric)
    plan = gguf.plan(model_plan(config), FormatOptions())
    dear = [n for n in plan.notes if "4.5 bits per weight;" in n or "4.5 bits per weight (" in n]
    dear = [n for n in dear if not n.startswith("GGUF block types")]
    assert bool(dear) == (cheaper is not None) and (not cheaper or cheaper in dear[0])
    assert (plan.bits_per_weight == 4.5) == bool(cheaper)


def test_two_bit_notes_name_q2_0_where_it_would_fit():
    plan = model_plan(QuantConfig(bits=2, group_size=64, symmetric=True))
    note = next(n for n in gguf.plan(plan, FormatOptions()).notes if "2-bit" in n)
    assert "Q2_0 would take 2.25" in note


def test_a_high_pixel_limit_is_said(artifacts, tmp_path):
    artifact = Artifact(shutil.copytree(artifacts("w4g128").path, tmp_path / "artifact"))
    edit(artifact.source / "preprocessor_config.json", lambda j: j.update(max_pixels=12845056))
    notes = gguf.write(artifact, tmp_path / "out", FormatOptions())
    assert any("16384 tokens" in n and "--image-max-tokens" in n for n in notes)
    _, mmproj = read.find_files(tmp_path / "out")
    assert read.GGUFFile(mmproj).metadata["clip.vision.image_max_pixels"] == 12845056


def test_planning_and_inspecting_need_no_gguf_py(gguf_files):
    """Dry runs and inspect work without the packages gguf and xllamacpp."""
    code = (
        "import sys; sys.modules['gguf'] = sys.modules['xllamacpp'] = None\n"
        "from vlmq_export.formats.contract import FORMATS\n"
        f"print(FORMATS['gguf'].inspect({str(gguf_files[1])!r}).bits_per_weight)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "5.0", done.stderr


def test_inspect_a_file_and_a_folder(gguf_files):
    _, text, mmproj, _ = gguf_files
    one, both = gguf.inspect(text), gguf.inspect(text.parent)
    assert one.kind == "GGUF v3" and one.bits_per_weight == 5.0 and len(one.tensors) == 74
    assert one.metadata["qwen2vl.rope.freq_base"] == "10000.0"
    assert one.metadata["tokenizer.ggml.tokens"].endswith("(384)")
    assert len(both.tensors) == 74 + 71
    assert both.metadata[f"{mmproj.name}: clip.projector_type"] == "qwen2.5vl_merger"
    assert all(len(v) < 200 and v.isprintable() for v in both.metadata.values())
