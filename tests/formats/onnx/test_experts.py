"""Experts as nodes of a graph, in ONNX Runtime, against the model's own code in float64."""

from copy import deepcopy

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from transformers import Qwen3VLMoeTextConfig
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeTextSparseMoeBlock

from vlmq_export.formats.onnx.graphs.edit import name_of, parameters
from vlmq_export.formats.onnx.graphs.experts import routed
from vlmq_export.formats.onnx.graphs.traced import export
from vlmq_export.formats.onnx.graphs.traced_text import Example
from vlmq_export.quantizer.model.experts import separated
from vlmq_export.quantizer.model.families import EXPERTS

HIDDEN, INNER, COUNT, TAKEN = 24, 40, 7, 3


class Block(torch.nn.Module):
    """The experts of one layer, in the place that they have in a decoder."""

    def __init__(self):
        super().__init__()
        config = Qwen3VLMoeTextConfig(
            hidden_size=HIDDEN,
            moe_intermediate_size=INNER,
            num_experts=COUNT,
            num_experts_per_tok=TAKEN,
        )
        self.mlp = Qwen3VLMoeTextSparseMoeBlock(config)
        draw = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            parameter.data = torch.randn(parameter.shape, generator=draw) / 4

    def forward(self, x):
        return routed(self.mlp, EXPERTS, x, "model.")


@pytest.fixture(scope="module")
def block():
    """(session of its graph, the model's own block in float64)"""
    module, lengths = Block(), {0: "batch", 1: "sequence"}
    example = Example((torch.zeros(2, 3, HIDDEN),), {"x": lengths}, ("y",))
    names = {id(p): f"model.{name}" for name, p in module.named_parameters()}
    model = export("text", module, example, names)
    with separated(module):
        weights = {f"model.{name}": p.detach() for name, p in module.named_parameters()}
    for value in parameters(model.graph):
        value.const_value = ir.tensor(weights[name_of(value)].numpy())
    graph = ir.serde.serialize_model(model).SerializeToString()
    session = onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    return session, deepcopy(module.mlp).double()


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5), (1, 40)])
def test_every_token_gets_what_its_experts_give(block, shape):
    """Of one token, four experts have no rows."""
    session, exact = block
    x = torch.randn(*shape, HIDDEN, generator=torch.Generator().manual_seed(sum(shape)))
    (got,) = session.run(None, {"x": x.numpy()})
    with torch.no_grad():
        want = exact(x.double()).numpy()
    assert np.abs(got - want).max() <= 1e-6 * np.abs(want).max()
