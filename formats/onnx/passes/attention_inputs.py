"""What GroupQueryAttention is given besides query, key, value and cache: lengths, biases, turns.

They are made once, and all attentions of a kind share them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from vlmq_export.formats.onnx.graphs.edit import (
    add_initializers,
    constant,
    length,
    name_outputs,
    numpy_type,
)

Turn = tuple[ir.Value, ir.Value]  # cosines and sines


@dataclass(frozen=True)
class Given:
    """What an attention is given besides its query, key, value and cache."""

    last: ir.Value  # int32 [B]: the last position of each row
    total: ir.Value  # int32 [1]: how many tokens there are, cached and new
    bias: ir.Value | None = None  # [B, 1, S, total]: added to the scores
    causal: bool = True  # whether keys behind a query are left out whatever the bias says
    # Cosines and sines, [total, head size / 2] each. None: query and key come rotated.
    turn: Turn | None = None


def attention_inputs(
    graph: ir.Graph,
    attentions: list[ir.Node],
    tables: Turn | None,  # cosines and sines of every position, where the graph has them
    mrope_section: list[int] | None,  # as `fuse` takes it
    *,
    single: bool,  # for a batch of one, which is rotated inside the attention
) -> dict[ir.Node, Given]:
    """Add the inputs of every attention to the graph, before the attentions are replaced."""
    inputs = {v.name: v for v in graph.inputs}
    mask, embeds = inputs["attention_mask"], inputs["inputs_embeds"]
    causal, shared = not masks_say_all(attentions), _lengths(graph, mask, single)
    biases: dict[ir.Node, ir.Value] = {}
    if not causal:
        biases = _biases_of_masks(graph, attentions, embeds)
    elif not single:
        biases = dict.fromkeys(attentions, _bias_of_padding(graph, mask, embeds))
    turns: dict[ir.Node, Turn] = {}
    if single:
        _set_batch_to_one(graph, embeds)
        turns = _turns(graph, attentions, inputs, tables, mrope_section)
    return {
        node: replace(shared, bias=biases.get(node), causal=causal, turn=turns.get(node))
        for node in attentions
    }


def masks_say_all(attentions: list[ir.Node]) -> bool:
    """Whether no attention leaves out more keys than its mask does, as in the graph of Gemma 3."""
    causal = (n.attributes.get("is_causal") for n in attentions)
    return bool(attentions) and all(a is not None and a.as_int() == 0 for a in causal)


def rotation(attention: ir.Node, i: int) -> ir.Node:
    """The RotaryEmbedding of an attention's query (0) or key (1)."""
    rotated = attention.inputs[i]
    node = None if rotated is None else rotated.producer()
    assert node is not None, "query and key of a decoder are rotated"
    return node


def _lengths(graph: ir.Graph, mask: ir.Value, single: bool) -> Given:
    """The lengths of the rows, from their 0/1 mask [B, T]. Of a single row all tokens count."""
    tape = ir.tape.Tape()
    total = _as_int32(tape, length(tape, mask, 1))
    if single:
        last = tape.op("Sub", [total, constant(tape, "lengths.one", [1], np.int32)])
    else:
        newest = {"axis": 1, "keepdims": 0, "select_last_index": 1}
        last = _as_int32(tape, tape.op("ArgMax", [mask], newest))
    _insert(graph, graph[0], tape, "lengths")
    return Given(last, total)


def _bias_of_padding(graph: ir.Graph, mask: ir.Value, embeds: ir.Value) -> ir.Value:
    """The bias of a batch that is padded on the left, from its 0/1 mask [B, T]: [B, 1, S, T]."""
    tape, dtype = ir.tape.Tape(), numpy_type(embeds)
    one = constant(tape, "attention_bias.one", [1])
    axes = constant(tape, "attention_bias.axes", [1, 2])
    by_value = constant(tape, "attention_bias.by_value", [_lowest(embeds), 0], dtype)
    new = length(tape, embeds, 1)
    of_keys = tape.op("Unsqueeze", [tape.op("Gather", [by_value, mask]), axes])  # [B, 1, 1, T]
    bias = tape.op("Expand", [of_keys, tape.op("Concat", [one, one, new, one], {"axis": 0})])
    _insert(graph, graph[0], tape, "attention_bias")
    return bias


def _biases_of_masks(
    graph: ir.Graph, attentions: list[ir.Node], embeds: ir.Value
) -> dict[ir.Node, ir.Value]:
    """The bias of each attention from its mask, bool [B, 1, S, T]. Layers of a kind share it."""
    tape, dtype = ir.tape.Tape(), numpy_type(embeds)
    seen = constant(tape, "attention_bias.seen", 0, dtype)
    hidden = constant(tape, "attention_bias.hidden", _lowest(embeds), dtype)
    masks = dict.fromkeys(node.inputs[3] for node in attentions)
    biases = {mask: tape.op("Where", [mask, seen, hidden]) for mask in masks}
    _insert(graph, attentions[0], tape, "attention_bias")
    return {node: biases[node.inputs[3]] for node in attentions}


def _lowest(embeds: ir.Value) -> float:
    """The bias of a key that is not seen: half the lowest number.

    −inf would make NaN of a row in which everything is masked.
    """
    return float(np.finfo(numpy_type(embeds)).min / 2)


def _turns(
    graph: ir.Graph,
    attentions: list[ir.Node],
    inputs: Mapping[str | None, ir.Value],
    tables: Turn | None,
    mrope_section: list[int] | None,
) -> dict[ir.Node, Turn]:
    """The cosines and sines by which each attention rotates a batch of one.

    Row i of them is what the operator takes at position i. It asks for as many rows as there are
    tokens, and those of the past are zeros.
    """
    tape = ir.tape.Tape()
    computed = {node: _computed_turn(node) for node in attentions}
    rows = dict[Turn, list[ir.Value]]()  # [S, head size / 2] each
    if mrope_section is not None and tables is not None:
        by_axis = _rows_by_axis(tape, inputs["position_ids"], tables, mrope_section)
        rows = dict.fromkeys(computed.values(), by_axis)
    else:
        axis = constant(tape, "rotary.batch_axis", [0])
        for turn in dict.fromkeys(computed.values()):
            rows[turn] = [tape.op("Squeeze", [x, axis]) for x in turn]
    new = length(tape, inputs["inputs_embeds"], 1)
    all_tokens = length(tape, inputs["attention_mask"], 1)
    none = constant(tape, "rotary.no_pads", [0, 0, 0])
    pads = tape.op("Concat", [tape.op("Sub", [all_tokens, new]), none], {"axis": 0})
    padded = {id(x): tape.op("Pad", [x, pads]) for each in rows.values() for x in each}
    first = next(n for n in graph if n.op_type == "RotaryEmbedding")
    _insert(graph, first, tape, "rotary")
    made = {turn: (padded[id(c)], padded[id(s)]) for turn, (c, s) in rows.items()}
    return {node: made[turn] for node, turn in computed.items()}


def _computed_turn(attention: ir.Node) -> Turn:
    """The cosines and sines that turn query and key in the graph, [B, S, head size / 2] each."""
    (found,) = {tuple(rotation(attention, i).inputs[1:3]) for i in (0, 1)}
    cosines, sines = found
    assert cosines is not None and sines is not None, "a rotation has cosines and sines"
    return cosines, sines


def _rows_by_axis(
    tape: ir.tape.Tape,
    position_ids: ir.Value,  # [3, 1, S]
    tables: Turn,
    mrope_section: list[int],
) -> list[ir.Value]:
    """Cosines and sines of the current tokens from the tables, [S, head size / 2] each."""
    sections = np.repeat(np.arange(3), mrope_section)
    axis_of = constant(tape, "rotary.axis", sections)  # of each frequency
    by_axis = constant(tape, "rotary.by_axis", [3, -1])
    flat = tape.op("Reshape", [position_ids, by_axis])  # [3, S]
    positions = tape.op("Gather", [flat, axis_of])
    index = tape.op("Transpose", [positions], {"perm": [1, 0]})  # [S, head size / 2]
    return [tape.op("GatherElements", [table, index]) for table in tables]


def _set_batch_to_one(graph: ir.Graph, embeds: ir.Value) -> None:
    """Write 1 for the batch in the shapes of inputs and outputs. A runtime then refuses others."""
    assert embeds.shape is not None, "the inputs of a graph have shapes"
    batch = embeds.shape[0]
    for value in [*graph.inputs, *graph.outputs]:
        if value.shape is not None:
            value.shape = ir.Shape([1 if d == batch else d for d in value.shape])


def _as_int32(tape: ir.tape.Tape, value: ir.Value) -> ir.Value:
    return tape.op("Cast", [value], {"to": ir.DataType.INT32})


def _insert(graph: ir.Graph, before: ir.Node, tape: ir.tape.Tape, name: str) -> None:
    """Put what a tape recorded into the graph, with values named after `name`."""
    name_outputs(tape.nodes, name)
    add_initializers(graph, tape)
    graph.insert_before(before, tape.nodes)
