"""The quantizer on a simulated CUDA device: no mixing of devices, and the integers of the CPU.

No GPU is needed: tests/simulated_device.py. The model is a tiny Qwen3-VL, whose features of deeper
vision layers are added to the decoder's (DeepStack).
"""

import pytest
import torch

from tests.simulated_device import CUDA, simulated_device
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export import bundled
from vlmq_export.quantizer.artifact.read import Artifact
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.job import Job
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import StreamedModel
from vlmq_export.quantizer.run.quantize import quantize
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows
from vlmq_export.quantizer.type_budget.sensitivity import measured

pytestmark = pytest.mark.usefixtures("one_thread")
WIDTH = 32
SHAPE = {
    "text_config": {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
    },
    "vision_config": {
        "hidden_size": WIDTH,
        "intermediate_size": WIDTH,
        "num_heads": 1,
        "out_hidden_size": WIDTH,
    },
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("narrow"), "qwen3_vl", shape=SHAPE)


@pytest.fixture(scope="module")
def samples(model):
    preprocessor = Preprocessor(model)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:8]]


def made(model, samples, config, folder, device, place="device") -> Artifact:
    told = {"rows": len(samples)}
    quantize(
        Checkpoint(model),
        list(samples),
        config,
        folder,
        name="m",
        calibration=told,
        device=device,
        place=place,
    )
    return Artifact(folder)


def same_codes(one: Artifact, two: Artifact) -> float:
    """The share of equal codes of two artifacts."""
    names = one.linear_names()
    codes = [[artifact.linear(n).solution.codes for n in names] for artifact in (one, two)]
    return sum(float((a == b).float().mean()) for a, b in zip(*codes)) / len(names)


# Rows that do on the device what others do, or that take long.
SLOW = (
    "auto",
    "exact",
    "exact-held",
    "gptaq-exact",
    "vlm-ptq",
    "vlmq-exact",
    "vlmq-l2",
    "vlmq-qkv",
)


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=[pytest.mark.slow] * (m in SLOW)) for m in sorted(METHODS)]
)
def test_every_method_stays_on_the_device(method, model, samples, tmp_path, monkeypatch):
    config = QuantConfig(method=method, group_size=16)
    ours = made(model, samples, config, tmp_path / "cpu", "cpu")
    with simulated_device(monkeypatch) as device:
        theirs = made(model, samples, config, tmp_path / "cuda", "cuda")
    # On a device gradients take another kernel of the attention, which rounds otherwise. Importance
    # is made of them, and a code that stands between two values may then be the other one.
    same = same_codes(ours, theirs)
    assert same == 1 or (same > 0.9 and METHODS[method].importance != "none")
    assert device.launches > 100 and device.copies["to device"] > 10
    print(f"\n{method}: {device.launches} launches, {device.waits}, {device.copies}")


BLOCKS = {"self_attn.q_proj": "Q4_0", "self_attn.v_proj": "Q5_1", "mlp.down_proj": "Q8_0"}


def test_block_types_and_an_embedding_stay_on_the_device(model, samples, tmp_path, monkeypatch):
    names = Checkpoint(model).architecture.linears
    types = {n: kind for n in names for end, kind in BLOCKS.items() if n.endswith(end)}
    types["model.language_model.embed_tokens"] = "Q4_0"
    config = QuantConfig(method="gptaq", group_size=32, types=types)
    ours = made(model, samples, config, tmp_path / "cpu", "cpu")
    with simulated_device(monkeypatch):
        theirs = made(model, samples, config, tmp_path / "cuda", "cuda")
    assert same_codes(ours, theirs) == 1


@pytest.mark.parametrize("place", ["host", "disk"])
def test_activations_that_rest_elsewhere_come_back(place, model, samples, tmp_path, monkeypatch):
    """The samples have images, so that the features of deeper layers (DeepStack) rest there too."""
    config = QuantConfig(method="vlmq-paper", group_size=32)
    ours = made(model, samples, config, tmp_path / "cpu", "cpu")
    with simulated_device(monkeypatch) as device:
        theirs = made(model, samples, config, tmp_path / "cuda", "cuda", place)
    assert same_codes(ours, theirs) == 1
    assert (device.copies["pinned"] > 20) == (place == "host")


def test_tuning_stays_on_the_device(model, samples, tmp_path, monkeypatch):
    """Its steps compute in bfloat16, which the simulation leaves out."""
    config = QuantConfig(method="vlmq-paper", group_size=32, tune=2)
    with simulated_device(monkeypatch):
        tuned = made(model, samples, config, tmp_path / "cuda", "cuda")
    assert all("tuned" in m.metrics for m in tuned.manifest.modules)


def test_even_channels_stay_on_the_device(model, samples, tmp_path, monkeypatch):
    config = QuantConfig(method="gptq", group_size=32, smooth=True)
    ours = made(model, samples, config, tmp_path / "cpu", "cpu")
    with simulated_device(monkeypatch):
        theirs = made(model, samples, config, tmp_path / "cuda", "cuda")
    assert same_codes(ours, theirs) == 1
    for name in (n for n in ours.float_names() if n.endswith("layernorm.weight")):
        assert torch.equal(ours.float_tensor(name), theirs.float_tensor(name))


def test_the_costs_of_block_types_stay_on_the_device(model, samples, monkeypatch):
    """--target-bpw: type_budget/sensitivity.py."""
    checkpoint = Checkpoint(model)
    job = Job.of(checkpoint.architecture, QuantConfig())
    names = [f"{job.prefix(0)}mlp.down_proj", job.family.embedding]
    kinds = dict.fromkeys(names, ("Q4_0", "Q8_0"))

    def costs(device: torch.device) -> dict:
        return measured(StreamedModel(checkpoint, device), job, kinds, samples)

    ours = costs(torch.device("cpu"))
    with simulated_device(monkeypatch):
        theirs = costs(CUDA)
    for name in names:
        assert theirs[name] == pytest.approx(ours[name], rel=1e-5)


def test_the_simulated_device_refuses_what_a_device_refuses(monkeypatch):
    with simulated_device(monkeypatch) as device:
        here, there = torch.ones(3), torch.ones(3, device="cuda")
        assert there.device == CUDA and here.device.type == "cpu" and there.is_cuda
        with pytest.raises(RuntimeError, match="same device"):
            here + there
        with pytest.raises(RuntimeError, match="indices"):
            here[torch.zeros(1, dtype=torch.int64, device="cuda")]
        with pytest.raises(AssertionError, match="numpy"):
            there.numpy()
        assert torch.equal(there.cpu(), here) and bool((there * torch.tensor(2.0) > 1).all())
        before = device.launches
        (there.view(3, 1) + 1).sum()
        assert device.launches - before == 2
        assert sum(device.waits.values()) == 2
        parameter = torch.nn.Linear(2, 2).to("cuda").weight
        assert parameter.device == CUDA and isinstance(parameter, torch.nn.Parameter)
