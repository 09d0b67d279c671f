"""Matrices that a recipe's rules name → com.microsoft::MatMulNBits, ::DynamicQuantizeMatMul, ::GatherBlockQuantized.

Matmuls of the same input with matrices of the same format are merged, and the output is split (q, k and v; gate and
up). A matrix that is named by a rule but read in any other way is a miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from builder.graph.binding import Binding, BoundGraph, unbound
from builder.graph.passes.result import PassResult
from builder.graph.ports import CONTRIB
from builder.quantization.packing import lookup_shape, parts
from builder.quantization.rules import WeightFormat


@dataclass(frozen=True)
class Matmul:
    """input · matrixᵀ (+ bias): `weight` is the initializer to be replaced."""

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    weight_format: WeightFormat


def quantize_weights(
    graph: BoundGraph, weight_formats: Mapping[str, WeightFormat], scales: str = "float32"
) -> PassResult:
    """Replace matmuls and lookups by their quantized operators; `matches` counts the matrices.

    Args:
        graph: graph whose matrices are bound to the checkpoint's.
        weight_formats: checkpoint tensor → its format.
        scales: numpy's name of the type of scales, that of the activations.
    """
    rewriter = _Rewriter(graph, scales)
    matmuls, misses, matches = [], [], 0
    for node in list(graph.model.graph):
        for value in node.inputs:
            name = "" if value is None else str(value.name)
            weight_format = weight_formats.get(graph.bindings[name].tensor) if name in graph.bindings else None
            if weight_format is None or value is None or len(graph.bindings[name].shape) != 2:
                continue
            transposed = graph.bindings[name].transposed
            if node.op_type == "Gather" and node.inputs[0] is value and not transposed and not weight_format.transposed:
                rewriter.look_up(node, value, weight_format)
                matches += 1
            elif (matmul := _matmul(node, value, weight_format, transposed)) is not None:
                matmuls.append(matmul)
            else:
                misses.append(f"{node.name}: reads {name} in a way that no operator for quantized matrices does")
    for group in _mergeable(matmuls):
        rewriter.multiply(group)
        matches += len(group)
    return PassResult(rewriter.bound(), matches, tuple(misses))


def _matmul(node: ir.Node, weight: ir.Value, weight_format: WeightFormat, transposed: bool) -> Matmul | None:
    x = node.inputs[0]
    if x is None or len(node.inputs) < 2 or weight is not node.inputs[1]:
        return None
    if node.op_type == "MatMul" and transposed:  # builder/graph/passes/fold_weight_transposes.py has transposed it
        return Matmul(node, x, weight, None, weight_format)
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != int(transposed) and plain:
        return Matmul(node, x, weight, node.inputs[2] if len(node.inputs) > 2 else None, weight_format)
    return None


def _mergeable(matmuls: Iterable[Matmul]) -> list[list[Matmul]]:
    """Group matmuls of the same input and format that have no bias; each other matmul is a group of its own."""
    groups: dict[tuple[object, ...], list[Matmul]] = {}
    for number, matmul in enumerate(matmuls):
        key = (matmul.input, matmul.weight_format) if matmul.bias is None else (number,)
        groups.setdefault(key, []).append(matmul)
    return list(groups.values())


class _Rewriter:
    """The graph, its bindings, and the parts made so far: two nodes may read the same matrix."""

    def __init__(self, graph: BoundGraph, scales: str) -> None:
        self.model, self.bindings, self.scales = graph.model, dict(graph.bindings), scales
        self.made: dict[Binding, ir.Value] = {}

    def bound(self) -> BoundGraph:
        """The graph without initializers that no node reads any more."""
        initializers = self.model.graph.initializers
        for name in [name for name in self.bindings if name in initializers and not initializers[name].uses()]:
            del initializers[name], self.bindings[name]
        self.model.graph.opset_imports.setdefault(CONTRIB, 1)
        return BoundGraph(self.model, self.bindings)

    def multiply(self, group: Sequence[Matmul]) -> None:
        """Replace the matmuls of a group by a single node."""
        first, weight_format = group[0], group[0].weight_format
        sources = [self.bindings[str(matmul.weight.name)] for matmul in group]
        # A weight that is bound transposed is [out, in] in the checkpoint, as the operator expects it.
        rows = [source.shape[0] for source in sources]
        matrix = replace(
            sources[0],
            initializer=_joined([source.initializer for source in sources]),
            shape=(sum(rows), sources[0].shape[1]),
            transposed=weight_format.transposed,
            below=tuple(source.tensor for source in sources[1:]),
        )
        node = (self._integers if weight_format.transposed else self._blockwise)(first, matrix)
        self.model.graph.insert_before(first.node, node)
        outputs = [node.outputs[0]] if len(group) == 1 else self._split(first.node, node.outputs[0], rows)
        for matmul, output in zip(group, outputs, strict=True):
            old = matmul.node.outputs[0]
            output.shape, output.type, output.name = old.shape, old.type, old.name
            old.replace_all_uses_with(output, replace_graph_outputs=True)
            self.model.graph.remove(matmul.node, safe=True)
        if len(group) > 1:
            node.outputs[0].type = outputs[0].type

    def _blockwise(self, matmul: Matmul, matrix: Binding) -> ir.Node:
        weight_format = matmul.weight_format
        # The node's current input, as `matmul.input` may have been replaced by another matmul's output.
        inputs: list[ir.Value | None] = [matmul.node.inputs[0], *self._parts(matrix, weight_format, lookup=False)]
        if matmul.bias is not None:
            inputs += [None] * (5 - len(inputs)) + [matmul.bias]
        attributes = {
            "K": matrix.shape[1],
            "N": matrix.shape[0],
            "bits": weight_format.blocks.bits,
            "block_size": weight_format.blocks.size,
            "accuracy_level": weight_format.accuracy,
        }
        return ir.node("MatMulNBits", inputs=inputs, attributes=attributes, domain=CONTRIB)

    def _integers(self, matmul: Matmul, matrix: Binding) -> ir.Node:
        codes, scales = self._parts(matrix, matmul.weight_format, lookup=False)
        middle = ir.tensor(np.array(matmul.weight_format.blocks.middle, np.uint8))
        zero = ir.node("Constant", inputs=[], attributes={"value": middle})
        self.model.graph.insert_before(matmul.node, zero)
        inputs = [matmul.node.inputs[0], codes, scales, zero.outputs[0]]
        if matmul.bias is not None:
            inputs.append(matmul.bias)
        return ir.node("DynamicQuantizeMatMul", inputs=inputs, domain=CONTRIB)

    def look_up(self, node: ir.Node, table: ir.Value, weight_format: WeightFormat) -> None:
        """Replace a Gather over rows by a GatherBlockQuantized."""
        values = self._parts(self.bindings[str(table.name)], weight_format, lookup=True)
        new = ir.node(
            "GatherBlockQuantized",
            inputs=[values[0], node.inputs[1], *values[1:]],
            attributes={
                "bits": weight_format.blocks.bits,
                "block_size": weight_format.blocks.size,
                "gather_axis": 0,
                "quantize_axis": 1,
            },
            domain=CONTRIB,
        )
        old, out = node.outputs[0], new.outputs[0]
        out.shape, out.type, out.name = old.shape, old.type, old.name
        self.model.graph.insert_before(node, new)
        old.replace_all_uses_with(out, replace_graph_outputs=True)
        self.model.graph.remove(node, safe=True)

    def _parts(self, source: Binding, weight_format: WeightFormat, *, lookup: bool) -> list[ir.Value]:
        rows, columns = source.shape
        values = []
        for part in parts(weight_format.blocks):
            dtype = self.scales if part == "scales" else "uint8"
            view = lookup_shape(part, weight_format.blocks, rows, columns) if lookup and part == "levels" else ()
            view = (rows,) if weight_format.transposed and part == "scales" else view
            name = f"{source.initializer}.{part}"
            binding = replace(source, initializer=name, dtype=dtype, blocks=weight_format.blocks, part=part, view=view)
            if binding not in self.made:
                value = ir.Value(name=name, const_value=unbound(binding))
                value.shape, value.type = ir.Shape(binding.stored_shape), ir.TensorType(unbound(binding).dtype)
                self.model.graph.initializers[name] = value
                self.bindings[name] = binding
                self.made[binding] = value
            values.append(self.made[binding])
        return values

    def _split(self, before: ir.Node, value: ir.Value, rows: Sequence[int]) -> Sequence[ir.Value]:
        sizes = ir.node("Constant", inputs=[], attributes={"value": ir.tensor(np.array(rows, np.int64))})
        split = ir.node("Split", inputs=[value, sizes.outputs[0]], attributes={"axis": -1}, num_outputs=len(rows))
        self.model.graph.insert_before(before, [sizes, split])
        return split.outputs


def _joined(names: Sequence[str]) -> str:
    """`….q_proj.weight`, `….k_proj.weight` → `….q_proj+k_proj.weight`."""
    if len(names) == 1:
        return names[0]
    parts = [name.split(".") for name in names]
    return ".".join([*parts[0][:-2], "+".join(path[-2] for path in parts), parts[0][-1]])
