"""Qwen3.5 in ONNX Runtime and onnxruntime-genai: its linear attention, the states, and faults."""

from __future__ import annotations

import random
import shutil
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir.passes.common import InlinePass
from torch import nn
from transformers import Qwen3_5TextConfig
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

from runtime_tests.test_onnx import assert_all_pass, damage, export, run_check
from tests.artifacts import GRIDS
from tools.reference_vlm.tiny_checkpoints import make_tiny
from vlmq_export.formats.contract import FORMATS, FormatOptions
from vlmq_export.formats.onnx.graphs import traced, traced_delta_net
from vlmq_export.formats.onnx.graphs.traced_delta_net import delta_net, empty_states
from vlmq_export.formats.onnx.graphs.traced_text import Example
from vlmq_export.formats.onnx.proof.runner import OnnxRunner, run, session
from vlmq_export.formats.onnx.proof.whole_model import FORMAT_GATE, HALF_GATE
from vlmq_export.formats.proof.checks import CheckSettings, relative_error
from vlmq_export.quantizer.artifact.read import Artifact

SETTINGS = CheckSettings(images=1, questions=1, threads=1)
LOGITS, CACHED = "logits at accuracy_level 0", "cached decode against one forward"
OPERATORS = {"LinearAttention", "CausalConvWithState"}


def slow(*values):
    return [pytest.param(value, marks=pytest.mark.slow) for value in values]


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """get(graph, dtype) → (reference, folder), made once. Of three layers the second attends."""
    made = {}

    def get(graph="fused", dtype="float32"):
        if (graph, dtype) not in made:
            folder = tmp_path_factory.mktemp("qwen3_5")
            source = make_tiny(folder / "source", "qwen3_5", layers=3)
            options = FormatOptions(onnx_graph=graph, onnx_dtype=dtype)
            made[graph, dtype] = export(folder, GRIDS["w4g128"], source, options, rows=2)
        return made[graph, dtype]

    return get


def row(rows, name):
    return next(r for r in rows if r.name.startswith(name))


@pytest.mark.parametrize("graph", ["fused", *slow("single", "plain")])
def test_every_gate_passes(exported, graph):
    """onnxruntime-genai's too, which keeps both states in buffers of its own."""
    reference, folder = exported(graph)
    rows = run_check(reference, folder, FormatOptions(onnx_graph=graph), SETTINGS)
    assert_all_pass(rows)
    assert row(rows, "onnxruntime-genai: greedy answers that differ").status == "passed"


@pytest.mark.slow
def test_the_states_are_float32_in_a_float16_package(exported):
    reference, folder = exported(dtype="float16")
    rows = run_check(reference, folder, FormatOptions(onnx_dtype="float16"), SETTINGS)
    assert_all_pass(rows)
    logits = row(rows, LOGITS)
    assert logits.gate == HALF_GATE
    assert logits.value is not None and logits.value > FORMAT_GATE
    types = {name.split(".")[-1]: v.dtype for name, v in OnnxRunner(folder).empty_cache(1).items()}
    half, full = np.dtype("float16"), np.dtype("float32")
    assert types == {"key": half, "value": half, "conv_state": full, "recurrent_state": full}


# --- the operators --------------------------------------------------------------------------------


class Net(nn.Module):
    """One delta net, as the decoder's graph has it."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, real, past):
        return delta_net(self.net, x, real, past)


@pytest.fixture(scope="module")
def net():
    """Three values for each key, and a graph of it."""
    config: Any = Qwen3_5TextConfig(
        hidden_size=48,
        num_hidden_layers=1,
        linear_num_key_heads=2,
        linear_num_value_heads=6,
        linear_key_head_dim=16,
        linear_value_head_dim=24,
    )
    torch.manual_seed(0)
    made = Qwen3_5GatedDeltaNet(config, 0).eval()
    with torch.no_grad():
        for name, p in made.named_parameters():
            if name not in ("A_log", "norm.weight"):
                p.normal_(std=0.3)
    return made


def graph_of(net, functions=False) -> ir.Model:
    """The net as a graph with its weights; with `functions`, of standard operators alone."""
    real = torch.ones(2, 5, dtype=torch.long)
    arguments = torch.zeros(2, 5, 48), real, list(empty_states(net, 2))
    inputs = {"x": {0: "batch", 1: "length"}, "real": {0: "batch", 1: "length"}}
    inputs |= {"conv": {0: "batch"}, "state": {0: "batch"}}
    module = Net(net)
    names = {id(p): name for name, p in module.named_parameters()}
    outputs = ("y", "new_conv", "new_state")
    model = traced.export("net", module, Example(arguments, inputs, outputs), names)
    weights = dict(module.named_parameters())
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            value.const_value = ir.Tensor(weights[name].detach().numpy(), name=name)
    if functions:
        for function in traced_delta_net.functions(net):
            model.functions[function.identifier()] = function
        InlinePass()(model)
    return model


def in_float64(net, x):
    """[S, hidden] → [S, hidden] and the last state, one token after the other, by the equations."""
    weights = {name: p.detach().double().numpy() for name, p in net.named_parameters()}
    mixed = x @ weights["in_proj_qkv.weight"].T
    kernel = weights["conv1d.weight"][:, 0].T  # [taps, channels]
    before = np.concatenate([np.zeros((len(kernel) - 1, mixed.shape[1])), mixed])
    mixed = np.stack([(before[t : t + len(kernel)] * kernel).sum(0) for t in range(len(x))])
    mixed = mixed / (1 + np.exp(-mixed))
    keys, size = net.num_k_heads, net.head_k_dim
    shared = net.num_v_heads // keys
    query, key = mixed[:, : net.key_dim], mixed[:, net.key_dim : 2 * net.key_dim]
    value = mixed[:, 2 * net.key_dim :].reshape(len(x), net.num_v_heads, net.head_v_dim)
    a, b = (x @ weights[f"in_proj_{n}.weight"].T for n in "ab")
    decay = -np.exp(weights["A_log"]) * np.log1p(np.exp(a + weights["dt_bias"]))
    step = 1 / (1 + np.exp(-b))
    state = np.zeros((net.num_v_heads, size, net.head_v_dim))
    rows = []
    for t in range(len(x)):
        q, k = (part[t].reshape(keys, size).repeat(shared, axis=0) for part in (query, key))
        q, k = (part / np.sqrt((part**2).sum(-1, keepdims=True) + 1e-6) for part in (q, k))
        state = state * np.exp(decay[t])[:, None, None]
        written = (value[t] - np.einsum("hkv,hk->hv", state, k)) * step[t][:, None]
        state = state + k[:, :, None] * written[:, None]
        rows.append(np.einsum("hkv,hk->hv", state, q) / np.sqrt(size))
    read = np.stack(rows)
    read = read / np.sqrt((read**2).mean(-1, keepdims=True) + net.norm.variance_epsilon)
    read = (read * weights["norm.weight"]).reshape(len(x), -1)
    gate = x @ weights["in_proj_z.weight"].T
    return (read * gate / (1 + np.exp(-gate))) @ weights["out_proj.weight"].T, state


@pytest.mark.parametrize("functions", [False, True])
def test_a_delta_net_is_what_the_equations_say(net, functions):
    """Left-padded rows of unequal length, and then one token each, in float64.

    With `functions` the runtime's two operators are spelled out, as other runtimes will have them.
    """
    model = graph_of(net, functions)
    assert {n.op_type for n in model.graph if n.domain} == (set() if functions else OPERATORS)
    graph = session(ir.to_proto(model).SerializeToString(), threads=1)
    x = np.random.default_rng(0).normal(size=(2, 8, 48))
    x[1] *= 1e-3  # so that what is added to the length of a key matters
    pads = (0, 3)
    real = np.stack([np.arange(7) >= pad for pad in pads]).astype(np.int64)
    conv, state = (s.numpy() for s in empty_states(net, 2))
    y, conv, state = run(graph, feeds(x[:, :7], real, conv, state))
    last, _, state = run(graph, feeds(x[:, 7:], real[:, -1:], conv, state))
    for i, pad in enumerate(pads):
        want, after = in_float64(net, x[i, pad:])
        assert relative_error(np.concatenate([y[i, pad:], last[i]]), want) < 5e-7
        assert relative_error(state[i], after) < 5e-7


def feeds(x, real, conv, state):
    return {"x": x.astype(np.float32), "real": real, "conv": conv, "state": state}


# --- states ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", ["fused", *slow("single")])
def test_states_that_are_written_in_place(exported, graph):
    """As onnxruntime-genai binds them: one buffer is input and output."""
    reference, folder = exported(graph)
    p, runner = reference.prompts[0], OnnxRunner(folder)
    positions, embeds = reference.position_ids(p), runner._embed_prompt(p)
    capacity, split = len(p.input_ids) + 7, len(p.input_ids) - 3
    cache = {
        name: onnxruntime.OrtValue.ortvalue_from_numpy(empty)
        for name, empty in runner.empty_cache(1, capacity).items()
    }
    rows = []
    for start, stop in ((0, split), *((i, i + 1) for i in range(split, len(p.input_ids)))):
        binding = runner.text.io_binding()
        binding.bind_cpu_input("inputs_embeds", np.ascontiguousarray(embeds[:, start:stop]))
        binding.bind_cpu_input("attention_mask", np.ones((1, stop), np.int64))
        binding.bind_cpu_input("position_ids", np.ascontiguousarray(positions[..., start:stop]))
        binding.bind_output("logits")
        for name, value in cache.items():
            binding.bind_ortvalue_input(name, value)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present"), value)
        runner.text.run_with_iobinding(binding)
        rows.append(binding.copy_outputs_to_cpu()[0][0])
    got = np.concatenate(rows)[:, : reference.vocabulary]
    assert relative_error(got, reference.logits(p)) <= FORMAT_GATE


def test_exchanged_states_are_caught(exported, tmp_path):
    """A prompt at once is right; what follows it is not."""
    reference, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    path = tmp_path / "onnx" / "text.onnx"
    model = onnx.load(path, load_external_data=False)
    other = {"present.0.recurrent_state": "present.2.recurrent_state"}
    other |= {b: a for a, b in other.items()}
    for node in model.graph.node:
        node.output[:] = [other.get(name, name) for name in node.output]
    path.write_bytes(model.SerializeToString())
    rows = run_check(reference, tmp_path / "onnx", settings=SETTINGS)
    assert row(rows, LOGITS).status == "passed" and row(rows, CACHED).status == "failed"


# --- faults ---------------------------------------------------------------------------------------

ATTEND, UNIT, NORM = (getattr(traced_delta_net, n) for n in ("_attend", "_unit", "rms_norm"))
FAULTS = {
    "nothing is forgotten": (
        traced_delta_net,
        "_attend",
        lambda net, q, k, v, decay, *rest: ATTEND(net, q, k, v, 0 * decay, *rest),
    ),
    "keys of the other heads": (
        traced_delta_net,
        "_unit",
        lambda net, keys: UNIT(net, keys).unflatten(-1, (4, -1))[..., [0, 1, 3, 2], :].flatten(2),
    ),
    "the norm adds 1 to its weight, as all others do": (
        traced_delta_net,
        "rms_norm",
        lambda norm, x: NORM(norm, x, gain=1.0),
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", list(FAULTS))
def test_a_graph_with_a_fault_is_caught_by_its_logits(exported, tmp_path, monkeypatch, fault):
    """All weights are right, and so are the image features."""
    reference, _ = exported()
    monkeypatch.setattr(*FAULTS[fault])
    FORMATS["onnx"].write(Artifact(reference.artifact), tmp_path, FormatOptions())
    rows = run_check(reference, tmp_path, settings=SETTINGS)
    assert row(rows, LOGITS).status == "failed"
    right = ("weights by", "rotary", "each MatMulNBits at level 0", "image features")
    assert all(r.status == "passed" for r in rows if r.name.startswith(right))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("linear_attn.A_log", "ulp"),
        *(
            pytest.param(f"linear_attn.{name}", kind, marks=pytest.mark.slow)
            for name, kind in (
                ("conv1d.weight", "bit"),
                ("in_proj_qkv.scales", "ulp"),
                ("out_proj.qweight", "bit"),
            )
        ),
    ],
)
def test_one_changed_value_is_caught_and_named(exported, tmp_path, name, kind):
    reference, folder = exported()
    shutil.copytree(folder, tmp_path / "onnx")
    name = f"model.language_model.layers.2.{name}"
    damage(tmp_path / "onnx", "text", name, kind, random.Random(0))
    rows = run_check(reference, tmp_path / "onnx", settings=SETTINGS)
    caught = [r for r in rows if r.status == "failed" and r.name.startswith("weights by")]
    module = name.removesuffix(".scales").removesuffix(".qweight")
    assert len(caught) == 2 and all(module in r.worst for r in caught)
