"""Two layers of the bundled reference, against float64 from the images on.

Inputs, gradients and sums are formed here, by the whole model in float64 and by autograd over a whole attention block; the
codes by a loop that inverts what is left of the Hessian at every column.
"""

import numpy as np
import pytest
import torch

from tests.oracle import attention_gradients, brain_surgeon
from tests.test_quantize import run
from vlmq_export import bundled
from vlmq_export.quantizer.calibration import Preprocessor, read_rows
from vlmq_export.quantizer.checkpoint import Checkpoint
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.families import family_of
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model import load_model

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 0.999
ALPHA, DAMP, BITS, GROUP = 0.25, 0.01, 3, 128
LINEAR = "self_attn.k_proj"  # the smallest of those that importance weighs


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:24]]


def hidden_states(model, samples, layer: int) -> list[tuple[torch.Tensor, dict]]:
    """Input of a decoder layer and its keyword arguments, a sample at a time."""
    seen = []
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(
        lambda _m, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"], kwargs)), with_kwargs=True
    )
    with torch.no_grad():
        for s in samples:
            inputs = {k: v.double() if v.is_floating_point() else v for k, v in s.model_inputs().items()}
            model(**inputs, use_cache=False)
    handle.remove()
    names = ("attention_mask", "position_ids", "position_embeddings")
    return [(h, {k: kwargs[k] for k in names if k in kwargs}) for h, kwargs in seen]


def slow_codes(method, model, full, samples, index: int) -> np.ndarray:
    """Codes of one linear of layer `index`: `model` has the layers before it quantized, `full` has none."""
    layer = full.model.language_model.layers[index]
    a, d = 0.0, 0.0
    rows = []
    for (h, kwargs), (h_full, _) in zip(hidden_states(model, samples, index), hidden_states(full, samples, index)):
        g = np.ones(h.shape[1])
        if method.importance != "none" and not torch.equal(h, h_full):
            p = attention_gradients(layer, h, h_full, kwargs)[LINEAR][0].numpy()
            g = np.abs(p).mean(1) if method.importance == "l1" else np.sqrt((p**2).sum(1))
        with torch.no_grad():
            rows.append([layer.input_layernorm(x)[0].numpy() for x in (h, h_full)] + [g])
    for x, x_full, g in rows:
        weighted = x * g[:, None]
        a = a + weighted.T @ weighted
        d = d + ((x_full - x) * g[:, None]).T @ weighted
    order = gar(np.diag(a), GROUP)
    damped = a + DAMP * np.diag(a).mean() * np.eye(len(a))
    w = layer.get_submodule(LINEAR).weight.detach().numpy()
    drift = d if method.drift == "columns" else None
    codes, _, _ = brain_surgeon(w, damped, BITS, GROUP, order=order, drift=drift, alpha=ALPHA, inside=GROUP)
    return codes


def gar(diagonal: np.ndarray, group: int) -> np.ndarray:
    """Groups by their largest entry, columns inside by theirs."""
    parts = [np.arange(i, i + group) for i in range(0, len(diagonal), group)]
    parts.sort(key=lambda part: -diagonal[part].max())
    return np.concatenate([part[np.argsort(-diagonal[part], kind="stable")] for part in parts])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq"])
def test_codes_of_two_layers(name, samples, tmp_path):
    from vlmq_export.errors import Interrupted
    from vlmq_export.quantizer.artifact import read_layer

    stops = iter([False, True])
    with pytest.raises(Interrupted):
        run(
            bundled.REFERENCE_VLM, samples, tmp_path / "a", QuantConfig(method=name, bits=BITS, group_size=GROUP),
            should_stop=lambda: next(stops),
        )  # fmt: skip
    checkpoint = Checkpoint(bundled.REFERENCE_VLM)
    full, model = (load_model(checkpoint, torch.device("cpu")).double() for _ in range(2))
    prefix = family_of(checkpoint.config).layers
    for index in (0, 1):
        solved = {q.name.removeprefix(f"{prefix}{index}."): q for q in read_layer(tmp_path / "a", index)}
        same = (solved[LINEAR].codes.numpy() == slow_codes(METHODS[name], model, full, samples, index)).mean()
        assert same >= SAME, f"layer {index}"
        for linear, q in solved.items():
            module = model.model.language_model.layers[index].get_submodule(linear)
            with torch.no_grad():
                module.weight.copy_(q.decode())
                if q.bias is not None:
                    module.bias.copy_(q.bias)
