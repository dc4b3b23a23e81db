"""Two layers of the bundled reference VLM, against a computation in float64 from the images on.

The inputs come from the whole model in float64, the gradients from autograd over a whole attention
block, and the codes from a loop that inverts the remaining Hessian at every column.
"""

import numpy as np
import pytest
import torch

from tests.oracle import block_gradients, brain_surgeon
from tests.quantizer.run.test_quantize import run
from vlmq_export import bundled
from vlmq_export.errors import Interrupted
from vlmq_export.quantizer.artifact.read import read_layer
from vlmq_export.quantizer.config import QuantConfig
from vlmq_export.quantizer.methods import METHODS
from vlmq_export.quantizer.model.checkpoint import Checkpoint
from vlmq_export.quantizer.model.families import ATTENTION
from vlmq_export.quantizer.model.streamed import load_model
from vlmq_export.quantizer.samples.preprocessor import Preprocessor
from vlmq_export.quantizer.samples.rows import read_rows

pytestmark = pytest.mark.usefixtures("one_thread")

SAME = 0.999  # share of equal codes
ALPHA, DAMP, BITS, GROUP = 0.25, 0.01, 3, 128
LINEAR = "self_attn.k_proj"  # the smallest of those that importance weighs


@pytest.fixture(scope="module")
def samples():
    preprocessor = Preprocessor(bundled.REFERENCE_VLM)
    return [preprocessor.sample(row) for row in read_rows(bundled.CALIBRATION)[:24]]


def hidden_states(model, samples, layer: int) -> list[tuple[torch.Tensor, dict]]:
    """(input of a decoder layer, its keyword arguments) of each sample."""
    seen = []

    def keep(_module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"], kwargs))

    module = model.model.language_model.layers[layer]
    handle = module.register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for s in samples:
            inputs = {
                k: v.double() if v.is_floating_point() else v for k, v in s.model_inputs().items()
            }
            model(**inputs, use_cache=False)
    handle.remove()
    names = ("attention_mask", "position_ids", "position_embeddings")
    return [(h, {k: kwargs[k] for k in names if k in kwargs}) for h, kwargs in seen]


def slow_codes(method, model, full, samples, index: int) -> np.ndarray:
    """Codes of one linear of layer `index`.

    The layers before it are quantized in `model`. `full` is the source's model.
    """
    layer = full.model.language_model.layers[index]
    a, d = 0.0, 0.0
    rows = []
    states = (hidden_states(m, samples, index) for m in (model, full))
    for (h, kwargs), (h_full, _) in zip(*states):
        g = np.ones(h.shape[1])
        if method.importance != "none" and not torch.equal(h, h_full):
            p = block_gradients(layer, ATTENTION, h, h_full, kwargs)[LINEAR][0].numpy()
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
    codes, _, _ = brain_surgeon(
        w, damped, BITS, GROUP, order=order, drift=drift, alpha=ALPHA, inside=GROUP
    )
    return codes


def gar(diagonal: np.ndarray, group: int) -> np.ndarray:
    """act_order gar: groups in order of their largest entry, the columns inside in their own."""
    parts = [np.arange(i, i + group) for i in range(0, len(diagonal), group)]
    parts.sort(key=lambda part: -diagonal[part].max())
    return np.concatenate([part[np.argsort(-diagonal[part], kind="stable")] for part in parts])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gptq"])
def test_codes_of_two_layers(name, samples, tmp_path):
    """The run stops after two layers. The slow computation follows with the codes of the run."""
    stops = iter([False, True])
    config = QuantConfig(method=name, bits=BITS, group_size=GROUP)
    out = tmp_path / "a"
    with pytest.raises(Interrupted):
        run(bundled.REFERENCE_VLM, samples, out, config, should_stop=lambda: next(stops))
    checkpoint = Checkpoint(bundled.REFERENCE_VLM)
    full, model = (load_model(checkpoint, torch.device("cpu")).double() for _ in range(2))
    prefix = checkpoint.architecture.family.layers
    for index in (0, 1):
        solved = {q.name.removeprefix(f"{prefix}{index}."): q for q in read_layer(out, index)}
        codes = slow_codes(METHODS[name], model, full, samples, index)
        same = (solved[LINEAR].solution.codes.numpy() == codes).mean()
        assert same >= SAME, f"layer {index}"
        for linear, q in solved.items():
            module = model.model.language_model.layers[index].get_submodule(linear)
            with torch.no_grad():
                module.weight.copy_(q.decode())
                if q.bias is not None:
                    module.bias.copy_(q.bias)
