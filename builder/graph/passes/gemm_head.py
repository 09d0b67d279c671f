"""MatMul(x, Transpose(head)) → Gemm(transB=1): the head stays [vocab, hidden], as in the checkpoint.

A transposed head could not be shared with the embeddings, whose rows are looked up, and would have to fit in memory to
be written. Gemm takes matrices only, so x is flattened before it, and the logits are reshaped after it.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from builder.checkpoint.tensors import EMBEDDINGS, LM_HEAD
from builder.graph.binding import BoundGraph
from builder.graph.passes.result import PassResult


def gemm_head(graph: BoundGraph) -> PassResult:
    """Rewrite MatMuls with a transposed head: a decoder has exactly one."""
    model, misses = graph.model, []
    heads = {name for name, binding in graph.bindings.items() if binding.tensor in (LM_HEAD, EMBEDDINGS)}
    matches = 0
    for node in [node for node in model.graph if node.op_type == "MatMul"]:
        transpose = node.inputs[1].producer() if node.inputs[1] is not None else None
        head = transpose.inputs[0] if transpose is not None and transpose.op_type == "Transpose" else None
        if transpose is None or head is None or head.name not in heads or not _plain(transpose):
            misses.append(f"{node.name}: no transposed head")
            continue
        _rewrite(model, node, head)
        if not transpose.outputs[0].uses():
            model.graph.remove(transpose, safe=True)
        matches += 1
    return PassResult(graph, matches, tuple(misses))


def _plain(transpose: ir.Node) -> bool:
    return list(transpose.attributes.get_ints("perm", [1, 0])) == [1, 0]


def _rewrite(model: ir.Model, node: ir.Node, head: ir.Value) -> None:
    hidden, logits, tape = node.inputs[0], node.outputs[0], Tape()
    assert hidden is not None
    assert head.shape is not None
    vocab, width = head.shape.numpy()
    rows = tape.op("Reshape", [hidden, _constant(tape, [-1, width])])
    flat = tape.op("Gemm", [rows, head], {"transB": 1})
    axes = tape.op("Shape", [hidden], {"start": 0, "end": -1})
    shape = tape.op("Concat", [axes, _constant(tape, [vocab])], {"axis": 0})
    shaped = tape.op("Reshape", [flat, shape])
    shaped.name, shaped.shape, shaped.type = logits.name, logits.shape, logits.type
    model.graph.insert_before(node, tape.nodes)
    logits.replace_all_uses_with(shaped, replace_graph_outputs=True)
    model.graph.remove(node, safe=True)


def _constant(tape: Tape, value: list[int]) -> ir.Value:
    return tape.op("Constant", [], {"value": ir.tensor(np.array(value, np.int64))})
