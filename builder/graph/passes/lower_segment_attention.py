"""qwen3vl::SegmentAttention → a Loop over segments (fused) or over blocks of query rows (eager).

Inputs: query, key, value [patches, hidden], and each patch's segment_begin and segment_end [patches]. Fused: a
com.microsoft::MultiHeadAttention for each segment, without patches² memory. Eager: standard operators, `BLOCK` query
rows at a time against the keys of their segment, that is heads · BLOCK · segment scores. Neither has a mask; segments
may be any number, of any lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from builder.graph.binding import BoundGraph
from builder.graph.passes.result import PassResult

BLOCK = 256  # rows: 16 heads × 256 × 16,384 patches are 268 MB of scores
DOMAIN, OPERATOR = "qwen3vl", "SegmentAttention"


def lower_segment_attention(graph: BoundGraph, *, fused: bool, block: int = BLOCK) -> PassResult:
    """Lower every SegmentAttention.

    Args:
        graph: graph with SegmentAttention operators.
        fused: whether to use com.microsoft::MultiHeadAttention.
        block: query rows at a time if not fused.
    """
    model = graph.model
    nodes = [node for node in model.graph if (node.domain, node.op_type) == (DOMAIN, OPERATOR)]
    for index, node in enumerate(nodes):
        lowered = _Lowering(node, f"segments_{index}", fused, block)
        output = lowered.emit()
        old = node.outputs[0]
        output.shape, output.type, output.name = old.shape, old.type, old.name
        model.graph.insert_before(node, lowered.outer.nodes)
        old.replace_all_uses_with(output, replace_graph_outputs=True)
        model.graph.remove(node, safe=True)
    model.graph.opset_imports.pop(DOMAIN, None)
    if fused and nodes:
        model.graph.opset_imports.setdefault("com.microsoft", 1)
    return PassResult(graph, len(nodes))


class _Lowering:
    """The nodes that replace a SegmentAttention: `outer` runs once, `body` once per segment or block."""

    def __init__(self, node: ir.Node, prefix: str, fused: bool, block: int) -> None:
        self.prefix, self.fused, self.block = prefix, fused, block
        self.query, self.key, self.value, self.begin, self.end = (value for value in node.inputs if value is not None)
        self.heads = node.attributes.get_int("num_heads", 0)
        self.scale = node.attributes.get_float("scale", 0.0)
        self.dtype = self.query.dtype or ir.DataType.FLOAT
        assert self.query.shape is not None
        hidden = self.query.shape[1]
        assert isinstance(hidden, int)
        self.hidden = hidden
        self.outer, self.body = Tape(), Tape()

    def emit(self) -> ir.Value:
        """The Loop's second output: the attention's output, [patches, hidden]."""
        zero = _constant(self.outer, [0])
        patches = self.outer.op("Shape", [self.query], {"start": 0, "end": 1})
        # Not a constant: OpenVINO fails on a loop whose initial value is a constant without rows.
        empty = self.outer.op("Slice", [self.query, zero, zero, zero])
        more = self.outer.op("Squeeze", [self.outer.op("Less", [zero, patches])])
        if not self.fused:
            self._split_heads()
        body = self._body(patches)
        outputs = self.outer.op_multi_out(
            "Loop", [None, more, zero, empty], {"body": body}, num_outputs=2, name=f"{self.prefix}_loop"
        )
        return outputs[1]

    def _body(self, patches: ir.Value) -> ir.Graph:
        start = _value("start", ir.DataType.INT64, [1], self.prefix)
        done = _value("done", self.dtype, [None, self.hidden], self.prefix)
        iteration, keep_on = (
            _value("iteration", ir.DataType.INT64, [], self.prefix),
            _value("keep_on", ir.DataType.BOOL, [], self.prefix),
        )
        stop, out = self._segment(start) if self.fused else self._rows(start)
        grown = self.body.op("Concat", [done, out], {"axis": 0})
        more = self.body.op("Squeeze", [self.body.op("Less", [stop, patches])])
        graph = ir.Graph(
            [iteration, keep_on, start, done],
            [more, stop, grown],
            nodes=self.body.nodes,
            name=f"{self.prefix}_body",
        )
        for value, like in ((stop, start), (grown, done), (more, keep_on)):
            value.shape, value.type = like.shape, like.type
        for index, node in enumerate(self.body.nodes):
            for value in node.outputs:
                value.name = f"{self.prefix}_body_{index}"
        return graph

    def _segment(self, start: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The full segment that begins at `start`."""
        tape = self.body
        stop = tape.op("Gather", [self.end, start])
        axes, batch = _constant(tape, [0]), _constant(tape, [0])
        parts = [
            tape.op("Unsqueeze", [tape.op("Slice", [value, start, stop, axes]), batch])
            for value in (self.query, self.key, self.value)
        ]
        attributes = {"num_heads": self.heads, "scale": self.scale}
        out = tape.op("MultiHeadAttention", parts, attributes, domain="com.microsoft")
        return stop, tape.op("Squeeze", [out, batch])

    def _split_heads(self) -> None:
        """query · scale and value [heads, patches, head_dim], key [heads, head_dim, patches], once per layer."""
        tape, shape = self.outer, [0, self.heads, self.hidden // self.heads]
        split = _constant(tape, shape)
        query, key, value = (tape.op("Reshape", [x, split]) for x in (self.query, self.key, self.value))
        scale = _constant(tape, np.asarray(self.scale, self.dtype.numpy()))
        self.query = tape.op("Mul", [tape.op("Transpose", [query], {"perm": [1, 0, 2]}), scale])
        self.key = tape.op("Transpose", [key], {"perm": [1, 2, 0]})
        self.value = tape.op("Transpose", [value], {"perm": [1, 0, 2]})

    def _rows(self, start: ir.Value) -> tuple[ir.Value, ir.Value]:
        """At most `block` rows from `start`, within their segment."""
        tape = self.body
        begin, end = tape.op("Gather", [self.begin, start]), tape.op("Gather", [self.end, start])
        stop = tape.op("Min", [tape.op("Add", [start, _constant(tape, [self.block])]), end])
        one, two = _constant(tape, [1]), _constant(tape, [2])
        query = tape.op("Slice", [self.query, start, stop, one])
        key = tape.op("Slice", [self.key, begin, end, two])
        value = tape.op("Slice", [self.value, begin, end, one])
        weights = tape.op("Softmax", [tape.op("MatMul", [query, key])], {"axis": -1})
        rows = tape.op("Transpose", [tape.op("MatMul", [weights, value])], {"perm": [1, 0, 2]})
        return stop, tape.op("Reshape", [rows, _constant(tape, [-1, self.hidden])])


def _constant(tape: Tape, value: Sequence[int] | np.ndarray) -> ir.Value:
    array = value if isinstance(value, np.ndarray) else np.asarray(value, np.int64)
    return tape.op("Constant", [], {"value": ir.tensor(array)})


def _value(name: str, dtype: ir.DataType, shape: Sequence[int | None], prefix: str) -> ir.Value:
    return ir.Value(name=f"{prefix}_{name}", type=ir.TensorType(dtype), shape=ir.Shape(shape))
