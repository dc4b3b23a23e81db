"""Mixed widths in every runtime: all gates pass, and one changed value is caught and named."""

import json
import shutil
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from tests.artifacts import GRIDS, mixed, rtn_artifact
from vlmq_export import bundled
from vlmq_export.formats.compressed_tensors.read import CompressedFolder
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.gguf.read import GGUFFile, find_files
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.onnx.read import OnnxFolder
from vlmq_export.formats.proof.checks import CheckSettings
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.config import BITS
from vlmq_export.quantizer.samples.rows import read_rows

OPTIONS = FormatOptions(gptq_names="module")
SETTINGS = CheckSettings(images=2, questions=2, threads=1)
LOADED = [name for name in FORMATS if name != "gguf"]  # by what config.json says of each linear


def needs(name: str) -> None:
    """Skips a test whose runtime is neither installed nor declared present."""
    lacking = import_module(f"vlmq_export.formats.{FORMATS[name].folder}.requirements").missing()
    if lacking and name not in required_runtimes():
        pytest.skip(f"{lacking} not installed and not declared present")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return rtn_artifact(tmp_path_factory.mktemp("a") / "artifact", mixed(GRIDS["w4g128-sym"]))


@pytest.fixture(scope="module")
def reference(artifact):
    return Reference(artifact.path, read_rows(bundled.HELDOUT)[:4])


def export(artifact, folder: Path, name: str) -> Path:
    folder.mkdir()
    FORMATS[name].write(artifact, folder, OPTIONS)
    return folder


@pytest.fixture(scope="module")
def exported(artifact, tmp_path_factory):
    """exported(format): its folder, written once."""
    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            made[name] = export(artifact, tmp_path_factory.mktemp("out") / name, name)
        return made[name]

    return get


def assert_proven(rows):
    wrong = [row for row in rows if row.status not in ("passed", "info")]
    assert not wrong, wrong
    assert {row.level for row in rows if row.status == "passed"} == {"L1", "L2", "L3"}


@pytest.mark.parametrize("name", [*FORMATS])
def test_mixed_widths_pass_every_gate(artifact, reference, exported, name):
    needs(name)
    assert {*artifact.config.widths.values()} == {*BITS}
    assert_proven(FORMATS[name].check(exported(name), reference, OPTIONS, SETTINGS))


@pytest.mark.slow
@pytest.mark.parametrize("name", [*FORMATS])
def test_so_do_zero_points_below_eight_bits(tmp_path, name):
    needs(name)
    made = rtn_artifact(tmp_path / "artifact", mixed(GRIDS["w4g128"]))
    expected = Reference(made.path, read_rows(bundled.HELDOUT)[:4])
    folder = export(made, tmp_path / name, name)
    assert_proven(FORMATS[name].check(folder, expected, OPTIONS, SETTINGS))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arch"),
    [("gptq", "qwen3_vl"), ("gptq", "gemma3"), ("gptq", "smolvlm")]
    + [("compressed-tensors", a) for a in ("qwen3_vl", "idefics3", "gemma3", "llava_onevision")],
)
def test_so_do_other_families(tiny, tmp_path, name, arch):
    """Some of them have a vision tower with layers of the decoder's names."""
    needs(name)
    source = tiny(arch)
    made = rtn_artifact(tmp_path / "artifact", mixed(GRIDS["w4g32"], source), source)
    expected = Reference(made.path, read_rows(bundled.HELDOUT)[:2])
    folder = export(made, tmp_path / name, name)
    assert_proven(FORMATS[name].check(folder, expected, OPTIONS, SETTINGS))


# --- changed files --------------------------------------------------------------------------------


def raw_scales(folder: Path, name: str, module: str) -> tuple[Path, int]:
    """The file that has the scales of a linear, and where they begin in it."""
    if name == "gguf":
        path = find_files(folder)[0]
        layer, end = module.removeprefix("model.layers.").split(".", 1)
        part = {"mlp.down_proj": "ffn_down", "self_attn.o_proj": "attn_output"}[end]
        return path, GGUFFile(path).tensors[f"blk.{layer}.{part}.weight"].offset
    if name == "onnx":
        needle = OnnxFolder(folder).linear(module).scales.astype(np.float16).tobytes()
        # Small tensors lie in the graph itself.
        files = folder / "text.onnx.data", folder / "text.onnx"
        file = next(f for f in files if needle in f.read_bytes())
    else:
        file = folder / "model.safetensors"
        opened = {"gptq": GptqFolder, "compressed-tensors": CompressedFolder}[name](folder)
        part = {"gptq": "scales", "compressed-tensors": "weight_scale"}[name]
        needle = opened.raw(f"{opened.stored_name(module)}.{part}").numpy().tobytes()
    data = file.read_bytes()
    assert data.count(needle) == 1
    return file, data.index(needle)


def of_width(artifact, bits: int) -> str:
    """A linear of a width that is alone with its input."""
    ends = ("mlp.down_proj", "self_attn.o_proj")
    return next(n for n, w in artifact.config.widths.items() if w == bits and n.endswith(ends))


@pytest.mark.parametrize("name", [*FORMATS])
def test_one_changed_scale_of_each_width_is_caught_and_named(
    artifact, reference, exported, tmp_path, name
):
    needs(name)
    shutil.copytree(exported(name), tmp_path / name)
    changed = [of_width(artifact, bits) for bits in BITS]
    for module in changed:
        file, at = raw_scales(tmp_path / name, name, module)
        data = bytearray(file.read_bytes())
        data[at] ^= 1  # the last bit of the first scale
        file.write_bytes(data)
    settings = CheckSettings(images=1, questions=1, threads=1)
    rows = FORMATS[name].check(tmp_path / name, reference, OPTIONS, settings)
    found = [r for r in rows if r.level == "L1" and r.status == "failed"]
    assert len(found) >= 2, rows  # by our reader, and by the runtime's
    for row in found:
        assert all(f"{module}.weight" in row.worst for module in changed), row


@pytest.mark.parametrize("name", [n for n in LOADED if n != "onnx"])
def test_a_width_that_the_settings_confuse_is_caught(reference, exported, tmp_path, name):
    """Two and four bits change places in config.json, which the runtime builds its linears by."""
    needs(name)
    shutil.copytree(exported(name), tmp_path / name)
    for file in ("config.json", "quantize_config.json"):
        path = tmp_path / name / file
        if path.is_file():
            config = json.loads(path.read_text("utf-8"))
            stated = config.get("quantization_config", config)
            swapped(stated)
            path.write_text(json.dumps(config), "utf-8")
    rows = FORMATS[name].check(tmp_path / name, reference, OPTIONS, SETTINGS)
    assert {r.level for r in rows if r.status == "failed"} == {"L1", "L2", "L3"}, rows


def swapped(stated: dict) -> None:
    """Let the rules, or the groups, of two and of four bits change places."""
    other = {2: 4, 4: 2}
    stated["bits"] = other.get(stated.get("bits"), stated.get("bits"))
    for rule in stated.get("dynamic", {}).values():
        rule["bits"] = other.get(rule["bits"], rule["bits"])
    for group in stated.get("config_groups", {}).values():
        weights = group["weights"]
        weights["num_bits"] = other.get(weights["num_bits"], weights["num_bits"])
