"""AWQ and MBQ against slow references.

They search scales of input channels and fold them into the weights.
"""

import numpy as np
import pytest
import torch

from tests.oracle import fit_group
from tests.quantizer.calibration.test_answer_loss import slow_ratios
from tests.quantizer.run.test_quantize import run, small, write  # noqa: F401 (a fixture)
from vlmq_export import bundled
from vlmq_export.formats.proof.weights import Weights
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.grids.affine import Affine
from vlmq_export.quantizer.layers.scaling.awq_mbq import POWERS, clipped
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CONFIG = QuantConfig(method="awq", bits=3, group_size=64)


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:6]]


@pytest.fixture(scope="module", params=["awq", "mbq"])
def made(request, small, samples, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("scaled") / "a"
    return run(small, samples, folder, QuantConfig(method=request.param, bits=3, group_size=64))


def rounded(weights: np.ndarray, bits: int, group: int) -> np.ndarray:
    """Weights [out, in] rounded to nearest, in float64, one group after the other."""
    out = np.empty_like(weights)
    for r, row in enumerate(weights):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale, zero = fit_group(part, bits, False)
            codes = np.clip(np.round(part / scale) + zero, 0, 2**bits - 1)
            out[r, start : start + group] = scale * (codes - zero)
    return out


def inputs_of(checkpoint: Checkpoint, samples, layer: int, names) -> dict[str, np.ndarray]:
    """Inputs of some modules of a layer, in a forward pass of the whole model.

    name → float64 [tokens, in].
    """
    model, seen = load_model(checkpoint, CPU), {name: [] for name in names}
    for name in names:
        module = model.model.language_model.layers[layer].get_submodule(name)
        module.register_forward_pre_hook(
            lambda _m, args, name=name: seen[name].append(args[0].flatten(0, 1))
        )
    with torch.no_grad():
        for sample in samples:
            model(**sample.model_inputs(), use_cache=False)
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


def clipped_by_brute_force(scaled: np.ndarray, inputs: np.ndarray) -> np.ndarray:
    """AWQ's clipping of one row [in], and the rounding after it, a group at a time.

    `inputs` [tokens, in] are those of the scaled weights.
    """
    out = np.empty_like(scaled)
    for start in range(0, len(scaled), 64):
        part, here = scaled[start : start + 64], inputs[:, start : start + 64]
        most = np.abs(part).max()
        tried = [np.clip(part, -c * most, c * most) for c in 1 - np.arange(10) / 20]
        tried = [rounded(t[None], 3, 64)[0] for t in tried]
        out[start : start + 64] = min(tried, key=lambda t: ((here @ (t - part)) ** 2).sum())
    return out


@pytest.mark.parametrize("layer", [0, 2])
def test_down_projection_equals_the_slow_search(layer, made, small, samples):  # noqa: F811
    """The scales between gate·up and down by brute force in float64.

    The same power is chosen, and at least 99.9 % of the weights are the same. AWQ clips as well: of
    its rows every sixteenth is compared.
    """
    method, checkpoint, name = made.config.method, Checkpoint(small), "mlp.down_proj"
    x = inputs_of(checkpoint, samples, layer, [name])[name]
    prefix = checkpoint.architecture.family.layers + f"{layer}."
    w = checkpoint.tensor(f"{prefix}{name}.weight").double().numpy()
    if method == "awq":
        weigh = np.ones(len(x))
    else:
        model = load_model(checkpoint, CPU)
        ratio = slow_ratios(model, samples, "mlp.down_proj")[layer]
        weigh = np.concatenate([s.answer.numpy() + ratio * s.vision.numpy() for s in samples])
    magnitude, losses, scales = np.abs(x).mean(0), [], []
    for power in POWERS:
        s = np.maximum(magnitude**power, 1e-4)
        scales.append(s / np.sqrt(s.max() * s.min()))
        change = np.abs(x @ (rounded(w * scales[-1], 3, 64) / scales[-1] - w).T)
        losses.append(weigh @ (change ** (2 if method == "awq" else 1)).mean(1))
    best = int(np.argmin(losses))
    assert made.records[f"{prefix}{name}"].metrics["power"] == POWERS[best]
    scaled, ours = w * scales[best], made.linear(f"{prefix}{name}").decode().double().numpy()
    if method == "mbq":
        expected = rounded(scaled, 3, 64)
        tolerance = 1e-6 * np.abs(expected).max()
    else:
        ours, inputs = ours[::16], x / scales[best]
        expected = np.stack([clipped_by_brute_force(row, inputs) for row in scaled[::16]])
        tolerance = 1e-6 * np.abs(ours).max()
    assert np.isclose(ours, expected, rtol=1e-3, atol=tolerance).mean() >= 0.999


def test_folded_scales_leave_the_function_alone(made, small, samples, tmp_path):  # noqa: F811
    """The scales of the norms and those of the weights cancel in every layer.

    With 8 bits in groups of 16 only the rounding is left.
    """
    config = QuantConfig(method=made.config.method, bits=8, group_size=16)
    artifact = run(small, samples[:4], tmp_path / "a", config)
    checkpoint = Checkpoint(small)
    model = load_model(checkpoint, CPU)
    with torch.no_grad():
        before = model(**samples[5].model_inputs(), use_cache=False).logits
        write(model, artifact)
        family = checkpoint.architecture.family
        names = artifact.float_names()
        state = {family.module_name(n): artifact.float_tensor(n).float() for n in names}
        model.load_state_dict(state, strict=False)
        after = model(**samples[5].model_inputs(), use_cache=False).logits
        # The same weights with the norms of the source.
        for name in state:
            if "layernorm" in name and "visual" not in name:
                own = checkpoint.tensor(family.hub_name(name))
                model.get_parameter(name).copy_(own.float())
        wrong = model(**samples[5].model_inputs(), use_cache=False).logits
    error = float((after - before).norm() / before.norm())
    mismatch = float((wrong - before).norm() / before.norm())
    assert error < 0.02
    assert mismatch > 3 * error, "the norms carry nothing, so the check above proves nothing"


@pytest.mark.parametrize("arch", ["gemma3", "qwen3_5"])
def test_scales_go_into_norms_that_add_one_to_their_weights(arch, tiny, tmp_path):
    """The scales of norms and weights cancel, and only the rounding at 8 bits is left.

    In Qwen3.5, linears that read the norm and stay floats take the scale too.
    """
    folder, config = tiny(arch), QuantConfig(method="awq", bits=8, group_size=16)
    rows = read_rows(bundled.CALIBRATION)[:4]
    samples, checkpoint = [Preprocessor(folder).sample(row) for row in rows], Checkpoint(folder)
    artifact, model = run(folder, samples, tmp_path / "a", config), load_model(checkpoint, CPU)
    family = checkpoint.architecture.family
    blocks = [(i, b) for i in range(2) for b in checkpoint.architecture.blocks(i)]
    new, scaled = {}, set()
    for index, block in blocks:
        prefix = f"{family.layers}{index}."
        power = artifact.records[prefix + block.ins[0]].metrics["power"]
        scaled |= {block.kind} if power else set()
        for name in (f"{prefix}{n}.weight" for n in (block.norm, *block.kept)):
            new[name] = artifact.float_tensor(name).float()
            assert torch.equal(new[name], checkpoint.tensor(name).float()) == (power == 0), name
    assert scaled == {block.kind for _, block in blocks}
    with torch.no_grad():
        before = model(**samples[3].model_inputs(), use_cache=False).logits
        write(model, artifact)
        for name, value in new.items():
            model.get_parameter(family.module_name(name)).copy_(value)
        after = model(**samples[3].model_inputs(), use_cache=False).logits
    assert float((after - before).norm() / before.norm()) < 0.02


def test_stopped_and_resumed_has_the_same_bytes(small, samples, tmp_path):  # noqa: F811
    from tests.quantizer.run.test_quantize import files
    from vlmq_export.errors import Interrupted

    config = QuantConfig(method="mbq", bits=2, group_size=64)
    run(small, samples[:3], tmp_path / "whole", config)
    parts = tmp_path / "parts"
    for resume in (False, True):
        with pytest.raises(Interrupted):
            run(small, samples[:3], parts, config, resume=resume, should_stop=lambda: True)
    run(small, samples[:3], parts, config, resume=True)
    assert files(parts) == files(tmp_path / "whole")


def test_proof_reads_the_changed_norms_from_the_artifact(made, small):  # noqa: F811
    """The proof may read floats from the source, but not the norms, which took a scale."""
    checkpoint, own = Checkpoint(small), Weights(made.path, small)
    name = checkpoint.architecture.family.layers + "1.input_layernorm.weight"
    assert torch.equal(torch.from_numpy(own.array(name)), made.float_tensor(name).float())
    assert not np.array_equal(own.array(name), checkpoint.tensor(name).float().numpy())


def test_clipping_never_adds_error():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 64, generator=g), torch.randn(8, 64, generator=g) ** 3
    grams = torch.stack([part.T @ part for part in x.split(32, 1)])
    ours = clipped(w, grams, torch.ones(64), Affine(3))

    def loss(clipped_weights):
        """Output error of each row after rounding, summed over its groups. [rows]."""
        grouped = clipped_weights.view(8, 2, 32)
        scale, zero = (p[..., None] for p in Affine(3).fit(grouped))
        q = Affine(3).decode(Affine(3).encode(grouped, scale, zero), scale, zero)
        error = q.view(8, 64) - w
        return sum(((x[:, s] @ error[:, s].T) ** 2).sum(0) for s in (slice(0, 32), slice(32, 64)))

    assert bool((loss(ours) <= loss(w) * (1 + 1e-5)).all())
    assert float(loss(ours).sum()) < 0.95 * float(loss(w).sum())
