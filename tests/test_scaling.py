"""AWQ and MBQ: scales that are searched and folded, against slow references, and the end-of-model gradients of MBQ."""

import statistics

import numpy as np
import pytest
import torch

from tests.oracle import fit_group
from tests.test_quantize import run, small, write  # noqa: F401 (a fixture)
from vlmq_export import bundled
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.endloss import MBQ_TYPES, answer_gradients, modality_ratios
from vlmq_export.quantizer.families import family_of, layer_count
from vlmq_export.quantizer.grids import Affine
from vlmq_export.quantizer.model import StreamedModel, load_model
from vlmq_export.quantizer.scaling import POWERS, clipped
from vlmq_export.quantizer.streams import decoder_inputs
from vlmq_export.reference import Weights

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
    """float64, one group after the other."""
    out = np.empty_like(weights)
    for r, row in enumerate(weights):
        for start in range(0, len(row), group):
            part = row[start : start + group]
            scale, zero = fit_group(part, bits, False)
            out[r, start : start + group] = scale * (np.clip(np.round(part / scale) + zero, 0, 2**bits - 1) - zero)
    return out


def inputs_of(checkpoint: Checkpoint, samples, layer: int, names) -> dict[str, np.ndarray]:
    """Inputs of modules of a layer of the whole model, [tokens, in], float64."""
    model, seen = load_model(checkpoint, CPU), {name: [] for name in names}
    for name in names:
        module = model.model.language_model.layers[layer].get_submodule(name)
        module.register_forward_pre_hook(lambda _m, args, name=name: seen[name].append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for sample in samples:
            model(**sample.model_inputs(), use_cache=False)
    return {name: torch.cat(parts).double().numpy() for name, parts in seen.items()}


@pytest.mark.parametrize("layer", [0, 2])
def test_down_projection_equals_the_slow_search(layer, made, small, samples):  # noqa: F811
    """Scales of the product gate·up → down by brute force in float64: the power, and ≥ 99.9 % of the codes."""
    method, checkpoint, name = made.config.method, Checkpoint(small), "mlp.down_proj"
    x = inputs_of(checkpoint, samples, layer, [name])[name]
    prefix = family_of(checkpoint.config).layers + f"{layer}."
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
    scaled, linear = w * scales[best], made.linear(f"{prefix}{name}")
    if method == "mbq":
        expected = rounded(scaled, 3, 64)
        same = np.isclose(linear.decode().double().numpy(), expected, rtol=1e-3, atol=1e-6 * np.abs(expected).max())
        assert same.mean() >= 0.999
    else:  # clipped as well: by brute force, a row and a group at a time
        expected, gram = np.empty_like(w), x / scales[best]
        for r in range(0, len(w), 16):
            for start in range(0, w.shape[1], 64):
                part, here = scaled[r, start : start + 64], gram[:, start : start + 64]
                tried = [np.clip(part, -c * np.abs(part).max(), c * np.abs(part).max()) for c in 1 - np.arange(10) / 20]
                tried = [rounded(t[None], 3, 64)[0] for t in tried]
                expected[r, start : start + 64] = min(tried, key=lambda t: ((here @ (t - part)) ** 2).sum())
        ours = linear.decode().double().numpy()[::16]
        assert np.isclose(ours, expected[::16], rtol=1e-3, atol=1e-6 * np.abs(ours).max()).mean() >= 0.999


def test_folded_scales_leave_the_function_alone(made, small, samples, tmp_path):  # noqa: F811
    """With 8 bits in groups of 16 what is left is rounding: the norms' scales and the weights' cancel in every layer."""
    method = made.config.method
    artifact = run(small, samples[:4], tmp_path / "a", QuantConfig(method=method, bits=8, group_size=16))
    checkpoint = Checkpoint(small)
    model = load_model(checkpoint, CPU)
    with torch.no_grad():
        before = model(**samples[5].model_inputs(), use_cache=False).logits
        write(model, artifact)
        state = {artifact_name(checkpoint, n): artifact.float_tensor(n).float() for n in artifact.float_names()}
        model.load_state_dict(state, strict=False)
        after = model(**samples[5].model_inputs(), use_cache=False).logits
        for name in state:
            if "layernorm" in name and "visual" not in name:
                model.get_parameter(name).copy_(checkpoint.tensor(name_in(checkpoint, name)).float())
        wrong = model(**samples[5].model_inputs(), use_cache=False).logits
    error, mismatch = (after - before).norm() / before.norm(), (wrong - before).norm() / before.norm()
    assert float(error) < 0.02
    assert float(mismatch) > 3 * float(error), "the norms carry nothing, so the check above proves nothing"


def artifact_name(checkpoint: Checkpoint, hub: str) -> str:
    return family_of(checkpoint.config).module_name(hub)


def name_in(checkpoint: Checkpoint, module: str) -> str:
    return family_of(checkpoint.config).hub_name(module)


def test_stopped_and_resumed_has_the_same_bytes(small, samples, tmp_path):  # noqa: F811
    from tests.test_quantize import files
    from vlmq_export.errors import Interrupted

    config = QuantConfig(method="mbq", bits=2, group_size=64)
    run(small, samples[:3], tmp_path / "whole", config)
    for resume in (False, True):
        with pytest.raises(Interrupted):
            run(small, samples[:3], tmp_path / "parts", config, resume=resume, should_stop=lambda: True)
    run(small, samples[:3], tmp_path / "parts", config, resume=True)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_proof_reads_the_changed_norms_from_the_artifact(made, small):  # noqa: F811
    """Floats may be taken from the source instead of from the copies, but for those that are no copies."""
    checkpoint, own = Checkpoint(small), Weights(made.path, small)
    name = family_of(checkpoint.config).layers + "1.input_layernorm.weight"
    assert torch.equal(torch.from_numpy(own.array(name)), made.float_tensor(name).float())
    assert not np.array_equal(own.array(name), checkpoint.tensor(name).float().numpy())


def test_clipping_never_adds_error():
    g = torch.Generator().manual_seed(0)
    x, w = torch.randn(200, 64, generator=g), torch.randn(8, 64, generator=g) ** 3
    grams = torch.stack([part.T @ part for part in x.split(32, 1)])
    ours = clipped(w, grams, torch.ones(64), Affine(3))

    def loss(clipped_weights):
        scale, zero = (p[..., None] for p in Affine(3).fit(clipped_weights.view(8, 2, 32)))
        q = Affine(3).decode(Affine(3).encode(clipped_weights.view(8, 2, 32), scale, zero), scale, zero)
        return sum(((x[:, s] @ (q.view(8, 64) - w)[:, s].T) ** 2).sum(0) for s in (slice(0, 32), slice(32, 64)))

    assert bool((loss(ours) <= loss(w) * (1 + 1e-5)).all()) and float(loss(ours).sum()) < 0.95 * float(loss(w).sum())


# --- gradients of the end ----------------------------------------------------------------------------------------


def slow_gradients(model, sample, name) -> list[torch.Tensor]:
    """∂L/∂Z of a module in every layer, autograd over the whole model: [tokens, out] each."""
    seen = []

    def keep(_module, _inputs, output):
        output.requires_grad_() if not output.requires_grad else None
        output.retain_grad()
        seen.append(output)

    handles = [l.get_submodule(name).register_forward_hook(keep) for l in model.model.language_model.layers]
    labels = sample.input_ids.masked_fill(~sample.answer, -100)[None]
    logits = model(**sample.model_inputs(), use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:]).backward()
    for handle in handles:
        handle.remove()
    return [out.grad[0] for out in seen]


def slow_ratios(model, samples, name) -> list[float]:
    each = []
    grads = [slow_gradients(model, s, name) for s in samples]
    for layer in range(len(grads[0])):
        image = [float(g[layer][s.vision].abs().mean()) for g, s in zip(grads, samples) if bool(s.vision.any())]
        answer = [float(g[layer][s.answer].abs().mean()) for g, s in zip(grads, samples)]
        each.append(statistics.fmean(image) / statistics.fmean(answer))
    return [max(r, statistics.median(each)) for r in each]


@pytest.mark.parametrize("arch", ["qwen2_vl", "qwen3_vl"])
def test_gradients_equal_autograd_over_the_whole_model(arch, tiny, small):  # noqa: F811
    """Layer by layer from put-away inputs: the same gradients, features that the model adds between layers included."""
    folder = small if arch == "qwen2_vl" else tiny(arch, tied=True)
    checkpoint, preprocessor = Checkpoint(folder), Preprocessor(folder)
    samples = [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:3]]
    count = layer_count(checkpoint.config)
    family, streamed = family_of(checkpoint.config), StreamedModel(checkpoint, CPU)
    found: dict[tuple[int, str], list[torch.Tensor]] = {}
    ids = torch.cat([s.input_ids for s in samples])
    with streamed.filled_prefix(ids) as prefix:
        batches = decoder_inputs(prefix, streamed.layer(0), samples, two_streams=False, device=CPU, added=family.added)
    answer_gradients(
        streamed, count, batches, MBQ_TYPES, lambda i, n, b, g: found.setdefault((i, n), []).extend(g.unbind())
    )
    ratios = modality_ratios(streamed, count, batches, MBQ_TYPES)
    model = load_model(checkpoint, CPU)
    ordered = sorted(samples, key=lambda s: len(s.input_ids))
    for name in MBQ_TYPES:
        slow = [slow_gradients(model, s, name) for s in ordered]
        for layer in range(count):
            for ours, expected in zip(found[layer, name], slow):
                torch.testing.assert_close(
                    ours, expected[layer], rtol=2e-3, atol=1e-5 * float(expected[layer].abs().max())
                )
        assert ratios[name] == pytest.approx(slow_ratios(model, ordered, name), rel=1e-3)
