"""L1: that each expert multiplies its own tokens, and that what it gives is taken for its own.

Prompts reach some experts alone. A graph in which two of the others had changed places could pass
every check of the whole model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from vlmq_export.formats.onnx.read import OnnxFolder, merged_linears
from vlmq_export.formats.proof.checks import Check
from vlmq_export.formats.proof.reference import Reference

if TYPE_CHECKING:
    from onnx import NodeProto

Places = Mapping[str, tuple["NodeProto", int]]  # value → the node that gives it, and which output


def expert_places(written: OnnxFolder, reference: Reference) -> list[Check]:
    """One row over all linears of experts; none for a dense model.

    A linear that is not where it should be, or not there, counts as wrong.
    """
    count = reference.architecture.experts
    if not count:
        return []
    nodes = written.models["text"].graph.node
    places = {value: (node, i) for node in nodes for i, value in enumerate(node.output)}
    joined = {tuple(merged_linears(n.name)): list(n.input) for n in nodes if n.op_type == "Concat"}
    wrong, compared = [], 0
    for linears in _linears(reference):
        given = joined.get(tuple(linears), [])
        for number in range(max(count, len(given))):
            names = [linear.replace("*", str(number)) for linear in linears]
            compared += len(names)
            if number >= min(count, len(given)) or _origin(given[number], places) != (
                names,
                {number},
            ):
                wrong += names
    return [
        Check.at_most(
            "onnx",
            "L1",
            "experts in their places",
            float(len(wrong)),
            0.0,
            unit="linears that are not",
            compared=compared,
            detail="each has the tokens that take it, and its results go to them",
            worst=", ".join(wrong[:4]),
        )
    ]


def _linears(reference: Reference) -> list[list[str]]:
    """Hub names of the linears with one input, in all layers. `*` is the number of the expert."""
    family, text = reference.architecture.family, reference.architecture.text
    blocks = [block for block in family.blocks if block.kind == "experts"]
    return [
        [f"{family.layers}{layer}.{name}" for name in names]
        for layer in range(text["num_hidden_layers"])
        for block in blocks
        for names in (block.ins, [block.out])
    ]


def _origin(value: str, places: Places) -> tuple[list[str], set[int]]:
    """The linears that give a value, and the places of their rows among those of all experts.

    Linears of one expert may be merged, or stand side by side, each with its columns gathered in an
    order of its own.
    """
    node, _ = places[value]
    products = [places[v][0] for v in node.input] if node.op_type == "Concat" else [node]
    names, rows = [], set[int]()
    for product in products:
        names += merged_linears(product.input[1].removesuffix(".qweight"))
        source, place = places[product.input[0]]
        rows.add(places[source.input[0]][1] if source.op_type == "Gather" else place)
    return names, rows
