"""Float graphs without weights of the families that mobius builds wrongly or not at all.

torch.onnx traces them. The model is made on torch's meta device. For the trace each parameter is
one number, expanded to its shape, so that neither the floats of a large model nor random ones are
ever in memory. In the graphs the parameters have their hub names and no values.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import nn

from vlmq_export.errors import CheckpointError, FormatError
from vlmq_export.formats.onnx.graphs.edit import IR_VERSION, cast_output, rename
from vlmq_export.formats.onnx.graphs.experts import take_apart
from vlmq_export.formats.onnx.graphs.traced_delta_net import WIDE
from vlmq_export.formats.onnx.graphs.traced_operators import OPSET
from vlmq_export.formats.onnx.graphs.traced_text import Embedding, Example, Text
from vlmq_export.formats.onnx.graphs.traced_vision import (
    GemmaVision,
    InternVision,
    LlavaOnevision,
    PixtralVision,
    Qwen3Vision,
    SmolVision,
)
from vlmq_export.quantizer.model.architecture import pretrained_config
from vlmq_export.quantizer.model.families import FAMILIES
from vlmq_export.quantizer.model.streamed import model_class
from vlmq_export.quantizer.storage.untrusted import read_json

VISION = {  # one entry for each of families.TRACED
    "qwen3_vl": Qwen3Vision,
    "qwen3_vl_moe": Qwen3Vision,
    "qwen3_5": Qwen3Vision,
    "llava_onevision": LlavaOnevision,
    "internvl": InternVision,
    "idefics3": SmolVision,
    "smolvlm": SmolVision,
    "gemma3": GemmaVision,
    "mistral3": PixtralVision,
}

Traceable = (
    GemmaVision
    | Qwen3Vision
    | LlavaOnevision
    | InternVision
    | SmolVision
    | PixtralVision
    | Embedding
    | Text
)


@dataclass(frozen=True)
class Parts:
    """The three modules of a model that are traced, all without weights."""

    model: nn.Module  # the whole model
    modules: dict[str, tuple[nn.Module, Example]]  # by the name of the graph
    hub_names: dict[int, str]  # id of a parameter of the model → its hub name

    @classmethod
    def of(cls, config: Any, dtype: torch.dtype) -> Parts:
        """The parts of the model that transformers' configuration describes.

        `dtype` is the type of the embedding and the decoder. The vision tower is float32, and so
        is what a linear attention has beside its linears.

        Raises FormatError for what the modules cannot express.
        """
        family, whole = FAMILIES[config.model_type], _model_class(config)

        def dtype_of(name: str) -> torch.dtype:
            wide = family.is_vision(family.hub_name(name)) or name.endswith(WIDE)
            return torch.float32 if wide else dtype

        try:
            with torch.device("meta"):
                model = whole(config).eval()
            empty(model, dtype_of)
            vision = VISION[config.model_type](model)
            token = getattr(config, "image_token_id", None) or config.image_token_index
            modules = {
                "vision": _with_example(vision),
                "embedding": _with_example(
                    Embedding(model, token, vision.deepstack, marked=bool(family.marks))
                ),
                "text": _with_example(Text(model, family, vision.deepstack)),
            }
        except AttributeError as e:
            # Another language model or tower than this family was published with.
            raise _unknown(config, e) from None
        hub_names = {id(p): family.hub_name(name) for name, p in model.named_parameters()}
        return cls(model, modules, hub_names)


def _model_class(config: Any) -> Any:
    """The class of the whole model. Raises FormatError for one that transformers does not have."""
    try:
        return model_class(config)
    except CheckpointError as e:
        raise _unknown(config, e) from None


def _with_example(module: Traceable) -> tuple[nn.Module, Example]:
    return module, module.example()


def _unknown(config: Any, reason: Exception) -> FormatError:
    """The refusal of a model that is not built as its family was published."""
    return FormatError(
        f"ONNX graphs do not know this {config.model_type} ({reason}); leave out --format onnx"
    )


def float_graphs(
    source: Path, known: Collection[str], dtype: ir.DataType = ir.DataType.FLOAT
) -> dict[str, ir.Model]:
    """The three graphs of the model in `source`. Arguments, result and errors are build.py's."""
    config = pretrained_config(read_json(source / "config.json"))
    half = dtype == ir.DataType.FLOAT16
    parts = Parts.of(config, torch.float16 if half else torch.float32)
    graphs = {
        name: export(name, module, example, parts.hub_names)
        for name, (module, example) in parts.modules.items()
    }
    text = parts.modules["text"][0]
    assert isinstance(text, Text)
    for function in text.functions():
        graphs["text"].functions[function.identifier()] = function
    if dtype != ir.DataType.FLOAT:
        cast_output(graphs["vision"].graph, dtype)
    _keep_unused(graphs, parts, known)
    return graphs


def empty(model: nn.Module, dtype_of: Callable[[str], torch.dtype]) -> None:
    """Replace every parameter by a single zero that is expanded to its shape.

    Tied parameters stay tied. `dtype_of` gives the type of a parameter by its name.
    """
    made: dict[int, nn.Parameter] = {}
    for prefix, module in model.named_modules():
        for name, p in list(module.named_parameters(recurse=False)):
            if id(p) not in made:
                zero = torch.zeros((), dtype=dtype_of(f"{prefix}.{name}"))
                made[id(p)] = nn.Parameter(zero.expand(p.shape), requires_grad=False)
            setattr(module, name, made[id(p)])


def export(graph: str, module: nn.Module, example: Example, hub_names: dict[int, str]) -> ir.Model:
    """The graph of one module. `graph` is its name, and `hub_names` are those of `Parts`."""
    lengths = iter(example.inputs.values())
    dynamic_shapes = tuple(
        [next(lengths) for _ in a] if isinstance(a, list) else next(lengths)
        for a in example.arguments
    )
    with torch.no_grad(), _quiet():
        program = torch.onnx.export(
            module,
            example.arguments,
            dynamo=True,
            optimize=False,
            verbose=False,
            opset_version=OPSET,
            input_names=list(example.inputs),
            output_names=list(example.outputs),
            dynamic_shapes=dynamic_shapes,
        )
    assert program is not None, "torch.onnx.export returns a program with dynamo=True"
    model = program.model
    model.graph.name, model.ir_version = graph, IR_VERSION
    _name_initializers(model.graph, module, hub_names)
    take_apart(model)
    _clear_metadata(model)
    return model


def _name_initializers(graph: ir.Graph, module: nn.Module, hub_names: dict[int, str]) -> None:
    """Give parameters their hub names and no values, and constants the graph's name as prefix.

    An output head that is tied to the embedding is lm_head.weight in the decoder's graph.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    for value in list(graph.initializers.values()):
        if value.name in parameters:
            name = hub_names[id(parameters[value.name])]
            tied_head = value.name == "lm_head.weight" and name.endswith("embed_tokens.weight")
            value.const_value = None
            rename(graph, value, "lm_head.weight" if tied_head else name)
        else:
            rename(graph, value, f"{graph.name}.{value.name}")


def _clear_metadata(model: ir.Model) -> None:
    """Remove torch's metadata, which are lines of source with the paths of this machine."""
    graph = model.graph
    outputs = (value for node in graph for value in node.outputs)
    values = [*graph.inputs, *graph.initializers.values(), *outputs]
    for part in (model, graph, *graph, *values):
        part.metadata_props.clear()


def _keep_unused(graphs: dict[str, ir.Model], parts: Parts, known: Collection[str]) -> None:
    """Give vision.onnx the weights that the model carries but never computes with.

    SigLIP's last norm is one. Without them the files would not hold the whole model.
    """
    used = {name for g in graphs.values() for name in g.graph.initializers}
    for parameter in parts.model.parameters():
        name = parts.hub_names[id(parameter)]
        if name in known and name not in used:
            shape = ir.Shape(parameter.shape)
            value = ir.Value(name=name, type=ir.TensorType(ir.DataType.FLOAT), shape=shape)
            graphs["vision"].graph.initializers[name] = value


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.onnx from logging and from warning of what a user cannot act upon."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
