"""`quantize` as a whole: artifacts, resuming and refusals. Calibrated methods beat rounding."""

import dataclasses
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.jobs import job_for
from tools.reference_vlm.model import make_random_checkpoint
from vlmq_export import bundled
from vlmq_export.errors import (
    ArtifactError,
    CalibrationError,
    CheckpointError,
    Interrupted,
    UsageError,
)
from vlmq_export.quantizer.arithmetic import pick_device
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import ACT_ORDERS, QuantConfig
from vlmq_export.quantizer.layers.damping import TIMES
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import MLP
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.run.refusals import check_shapes
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:64]]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random Qwen2-VL checkpoint of three layers."""
    return make_random_checkpoint(
        tmp_path_factory.mktemp("random"), arch="qwen2_vl", layers=3, depth=3
    )


def run(folder, samples, out, config, **options):
    options |= {"name": "m", "calibration": {"rows": len(samples)}, "device": "cpu"}
    quantize(Checkpoint(folder), samples, config, out, **options)
    return Artifact(out)


def files(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of an artifact, by its name. Its timing is left out."""
    found = (p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "timing.json")
    return {str(p.relative_to(folder)): p.read_bytes() for p in found}


def write(model, artifact: Artifact) -> None:
    """Give a model the decoded weights of an artifact."""
    family = artifact.architecture.family
    with torch.no_grad():
        for q in artifact.linears():
            module = model.get_submodule(family.module_name(q.name))
            module.weight.copy_(q.decode())
            if q.bias is not None:
                module.bias.copy_(q.bias)


# --- what comes out -------------------------------------------------------------------------------


LONG = ("auto", "exact", "vlm-ptq")  # the longest, which go the ways of the others


@pytest.mark.parametrize(
    ("method", "folder"),
    [
        *((m, "small") for m in METHODS if m not in LONG),
        *(pytest.param(m, "small", marks=pytest.mark.slow) for m in LONG),
        pytest.param("vlmq", "reference", marks=pytest.mark.slow),
    ],
)
def test_every_method_makes_a_whole_artifact(method, folder, small, samples, tmp_path):
    source = small if folder == "small" else bundled.REFERENCE_VLM
    config = QuantConfig(method=method, bits=3, group_size=64)
    used = samples[:6] if METHODS[method].calibrated else []
    artifact, checkpoint = run(source, used, tmp_path / "a", config), Checkpoint(source)
    names = {f"{q.name}.{part}" for q in artifact.linears() for part in ("weight", "bias")}
    assert {n for n in checkpoint.tensors if n not in names} == set(artifact.float_names())
    scaled = METHODS[method].scaling
    for name in artifact.float_names():
        same = torch.equal(artifact.float_tensor(name), checkpoint.tensor(name))
        assert same != (scaled and name.endswith("layernorm.weight")), name
    # Weights that carry a scale are those of tests/quantizer/layers/scaling/test_awq_mbq.py.
    for q in artifact.linears() if not scaled else ():
        weight, solution = checkpoint.tensor(f"{q.name}.weight").float(), q.solution
        assert solution.codes.shape == weight.shape
        assert int(solution.codes.max()) <= 7
        groups = weight.shape[0], weight.shape[1] // 64
        assert solution.scales.shape == solution.zero_points.shape == groups
        assert int(solution.zero_points.min()) >= 1 and int(solution.zero_points.max()) <= 7
        assert solution.natural_order
        error = float((q.decode() - weight).norm() / weight.norm())
        assert error == pytest.approx(artifact.records[q.name].metrics["weight_error"], rel=1e-4)
        assert error < 0.8
        if q.bias is not None:
            assert torch.equal(q.bias, checkpoint.tensor(f"{q.name}.bias").half())
    assert artifact.manifest.calibration.get("non_finite", 0) == 0


@pytest.mark.parametrize("act_order", ACT_ORDERS)
@pytest.mark.parametrize(
    ("bits", "group", "symmetric"), [(4, 128, False), (2, -1, False), (8, 64, True)]
)
def test_every_grid_and_order(act_order, bits, group, symmetric, small, samples, tmp_path):
    config = QuantConfig(
        method="vlmq", bits=bits, group_size=group, symmetric=symmetric, act_order=act_order
    )
    artifact = run(small, samples[:4], tmp_path / "a", config)
    for q in artifact.linears():
        solution, columns = q.solution, config.group_columns(q.in_features)
        assert solution.natural_order or (act_order == "dynamic" and group != -1)
        groups = solution.scales.shape[1]
        assert torch.equal(solution.g_idx.bincount(), torch.full((groups,), columns))
        if bits == 4:  # portable: scale · zero_point is a float16
            product = solution.scales.float() * solution.zero_points.float()
            assert torch.equal(product, product.half().float())
        if symmetric:
            assert bool((solution.zero_points == 128).all())
    if act_order == "dynamic" and group == 128:
        assert not all(q.solution.natural_order for q in artifact.linears())


@pytest.fixture(scope="module")
def quality(samples, tmp_path_factory):
    """get(method) → (artifact at 2 bits, its KL at answer tokens of held-out rows), made once.

    The KL is to full precision.
    """
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    held = [preprocessor.sample(row) for row in read_rows(bundled.HELDOUT)[:24]]
    model = load_model(Checkpoint(bundled.REFERENCE_VLM), CPU)

    def answer(sample):
        logits = model(**sample.model_inputs(), use_cache=False).logits[0]
        return logits[sample.answer.roll(-1)].log_softmax(-1)

    @torch.no_grad()
    def answers():
        return [answer(sample) for sample in held]

    full = answers()

    @cache
    def get(method):
        folder = tmp_path_factory.mktemp("quality") / method
        config = QuantConfig(method=method, bits=2)
        artifact = run(bundled.REFERENCE_VLM, samples[:32], folder, config)
        write(model, artifact)
        kl = [(a.exp() * (a - b)).sum(-1) for a, b in zip(full, answers())]
        return artifact, float(torch.cat(kl).mean())

    return get


DEFAULT = pytest.param("vlmq", marks=pytest.mark.slow)  # runtime_tests/test_main_job.py has it too


@pytest.mark.parametrize("method", ["gptq", "vlmq-paper", DEFAULT])
def test_calibrated_methods_beat_rounding_on_held_out_answers(method, quality):
    assert quality(method)[1] < quality("rtn")[1] / 3


def test_first_layers_of_gptq_and_the_paper_agree(quality):
    """Before the first quantized linear there is no drift and no gradient.

    So both methods are plain GPTQ for q, k and v of layer 0, and later they are not.
    """

    def agreement(name):
        linears = (
            quality(method)[0].linear(f"model.layers.{name}") for method in ("gptq", "vlmq-paper")
        )
        one, other = (linear.solution.codes for linear in linears)
        return float((one == other).float().mean())

    for name in ("q_proj", "k_proj", "v_proj"):
        assert agreement(f"0.self_attn.{name}") >= 0.999
    assert agreement("5.self_attn.q_proj") < 0.99


@pytest.mark.parametrize("method", ["vlmq-paper", DEFAULT])
def test_metrics_say_what_was_solved(method, quality):
    for record in quality(method)[0].manifest.modules:
        m = record.metrics
        times = TIMES if METHODS[method].damping == "held-out" else (1.0,)
        assert m["damp"] in [0.01 * t for t in times]
        assert m["fallback"] is False and m["dead_columns"] == 0
        assert m["loss"] > 0 and 0 < m["relative_error"] < 1
        asks, mlp = METHODS[method].asks_answers, record.name.endswith((*MLP.ins, MLP.out))
        if mlp and not asks:
            assert m["effective_tokens"] == m["tokens"]
        elif asks or record.layer > 0:
            assert 0 < m["effective_tokens"] < m["tokens"]


# --- resuming -------------------------------------------------------------------------------------

RECIPE = QuantConfig(method="vlmq", bits=4, group_size=128, act_order="dynamic")


@pytest.fixture(scope="module")
def unkilled(small, samples, tmp_path_factory):
    """The artifact of a run that was never stopped."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("unkilled") / "a"
    run(small, samples[:12], folder, RECIPE)
    torch.set_num_threads(before)
    return folder


def test_two_runs_have_the_same_bytes(unkilled, small, samples, tmp_path):
    run(small, samples[:12], tmp_path / "a", RECIPE)
    assert files(tmp_path / "a") == files(unkilled)


def test_stopping_after_every_layer_and_resuming_gives_the_same_bytes(
    unkilled, small, samples, tmp_path
):
    folder, manifest = tmp_path / "a", tmp_path / "a" / "manifest.json"

    def go_on(**options):
        run(small, samples[:12], folder, RECIPE, **options)

    solved = []
    for layer in range(1, 3):
        says = f"stopped after layer {layer} of 3; continue with --resume"
        with pytest.raises(Interrupted, match=says) as caught:
            go_on(resume=layer > 1, should_stop=lambda: True)
        assert caught.value.exit_code == 75
        assert len(list(folder.glob("layer-*"))) == layer
        assert not manifest.exists()
        solved.append((folder / "layer-00000.safetensors").stat().st_mtime_ns)
    go_on(resume=True)
    assert len(set(solved)) == 1, "a published layer was solved again"
    assert files(folder) == files(unkilled)
    stamp = manifest.stat().st_mtime_ns
    go_on(resume=True)  # the artifact is whole by now, and stays as it is
    assert manifest.stat().st_mtime_ns == stamp


CHILD = """
import sys, torch
from pathlib import Path
from vlmq_export import bundled
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
torch.set_num_threads(1)
p = Preprocessor(bundled.REFERENCE_VLM)
samples = [p.sample(row) for row in read_rows(bundled.CALIBRATION)[:12]]
config = QuantConfig(method="vlmq", bits=4, group_size=128, act_order="dynamic")
options = {"name": "m", "calibration": {"rows": 12}, "device": "cpu", "resume": True}
print("ready", flush=True)
quantize(Checkpoint(Path(sys.argv[1])), samples, config, Path(sys.argv[2]), **options)
"""


@pytest.mark.slow
def test_kill_9_at_a_random_moment_and_resume_gives_the_same_bytes(
    unkilled, small, samples, tmp_path
):
    folder = tmp_path / "a"
    seed = int.from_bytes(os.urandom(2), "little")
    moment = random.Random(seed)
    command = [sys.executable, "-c", CHILD, str(small), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    child = subprocess.Popen(command, text=True, **pipes)
    assert child.stdout.readline().strip() == "ready"
    published = moment.randrange(0, 2)  # wait for this many layers, then for up to 0.3 s

    def reached():
        return (folder / "run.json").exists() and len(list(folder.glob("layer-*"))) >= published

    while not reached() and child.poll() is None:
        time.sleep(0.002)
    time.sleep(moment.random() * 0.3)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL, f"the run ended before it could be killed, seed {seed}"
    (folder / ".layer-00001.safetensors.12345.tmp").write_bytes(b"half a layer")
    run(small, samples[:12], folder, RECIPE, resume=True)
    assert files(folder) == files(unkilled), f"seed {seed}"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"bits": 3}, "config"),
        ({"alpha": 0.5}, "config"),
        ("samples", "calibration and samples"),
        ("source", "source"),
    ],
)
def test_another_run_is_not_resumed(change, said, small, samples, tmp_path):
    folder, config = tmp_path / "a", QuantConfig(method="gptq", bits=2, group_size=64)
    with pytest.raises(Interrupted):
        run(small, samples[:3], folder, config, should_stop=lambda: True)
    before = files(folder)
    source, chosen = small, samples[:3]
    if change == "samples":
        chosen = samples[:4]
    elif change == "source":
        other = tmp_path / "other"
        source = make_random_checkpoint(other, arch="qwen2_vl", layers=3, depth=3, seed=1)
    else:
        config = dataclasses.replace(config, **change)
    with pytest.raises(ArtifactError, match=f"begun with another {said}"):
        run(source, chosen, folder, config, resume=True)
    assert files(folder) == before


def test_folders_that_are_not_ours_are_refused(small, samples, tmp_path):
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    for resume in (False, True):
        with pytest.raises(ArtifactError, match="choose another folder"):
            run(small, samples[:3], folder, QuantConfig(method="gptq"), resume=resume)
    assert [p.name for p in folder.iterdir()] == ["notes.txt"]


def test_a_damaged_layer_is_named(small, samples, tmp_path):
    folder = tmp_path / "a"
    config = QuantConfig(method="gptq", group_size=64)
    with pytest.raises(Interrupted):
        run(small, samples[:3], folder, config, should_stop=lambda: True)
    layer = folder / "layer-00000.safetensors"
    layer.write_bytes(layer.read_bytes()[:-100])
    says = r"layer-00000.safetensors: damaged .*delete it and resume"
    with pytest.raises(ArtifactError, match=says):
        run(small, samples[:3], folder, config, resume=True)
    layer.unlink()
    run(small, samples[:3], folder, config, resume=True)


# --- bad input ------------------------------------------------------------------------------------


def copied(source: Path, folder: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of a checkpoint, and its tensors."""
    shutil.copytree(source, folder, copy_function=shutil.copyfile)
    return folder, load_file(folder / "model.safetensors")


def test_nan_weight_is_named_when_its_layer_is_read(small, samples, tmp_path):
    broken, tensors = copied(small, tmp_path / "broken")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 7] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = QuantConfig(method="gptq", bits=4, group_size=64)
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has 1 NaN"):
        run(broken, samples[:3], tmp_path / "a", config)
    assert [p.name for p in sorted((tmp_path / "a").glob("layer-*"))] == ["layer-00000.safetensors"]
    tensors["model.embed_tokens.weight"][0, 0] = float("inf")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight has 1 NaN or infinite"):
        run(broken, samples[:3], tmp_path / "b", config)


def test_bias_beyond_float16_is_refused(small, samples, tmp_path):
    broken, tensors = copied(small, tmp_path / "broken")
    tensors["model.layers.0.self_attn.k_proj.bias"][0] = 1e6
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    says = r"model\.layers\.0\.self_attn\.k_proj\.bias exceeds float16"
    with pytest.raises(CheckpointError, match=says):
        run(broken, [], tmp_path / "a", QuantConfig(method="rtn", group_size=64))


@pytest.mark.parametrize("method", ["rtn", "gptq"])
def test_an_outlier_is_kept_or_refused_by_name(small, samples, tmp_path, method):
    """A weight of 2e5 needs a scale whose products are beyond float16: that of a GPTQ file is not.

    One of 2e6 needs a scale that is beyond float16 itself.
    """
    broken, tensors = copied(small, tmp_path / "broken")
    name = "model.layers.0.mlp.down_proj"
    config, some = QuantConfig(method=method, group_size=64), samples[:3] if method != "rtn" else []
    tensors[f"{name}.weight"][5, 3] = 2e5
    kept = float(tensors[f"{name}.weight"][5, 3])
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    linear = run(broken, some, tmp_path / "a", config).linear(name)
    step = float(linear.solution.scales[5].max())
    assert abs(float(linear.decode()[5, 3]) - kept) <= 0.51 * step and step > 1e4
    tensors[f"{name}.weight"][5, 3] = 2e6
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.down_proj\.weight has values that"):
        run(broken, some, tmp_path / "b", config)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_1", "Q8_0"])
def test_an_outlier_beyond_a_block_is_refused_by_name(small, tmp_path, kind):
    broken, tensors = copied(small, tmp_path / "broken")
    name = "model.layers.0.mlp.down_proj"
    tensors[f"{name}.weight"][5, 3] = -1e8
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    linears = Checkpoint(broken).architecture.linears
    config = QuantConfig(method="rtn", types=dict.fromkeys(linears, kind))
    with pytest.raises(CheckpointError, match=r"down_proj\.weight has values that"):
        run(broken, [], tmp_path / "a", config)


def test_samples_with_nan_are_counted_and_all_of_them_refused(small, samples, tmp_path):
    def broken(sample):
        pixels = torch.full_like(sample.pixel_values, float("nan"))
        return dataclasses.replace(sample, pixel_values=pixels)

    config = QuantConfig(method="vlmq", bits=3, group_size=64)
    artifact = run(small, [broken(samples[0]), *samples[1:5]], tmp_path / "a", config)
    assert artifact.manifest.calibration.items() >= {"rows": 5, "non_finite": 1}.items()
    tokens = sum(len(s.input_ids) for s in samples[1:5])
    assert artifact.manifest.modules[0].metrics["tokens"] == tokens
    with pytest.raises(CalibrationError, match="no sample has finite activations"):
        run(small, [broken(s) for s in samples[:3]], tmp_path / "b", config)


def test_refusals_before_any_work(small, samples, tmp_path):
    shapes = [SimpleNamespace(name="model.layers.0.mlp.down_proj", in_features=320)]
    with pytest.raises(UsageError, match="group size 128 does not divide the 320 inputs"):
        check_shapes(shapes, job_for(QuantConfig(group_size=128)))
    check_shapes(shapes, job_for(QuantConfig(group_size=64)))
    check_shapes(shapes, job_for(QuantConfig(group_size=-1)))
    grids = {"group_size": 0}, {"group_size": -2}, {"bits": 5}
    for bad in (*grids, {"act_order": "best"}, {"method": "magic"}):
        with pytest.raises(UsageError):
            check_shapes(shapes, job_for(QuantConfig(**bad)))
    with pytest.raises(UsageError, match="does not divide"):
        run(small, samples[:2], tmp_path / "a", QuantConfig(group_size=96))
    with pytest.raises(CalibrationError, match="needs calibration samples"):
        run(small, [], tmp_path / "a", QuantConfig(method="gptq", group_size=64))
    assert not (tmp_path / "a").exists()
    with pytest.raises(UsageError, match="choose auto, cpu or cuda"):
        pick_device("tpu")
    if not torch.cuda.is_available():
        with pytest.raises(UsageError, match="no CUDA device"):
            pick_device("cuda")
        assert pick_device("auto") == CPU


def test_progress_and_timing(small, samples, tmp_path):
    seen = []
    config = QuantConfig(method="gptq", group_size=64)
    run(small, samples[:2], tmp_path / "a", config, progress=lambda *a: seen.append(a))
    assert seen == [("quantize", i, 3) for i in range(4)]
    timing = json.loads((tmp_path / "a" / "timing.json").read_text())
    assert set(timing["seconds"]) == {"floats", "load", "prefix", "layers"}
    assert list(timing["layers"]) == ["0", "1", "2"]
    assert min(timing["layers"].values()) > 0
    assert timing["tokens"] == sum(len(s.input_ids) for s in samples[:2])
    assert timing["tokens_per_second"] > 0
    assert timing["peak_host_bytes"] > 10**8
    assert timing["peak_device_bytes"] == 0
