"""Float graphs without weights of the families that mobius cannot build, traced by torch.onnx.

The model is made on torch's meta device, and each parameter stands in the trace as one number expanded to its shape, so
that neither a large model's floats nor random ones are ever in memory. Parameters get their hub names and no values.
"""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Callable, Collection
from contextlib import contextmanager
from pathlib import Path

import onnx_ir as ir
import torch
from torch import nn

from vlmq_export.errors import FormatError
from vlmq_export.formats.onnx.graphs import IR_VERSION, cast_output, rename
from vlmq_export.formats.onnx.planning import TRACED
from vlmq_export.formats.onnx.torch_text import OPSET, Embedding, Text
from vlmq_export.formats.onnx.torch_vision import InternVision, LlavaOnevision, Qwen3Vision
from vlmq_export.quantizer.families import family_of

VISION = dict(zip(TRACED, (Qwen3Vision, LlavaOnevision, InternVision), strict=True))


class Parts:
    """The three modules to trace, without weights. Raises FormatError for what they have no place for."""

    def __init__(self, config, kind: torch.dtype):
        """`config`: transformers' own; `kind`: type of embedding and decoder. The vision tower is float32."""
        import transformers

        family = family_of(config.to_dict())
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config).eval()
        empty(model, lambda name: torch.float32 if family.is_vision(family.hub_name(name)) else kind)
        try:
            vision = VISION[config.model_type](model)
            deepstack = getattr(vision, "deepstack", 0)
            self.traced = {
                "vision": (vision, *vision.example()),
                "embedding": _embedding(model, config, deepstack),
                "text": _text(model, config, deepstack),
            }
        except AttributeError as e:  # another language model or tower than this family was published with
            raise FormatError(
                f"ONNX graphs do not know this {config.model_type} ({e}); leave out --format onnx"
            ) from None
        self.names = {id(p): family.hub_name(name) for name, p in model.named_parameters()}
        self.model = model


def float_graphs(source: Path, known: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT) -> dict[str, ir.Model]:
    """vision, embedding and text of the model in `source` (config.json); arguments and errors as graphs.float_graphs."""
    config = config_of(json.loads((source / "config.json").read_text("utf-8")))
    parts = Parts(config, torch.float16 if dtype == ir.DataType.FLOAT16 else torch.float32)
    graphs = {name: export(name, *part, parts.names) for name, part in parts.traced.items()}
    if dtype != ir.DataType.FLOAT:
        cast_output(graphs["vision"].graph, dtype)
    _keep_unused(graphs, parts.model, parts.names, known)
    return graphs


def config_of(source_config: dict):
    """transformers' configuration from the contents of config.json."""
    from transformers import CONFIG_MAPPING

    return CONFIG_MAPPING[source_config["model_type"]].from_dict(source_config)


def empty(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Every parameter becomes one zero of its own, seen in its shape; tied ones stay tied. `dtype_of` takes its name."""
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                zero = torch.zeros((), dtype=dtype_of(f"{prefix}.{name}"))
                made[id(p)] = nn.Parameter(zero.expand(p.shape), requires_grad=False)
            setattr(module, name, made[id(p)])


def export(
    graph: str, module: nn.Module, arguments: tuple, inputs: dict[str, dict], outputs: dict[str, dict], names: dict[int, str]
) -> ir.Model:  # fmt: skip
    """One module as one graph. `inputs` and `outputs`: name → {axis: name of its dynamic length}."""
    flat = iter(inputs.values())
    shapes = tuple([next(flat) for _ in a] if isinstance(a, list) else next(flat) for a in arguments)
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module, arguments, dynamo=True, optimize=False, verbose=False, opset_version=OPSET,
            input_names=list(inputs), output_names=list(outputs), dynamic_shapes=shapes,
        )  # fmt: skip
    model = program.model
    model.graph.name, model.ir_version = graph, IR_VERSION
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for value in list(model.graph.initializers.values()):
        if value.name in parameters:
            name = names[id(parameters[value.name])]
            tied_head = value.name == "lm_head.weight" and name.endswith("embed_tokens.weight")
            value.const_value = None
            rename(model.graph, value, "lm_head.weight" if tied_head else name)
        else:
            rename(model.graph, value, f"{graph}.{value.name}")
    values = [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]
    for part in (model, model.graph, *model.graph, *values):
        part.metadata_props.clear()  # lines of source, with the paths of this machine
    return model


def _embedding(model: nn.Module, config, deepstack: int):
    token = getattr(config, "image_token_id", None) or config.image_token_index
    width = (1 + deepstack) * model.get_input_embeddings().weight.shape[1]
    arguments = torch.full((2, 6), token), torch.zeros(7, width, dtype=model.lm_head.weight.dtype)
    inputs = {"input_ids": {0: "batch", 1: "sequence"}, "image_features": {0: "image_tokens"}}
    return Embedding(model, token, deepstack), arguments, inputs, {"inputs_embeds": {}}


def _text(model: nn.Module, config, deepstack: int):
    module = Text(model, deepstack)
    text = module.config
    batch, length, past, dtype = 2, 5, 3, model.lm_head.weight.dtype
    heads, size = text.num_key_value_heads, module.layers[0].self_attn.head_dim
    caches = [torch.zeros(batch, heads, past, size, dtype=dtype) for _ in range(2 * len(module.layers))]
    positions = torch.zeros(*[3][: bool(module.rotary.sections)], batch, length, dtype=torch.long)
    arguments = (
        torch.zeros(batch, length, (1 + deepstack) * text.hidden_size, dtype=dtype),
        torch.ones(batch, past + length, dtype=torch.long),
        positions,
        caches,
    )
    first = positions.ndim - 2
    names = [f"{i}.{part}" for i in range(len(module.layers)) for part in ("key", "value")]
    inputs = {
        "inputs_embeds": {0: "batch", 1: "sequence"},
        "attention_mask": {0: "batch", 1: "total_sequence"},
        "position_ids": {first: "batch", first + 1: "sequence"},
        **{f"past_key_values.{n}": {0: "batch", 2: "past_sequence"} for n in names},
    }
    return module, arguments, inputs, {"logits": {}, **{f"present.{n}": {} for n in names}}


def _keep_unused(graphs: dict[str, ir.Model], model: nn.Module, names: dict[int, str], known: Collection[str]) -> None:
    """Weights that the model carries and never computes with (SigLIP's last norm) lie in vision.onnx all the same: what
    is read back is the whole model."""
    used = {name for g in graphs.values() for name in g.graph.initializers}
    for parameter in model.parameters():
        name = names[id(parameter)]
        if name in known and name not in used:
            shape = ir.Shape(parameter.shape)
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            graphs["vision"].graph.initializers[name] = value


@contextmanager
def _quiet():
    """torch.onnx reports on the root logger and in warnings what a user cannot act upon."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
