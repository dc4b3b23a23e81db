"""Casts to float32 what a filled graph stores in 16 bits and computes with in 32.

    Gather(table, ids)    → Cast(Gather(table, ids)): only the rows that are asked for are cast
    any other use of X    → Cast(X), which ONNX Runtime computes once, when it loads the graph

Both float16 and bfloat16 are subsets of float32, so that every result stays what it was.

ONNX Runtime computes nothing when it loads a graph that would take more than 1 GiB
(optimization.constant_folding_max_output_size_in_bytes, since 1.27). It would cast a larger output
matrix again for every token. Such a matrix is multiplied in pieces, each by some of its rows:

    FusedMatMul(x, X)    → Concat(FusedMatMul(x, Cast(Slice(X, rows))) for all rows)

The file holds the matrix in one piece all the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from vlmq_export.formats.onnx.graphs.edit import add_constant, constant_of, name_of, shape_of

FOLDED_BYTES = 2**30  # the most that ONNX Runtime computes in one step when it loads a graph
_SHORT = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TAKES_ROWS = ("Gather", "Slice")  # operators that take some rows of their first input
_MULTIPLE = 64  # of rows in a piece, so that no block of the kernel is cut


def widen(model: ir.Model, limit: int = FOLDED_BYTES) -> None:
    """Rewrite a filled graph in place. It is the last pass: those before look for initializers.

    limit: bytes in float32 up to which a matrix is multiplied in one piece.
    """
    graph = model.graph
    for product in [n for n in graph if n.op_type in ("MatMul", "FusedMatMul")]:
        matrix = _computed_matrix(product)
        if matrix is not None and 4 * int(np.prod(shape_of(matrix))) > limit:
            _multiply_in_pieces(graph, product, matrix, limit)
    for value in list(graph.initializers.values()):
        stored = constant_of(value).dtype
        if stored not in _SHORT or value.dtype != ir.DataType.FLOAT:
            continue
        value.type = ir.TensorType(stored)
        uses = [(use.node, use.idx) for use in value.uses()]
        rows = [(node, i) for node, i in uses if node.op_type in _TAKES_ROWS and i == 0]
        for node, _ in rows:
            _cast_rows(graph, node, stored)
        if whole := [use for use in uses if use not in rows]:
            _cast_whole(graph, value, whole)


# -- casts -------------------------------------------------------------------------------------


def _cast(value: ir.Value) -> ir.Node:
    """A Cast of `value` to float32."""
    node = ir.Node("", "Cast", [value], [ir.AttrInt64("to", ir.DataType.FLOAT)])
    cast = node.outputs[0]
    cast.name, cast.shape = f"{name_of(value)}.float32", value.shape
    cast.type = ir.TensorType(ir.DataType.FLOAT)
    return node


def _cast_rows(graph: ir.Graph, taking: ir.Node, stored: ir.DataType) -> None:
    """Cast what a node takes from a table that is `stored` in 16 bits."""
    rows = taking.outputs[0]
    assert not rows.is_graph_output(), "features are put among the rows of a table"
    uses, node = list(rows.uses()), _cast(rows)
    for use in uses:
        use.node.replace_input_with(use.idx, node.outputs[0])
    rows.type = ir.TensorType(stored)
    graph.insert_after(taking, node)


def _cast_whole(graph: ir.Graph, value: ir.Value, uses: list[tuple[ir.Node, int]]) -> None:
    """Cast a constant before all nodes that use it. `uses`: a node, and which of its inputs."""
    cast = _cast(value)
    for node, i in uses:
        node.replace_input_with(i, cast.outputs[0])
    graph.insert_before(graph[0], cast)


# -- pieces ------------------------------------------------------------------------------------


def _computed_matrix(product: ir.Node) -> ir.Value | None:
    """The initializer [out, in] by which a node multiplies, if it is cast or turned before.

    ONNX Runtime's kernels for the CPU also cast float16 matrices of float16 graphs.
    """
    turn = _turn(product)
    matrix = product.inputs[1] if turn is None else turn.inputs[0]
    if matrix is None or not matrix.is_initializer():
        return None
    cast = product.op_type == "FusedMatMul" and constant_of(matrix).dtype in _SHORT
    return matrix if cast or turn is not None else None


def _turn(product: ir.Node) -> ir.Node | None:
    """The Transpose that gives the second factor of a product, if there is one."""
    factor = product.inputs[1]
    node = None if factor is None else factor.producer()
    return node if node is not None and node.op_type == "Transpose" else None


def _multiply_in_pieces(graph: ir.Graph, product: ir.Node, matrix: ir.Value, limit: int) -> None:
    """Put a product for some rows of the matrix at a time, and a Concat, in place of a product."""
    turn, nodes, products = _turn(product), [], []
    for rows in _pieces(graph, matrix, limit):
        nodes.append(rows)
        factor = rows.outputs[0]
        if turn is not None:
            nodes.append(_copy(turn, [factor], f"{factor.name}.turned"))
            factor = nodes[-1].outputs[0]
        nodes.append(_copy(product, [product.inputs[0], factor], f"{rows.outputs[0].name}.product"))
        products.append(nodes[-1].outputs[0])
    joined = ir.Node("", "Concat", products, [ir.AttrInt64("axis", -1)], name=product.name)
    replace, results = ir.convenience.replace_nodes_and_values, [product.outputs[0]]
    replace(graph, product, [product], [*nodes, joined], results, [joined.outputs[0]])
    if turn is not None and not turn.outputs[0].uses():
        graph.remove(turn, safe=True)


def _copy(node: ir.Node, inputs: Sequence[ir.Value | None], name: str) -> ir.Node:
    """The same node on other inputs, with a result of this name."""
    attributes = list(node.attributes.values())
    copy = ir.Node(node.domain, node.op_type, inputs, attributes, version=node.version)
    copy.outputs[0].name = name
    return copy


def _pieces(graph: ir.Graph, matrix: ir.Value, limit: int) -> Iterator[ir.Node]:
    """Slices of a matrix [out, in] by rows, of at most `limit` bytes in float32 each."""
    name, (count, columns) = name_of(matrix), shape_of(matrix)
    size = max(limit // (4 * columns) // _MULTIPLE, 1) * _MULTIPLE
    axis = add_constant(graph, f"{name}.axis", ir.Tensor(np.array([0])))
    for start in range(0, count, size):
        stop = min(start + size, count)
        bounds = [
            add_constant(graph, f"{name}.{word}_{start}", ir.Tensor(np.array([at])))
            for word, at in (("from", start), ("to", stop))
        ]
        node = ir.Node("", "Slice", [matrix, *bounds, axis])
        rows = node.outputs[0]
        rows.name, rows.shape = f"{name}.rows_{start}", ir.Shape((stop - start, columns))
        rows.type = ir.TensorType(matrix.dtype or ir.DataType.FLOAT)
        yield node
