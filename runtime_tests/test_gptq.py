"""GPTQ folders in the runtimes that read them.

They are transformers with gptqmodel, GPTQModel by itself, and the decoder of AutoGPTQ.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.artifacts import GRIDS, rtn_artifact
from tools.reference_vlm.model import make_random_checkpoint
from tools.reference_vlm.tiny_families import ARCHES
from vlmq_export import bundled
from vlmq_export.formats.contract import FormatOptions
from vlmq_export.formats.gptq.imports.checkpoint import GptqCheckpoint, write_artifact
from vlmq_export.formats.gptq.layout import GPTQMODEL_LOADS
from vlmq_export.formats.gptq.proof.check import autogptq_decoder, check, program, program_for
from vlmq_export.formats.gptq.read import GptqFolder
from vlmq_export.formats.gptq.requirements import missing
from vlmq_export.formats.gptq.write import write
from vlmq_export.formats.in_transformers.proof.rows import KERNEL_GATE, exact_rows, own_decoder
from vlmq_export.formats.in_transformers.proof.runtime import (
    Request,
    RuntimeFailed,
    Worker,
    run,
    save_prompts,
)
from vlmq_export.formats.proof.checks import CheckSettings, compare_weights
from vlmq_export.formats.proof.reference import Reference
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.proving.parity import required_runtimes
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

IMAGES = 4
SETTINGS = CheckSettings(images=IMAGES, threads=2)
ALL_PASS = ["L1 passed"] * 3 + ["L2 passed", "L3 passed", "L3 passed"]  # see by_level

pytestmark = pytest.mark.skipif(
    bool(missing()) and "gptq" not in required_runtimes(),
    reason=f"{missing()} not installed and not declared present",
)


def exported(folder: Path, artifact: Artifact, **options) -> Path:
    folder.mkdir()
    write(artifact, folder, FormatOptions(**options))
    return folder


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Artifact:
    """4 bits, groups of 128 with a permuted g_idx, so that every tensor of the format matters."""
    return rtn_artifact(tmp_path_factory.mktemp("artifact"), GRIDS["w4g128-dynamic"])


@pytest.fixture(scope="module")
def reference(artifact) -> Reference:
    return Reference(artifact.path, read_rows(bundled.HELDOUT)[:IMAGES])


@pytest.fixture(scope="module")
def folder(artifact, tmp_path_factory) -> Path:
    return exported(tmp_path_factory.mktemp("gptq") / "gptq", artifact)


def request_for(folder: Path, out: Path, reference: Reference, prompts) -> Request:
    """A run that also leaves decoded weights and single linears in files."""
    how = program_for(GptqFolder(folder))
    return Request(
        how.worker,
        str(folder),
        str(out),
        save_prompts(prompts, out.parent),
        reference.vocabulary,
        16,
        sorted(reference.stop_ids),
        SETTINGS.threads,
        loading=dict(how.exact_loading),
        exact=True,
    )


def by_level(rows) -> list[str]:
    """Level and status of every row."""
    return [f"{r.level} {r.status}" for r in rows]


def test_runtime_is_here():
    assert missing() is None


def test_every_level_on_the_reference_model(folder, reference):
    rows = check(folder, reference, FormatOptions(), SETTINGS)
    assert by_level(rows) == [*ALL_PASS, "L3 info"], rows
    assert rows[0].compared == rows[2].compared == reference.weights.count
    assert rows[3].compared == len(reference.weights.linears)
    assert rows[4].value <= 1e-5 and "TorchLinear" in rows[4].detail
    assert rows[6].value <= KERNEL_GATE and "picks: Torch" in rows[6].name


@pytest.mark.slow
def test_qwen2_vl_with_a_kernel_that_refuses(tmp_path):
    """A flat config.json, GPTQ v2, shards, names of modules, and 4 bits per channel.

    The kernel that GPTQModel picks on some processors stops with a RuntimeError, which is reported.
    The file is proven all the same.
    """
    source = make_random_checkpoint(tmp_path / "model", arch="qwen2_vl")
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4"], source)
    options = {"gptq_version": "v2", "gptq_names": "module", "shard_bytes": 1_000_000}
    out = exported(tmp_path / "gptq", artifact, **options)
    assert len(list(out.glob("*.safetensors"))) > 2
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:2])
    rows = check(out, reference, FormatOptions(), SETTINGS)
    expected = ["L1 passed", "L1 info", *ALL_PASS[2:], "L3 info"]
    assert by_level(rows) == expected, rows
    if rows[6].value is None:
        assert "RuntimeError" in rows[6].detail and "gptq_torch" in rows[6].detail


@pytest.mark.slow
@pytest.mark.parametrize("tag", ["w2", "w3g128", "w3-sym", "w8g128"])
def test_every_level_on_other_grids(tmp_path, tag):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS[tag])
    out = exported(tmp_path / "gptq", artifact)
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:2])
    rows = check(out, reference, FormatOptions(), SETTINGS)
    assert by_level(rows)[:6] == ALL_PASS, rows


# The combined processor needs torchvision, and SmolVLM's num2words. The test is about weights, so
# neither is loaded.
LOAD_BY_GPTQMODEL = """
import json, sys
import numpy as np, torch
from safetensors.torch import load_file
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.models.auto import MODEL_MAP
folder, prompt, out = sys.argv[1:]
kind = json.load(open(folder + "/config.json"))["model_type"]
MODEL_MAP[kind].require_load_processor = False
MODEL_MAP[kind].require_pkgs = None
model = GPTQModel.load(folder, device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16).model
inputs = load_file(prompt)
inputs["pixel_values"] = inputs["pixel_values"].half()
with torch.no_grad():
    np.save(out, model(**inputs, use_cache=False).logits[0].float().numpy())
"""


def load_by_gptqmodel(folder: Path, prompt: str, logits: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", LOAD_BY_GPTQMODEL, str(folder), prompt, str(logits)]
    return in_its_own_process(command, logits.parent)


FAMILY = [
    ("qwen2_vl", "w4g128"),
    ("qwen3_vl", "w4g128"),
    ("internvl", "w4g128"),
    ("internvl3_5", "w4g128"),
    ("gemma3", "w4g128"),
    ("smolvlm", "w4g128"),
    ("mistral3", "w4g128"),
    ("ministral3", "w4g128"),
    ("qwen3_5", "w4g128"),
]
GRID = [("reference", tag) for tag in ("w2", "w3g128", "w3-sym", "w8g128")]
OTHERS = [pytest.param(*case, marks=pytest.mark.slow) for case in FAMILY + GRID]


@pytest.mark.parametrize(("arch", "tag"), [("reference", "w4g128-dynamic"), *OTHERS])
def test_gptqmodel_loads_module_names(arch, tag, tmp_path, artifact, tiny):
    if tag != "w4g128-dynamic":
        source = [] if arch == "reference" else [tiny(arch)]
        artifact = rtn_artifact(tmp_path / "artifact", GRIDS[tag], *source)
    out = exported(tmp_path / "gptq", artifact, gptq_names="module")
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:1])
    prompt, logits = reference.prompts[0], tmp_path / "logits.npy"
    (file,) = save_prompts([prompt], tmp_path)
    done = load_by_gptqmodel(out, file, logits)
    assert done.returncode == 0, done.stderr[-2000:]
    got, want = np.load(logits)[:, : reference.vocabulary], reference.logits(prompt)
    assert np.linalg.norm(got - want) / np.linalg.norm(want) <= KERNEL_GATE


@pytest.mark.slow
def test_gptqmodel_refuses_hub_names(folder, tmp_path):
    """The claim of formats/gptq/runtimes.py, and of the notes that every run shows."""
    done = load_by_gptqmodel(folder, str(tmp_path / "none"), tmp_path / "logits.npy")
    assert done.returncode != 0
    assert "Missing required quantized weights" in done.stderr


def in_its_own_process(command: list[str], folder: Path) -> subprocess.CompletedProcess:
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf"), "TORCHDYNAMO_DISABLE": "1"}
    environment = os.environ | offline
    return subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)


@pytest.mark.slow
def test_gptqmodel_has_the_families_that_we_say(tmp_path):
    code = "from gptqmodel.models.auto import MODEL_MAP; print(*MODEL_MAP)"
    done = in_its_own_process([sys.executable, "-c", code], tmp_path)
    assert set(GPTQMODEL_LOADS) == set(FAMILIES) & set(done.stdout.split())


# --- changed weights, which only decoding can see -------------------------------------------------


def faulty_copy(folder: Path, copy: Path, layer: int, part: str, seed: int) -> tuple[Path, str]:
    """A copy in which one random element of one random linear of `layer` is changed.

    The change is the least that can matter. Returns the copy, and the name of the linear's weight.
    """
    shutil.copytree(folder, copy)
    rng = np.random.default_rng(seed)
    tensors = load_file(copy / "model.safetensors")
    of_layer = sorted(n for n in tensors if n.startswith(f"model.layers.{layer}."))
    modules = [n.removesuffix(".qweight") for n in of_layer if n.endswith(".qweight")]
    module = modules[rng.integers(len(modules))]
    values = tensors[f"{module}.{part}"].numpy()  # shares the memory of the tensor
    at = tuple(int(rng.integers(s)) for s in values.shape)
    if part == "scales":
        values[at] = np.nextafter(values[at], np.float16(np.inf))
    elif part == "g_idx":
        values[at] = 1 - values[at] if values.max() == 1 else (values[at] + 1) % (values.max() + 1)
    elif part == "qzeros":  # one of the zero-points in the word, by one
        shift = 4 * int(rng.integers(8))
        field = int(values[at]) >> shift & 15
        words = values.view(np.uint32)
        words[at] = int(words[at]) - (field << shift) + ((field ^ 1) << shift)
    else:
        values.view(np.uint32)[at] ^= np.uint32(1 << int(rng.integers(32)))
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return copy, f"{module}.weight"


@pytest.mark.parametrize("part", ["scales", "qzeros", "qweight", "g_idx"])
@pytest.mark.parametrize("layer", [0, 3, 5])
def test_fault_is_caught_by_our_decoder(folder, reference, tmp_path, layer, part):
    copy, name = faulty_copy(folder, tmp_path / "faulty", layer, part, seed=layer)
    row = own_decoder(GptqFolder(copy), reference)
    assert row.status == "failed" and row.worst.startswith(name) and row.worst.count("(") == 1
    assert row.compared == reference.weights.count and row.value >= 1


def test_fault_is_caught_by_the_runtimes_own_decoders(folder, reference, tmp_path):
    copy, name = faulty_copy(folder, tmp_path / "faulty", 3, "scales", seed=1)
    opened = GptqFolder(copy)
    row = autogptq_decoder(opened, reference)
    assert row.status == "failed" and row.worst.startswith(name)
    request = request_for(copy, tmp_path / "out", reference, reference.prompts[:1])
    row = next(exact_rows(program(opened.bits), run(request), opened, reference))
    assert row.status == "failed" and row.worst.startswith(name)
    assert row.compared == reference.weights.count


def test_a_float_weight_off_by_one_bit_is_caught(folder, reference, tmp_path):
    copy = tmp_path / "faulty"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    name = "visual.blocks.2.mlp.down_proj.weight"
    tensors[name].view(torch.int16)[3, 5] ^= 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    row = own_decoder(GptqFolder(copy), reference)
    assert row.status == "failed" and row.worst == f"{name} (1)"


def test_a_runtime_that_dies_is_one_line(folder, reference, tmp_path):
    copy = tmp_path / "broken"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text("utf-8"))
    config["text_config"]["num_hidden_layers"] = 7  # the files have six layers
    config["text_config"]["layer_types"].append("full_attention")
    (copy / "config.json").write_text(json.dumps(config), "utf-8")
    request = replace(request_for(copy, tmp_path / "out", reference, []), exact=False)
    with pytest.raises(RuntimeFailed) as error:
        run(request)
    assert "\n" not in str(error.value)
    assert "could not place" in str(error.value) and "layers.6." in str(error.value)
    with pytest.raises(RuntimeFailed, match="not done after"):
        run(replace(request, out=str(tmp_path / "late")), timeout=0.05)


def test_a_worker_that_dies_over_one_request_leaves_the_next_to_another(
    folder, reference, tmp_path
):
    first = request_for(folder, tmp_path / "a", reference, reference.prompts[:1])
    second = replace(first, out=str(tmp_path / "b"), exact=False)
    with Worker([first, second]) as worker:
        with pytest.raises(RuntimeFailed, match="killed by signal 9"):
            worker.outcome(tell=lambda _: os.kill(worker.pid, signal.SIGKILL))
        outcome = worker.outcome()
    assert outcome.logits(0).shape == reference.logits(reference.prompts[0]).shape


# --- other families, and checkpoints of others ----------------------------------------------------


# What a family has in common with one of these is loaded in the slow tests alone.
# test_experts.py loads qwen3_vl_moe.
LIKE_OTHERS = (
    *("internvl", "idefics3", "smolvlm", "llava_onevision", "ministral3"),
    "qwen3_vl_moe",
)


@pytest.mark.parametrize(
    "arch",
    [
        pytest.param(a, marks=[pytest.mark.slow] * (a in LIKE_OTHERS))
        for a in ARCHES
        if not a.startswith("qwen2")
    ],
)
def test_every_weight_and_logit_of_the_other_families(arch, tiny, tmp_path):
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], tiny(arch))
    out = exported(tmp_path / "gptq", artifact)
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:2])
    opened = GptqFolder(out)
    outcome = run(request_for(out, tmp_path / "out", reference, reference.prompts))
    rows = [own_decoder(opened, reference), autogptq_decoder(opened, reference)]
    rows += exact_rows(program_for(opened), outcome, opened, reference)
    assert by_level(rows) == ALL_PASS, rows
    assert rows[0].compared == rows[2].compared == reference.weights.count


@pytest.mark.slow
def test_decoder_layers_that_the_file_does_not_name_are_not_found(tiny, tmp_path):
    """optimum looks under `model.language_model`, and SmolVLM has `model.text_model`."""
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], tiny("idefics3"))
    out = exported(tmp_path / "gptq", artifact)
    config = json.loads((out / "config.json").read_text("utf-8"))
    named = config["quantization_config"].pop("block_name_to_quantize")
    assert named == "model.text_model.layers"
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:1])
    rows = check(out, reference, FormatOptions(), SETTINGS)
    failed = [r for r in rows if r.status == "failed"]
    assert {r.level for r in failed} == {"L1", "L2", "L3"}, rows
    assert all("block_name_to_quantize" in r.detail for r in failed), rows


@pytest.mark.slow
def test_linears_that_the_file_does_not_name_must_not_be_floats(tiny, tmp_path):
    """optimum makes every linear of a layer a quantized one, unless the file lists them."""
    artifact = rtn_artifact(tmp_path / "artifact", GRIDS["w4g128"], tiny("qwen3_5"))
    out = exported(tmp_path / "gptq", artifact)
    config = json.loads((out / "config.json").read_text("utf-8"))
    named = config["quantization_config"].pop("modules_in_block_to_quantize")
    assert not any("in_proj_a" in name for group in named for name in group)
    (out / "config.json").write_text(json.dumps(config), "utf-8")
    reference = Reference(artifact.path, read_rows(bundled.HELDOUT)[:1])
    failed = [r for r in check(out, reference, FormatOptions(), SETTINGS) if r.status == "failed"]
    assert {r.level for r in failed} == {"L1", "L2", "L3"}
    assert all("could not place" in r.detail for r in failed), failed


QUANTIZER = Path(__file__).resolve().parents[1] / "tools" / "bench" / "peers" / "run_gptqmodel.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    "made",
    [
        {"group_size": 128, "sym": True, "desc_act": False},
        {"group_size": 64, "sym": False, "desc_act": True},
    ],
    ids=["sym", "asym-desc_act"],
)
def test_a_checkpoint_made_by_gptqmodel_is_taken_over_as_it_decodes_it(made, tmp_path):
    """GPTQModel quantizes the bundled model. Our artifact has the weights that its kernel uses."""
    theirs, file = tmp_path / "theirs", tmp_path / "request.json"
    request = made | {
        "model": str(bundled.REFERENCE_VLM),
        "out": str(theirs),
        "rows": str(bundled.CALIBRATION),
        "samples": 4,
        "bits": 4,
        "act_group_aware": not made["desc_act"],
        "gptaq": False,
    }
    file.write_text(json.dumps(request))
    done = in_its_own_process([sys.executable, str(QUANTIZER), str(file)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    checkpoint = GptqCheckpoint(theirs)
    assert checkpoint.quant_config.act_order == ("dynamic" if made["desc_act"] else "gar")
    write_artifact(checkpoint, tmp_path / "artifact", "theirs")
    weights = Weights(tmp_path / "artifact", theirs)
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)  # GPTQModel saves no settings of images
    prompt = preprocessor.sample(read_rows(bundled.HELDOUT)[0], prompt_only=True)
    prompts, threads = save_prompts([prompt], tmp_path), SETTINGS.threads
    how = program(4)
    asked = Request(how.worker, str(theirs), str(tmp_path / "out"), prompts, 384, 1, [376], threads)
    outcome = run(replace(asked, loading=dict(how.exact_loading), exact=True))

    def decoded(hub: str) -> np.ndarray | None:
        return outcome.weight(checkpoint.family.module_name(hub))

    count = weights.count
    row = compare_weights("gptq", "taken over", weights.items(), decoded, count=count)
    assert row.status == "passed" and row.compared == weights.count, row
