"""Matrices that a recipe's rules name → com.microsoft::MatMulNBits, ::DynamicQuantizeMatMul, ::GatherBlockQuantized.

In: a graph whose matrices are bound to the checkpoint's, and how each is to be stored. Out: the same matmuls and
lookups on quantized matrices, their parts bound. Guaranteed: matmuls of one input with matrices of one format become
one matmul, whose output is split (q, k and v; gate and up); a matrix that is named and read in any other way is a
miss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from builder.graph.binding import Binding, BoundGraph, unbound
from builder.graph.passes.result import Outcome
from builder.graph.ports import CONTRIB
from builder.quantization.packing import lookup_shape, parts
from builder.quantization.rules import WeightFormat


@dataclass(frozen=True)
class Matmul:
    """input · matrixᵀ (+ bias): `weight` is the matrix's initializer, as the graph has it now."""

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    storage: WeightFormat


def quantize_weights(graph: BoundGraph, storages: Mapping[str, WeightFormat], scales: str = "float32") -> Outcome:
    """Counts the matrices quantized.

    Args:
        storages: checkpoint tensor → how it is stored.
        scales: numpy's name of the type of scales, that of the activations.
    """
    rewriter = _Rewriter(graph, scales)
    matmuls, misses, matches = [], [], 0
    for node in list(graph.model.graph):
        for value in node.inputs:
            name = "" if value is None else str(value.name)
            storage = storages.get(graph.bindings[name].tensor) if name in graph.bindings else None
            if storage is None or value is None or len(graph.bindings[name].shape) != 2:
                continue
            transposed = graph.bindings[name].transposed
            if node.op_type == "Gather" and node.inputs[0] is value and not transposed and not storage.transposed:
                rewriter.look_up(node, value, storage)
                matches += 1
            elif (matmul := _matmul(node, value, storage, transposed)) is not None:
                matmuls.append(matmul)
            else:
                misses.append(f"{node.name}: reads {name} in a way that no operator for quantized matrices does")
    for group in _side_by_side(matmuls):
        rewriter.multiply(group)
        matches += len(group)
    return Outcome(rewriter.bound(), matches, tuple(misses))


def _matmul(node: ir.Node, weight: ir.Value, storage: WeightFormat, transposed: bool) -> Matmul | None:
    x = node.inputs[0]
    if x is None or len(node.inputs) < 2 or weight is not node.inputs[1]:
        return None
    if node.op_type == "MatMul" and transposed:  # builder/graph/passes/fold_weight_transposes.py has transposed it
        return Matmul(node, x, weight, None, storage)
    plain = node.attributes.get_float("alpha", 1.0) == 1.0 and node.attributes.get_float("beta", 1.0) == 1.0
    if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) != int(transposed) and plain:
        return Matmul(node, x, weight, node.inputs[2] if len(node.inputs) > 2 else None, storage)
    return None


def _side_by_side(matmuls: Iterable[Matmul]) -> list[list[Matmul]]:
    """Matmuls of one input, without bias and of one format, together; all others alone."""
    groups: dict[tuple[object, ...], list[Matmul]] = {}
    for number, one in enumerate(matmuls):
        key = (one.input, one.storage) if one.bias is None else (number,)
        groups.setdefault(key, []).append(one)
    return list(groups.values())


class _Rewriter:
    """The graph that is changed, its bindings, and the parts that are there already (two nodes may read one matrix)."""

    def __init__(self, graph: BoundGraph, scales: str) -> None:
        self.model, self.bindings, self.scales = graph.model, dict(graph.bindings), scales
        self.made: dict[Binding, ir.Value] = {}

    def bound(self) -> BoundGraph:
        """Without what nothing reads any more."""
        initializers = self.model.graph.initializers
        for name in [name for name in self.bindings if name in initializers and not initializers[name].uses()]:
            del initializers[name], self.bindings[name]
        self.model.graph.opset_imports.setdefault(CONTRIB, 1)
        return BoundGraph(self.model, self.bindings)

    def multiply(self, group: Sequence[Matmul]) -> None:
        """One node for all of them."""
        first, storage = group[0], group[0].storage
        sources = [self.bindings[str(one.weight.name)] for one in group]
        # What is bound transposed is [out, in] in the checkpoint, which is how the operator wants it.
        rows = [one.shape[0] for one in sources]
        whole = replace(
            sources[0],
            initializer=_joined([one.initializer for one in sources]),
            shape=(sum(rows), sources[0].shape[1]),
            transposed=storage.transposed,
            below=tuple(one.tensor for one in sources[1:]),
        )
        node = (self._integers if storage.transposed else self._blockwise)(first, whole)
        self.model.graph.insert_before(first.node, node)
        outputs = [node.outputs[0]] if len(group) == 1 else self._split(first.node, node.outputs[0], rows)
        for one, output in zip(group, outputs, strict=True):
            old = one.node.outputs[0]
            output.shape, output.type, output.name = old.shape, old.type, old.name
            old.replace_all_uses_with(output, replace_graph_outputs=True)
            self.model.graph.remove(one.node, safe=True)
        if len(group) > 1:
            node.outputs[0].type = outputs[0].type

    def _blockwise(self, matmul: Matmul, matrix: Binding) -> ir.Node:
        storage = matmul.storage
        # The node's own: what it reads may be another matmul's output by now.
        inputs: list[ir.Value | None] = [matmul.node.inputs[0], *self._parts(matrix, storage, lookup=False)]
        if matmul.bias is not None:
            inputs += [None] * (5 - len(inputs)) + [matmul.bias]
        attributes = {
            "K": matrix.shape[1],
            "N": matrix.shape[0],
            "bits": storage.blocks.bits,
            "block_size": storage.blocks.size,
            "accuracy_level": storage.accuracy,
        }
        return ir.node("MatMulNBits", inputs=inputs, attributes=attributes, domain=CONTRIB)

    def _integers(self, matmul: Matmul, matrix: Binding) -> ir.Node:
        codes, scales = self._parts(matrix, matmul.storage, lookup=False)
        middle = ir.tensor(np.array(matmul.storage.blocks.middle, np.uint8))
        zero = ir.node("Constant", inputs=[], attributes={"value": middle})
        self.model.graph.insert_before(matmul.node, zero)
        inputs = [matmul.node.inputs[0], codes, scales, zero.outputs[0]]
        if matmul.bias is not None:
            inputs.append(matmul.bias)
        return ir.node("DynamicQuantizeMatMul", inputs=inputs, domain=CONTRIB)

    def look_up(self, node: ir.Node, table: ir.Value, storage: WeightFormat) -> None:
        """GatherBlockQuantized in the place of a Gather over rows."""
        values = self._parts(self.bindings[str(table.name)], storage, lookup=True)
        new = ir.node(
            "GatherBlockQuantized",
            inputs=[values[0], node.inputs[1], *values[1:]],
            attributes={
                "bits": storage.blocks.bits,
                "block_size": storage.blocks.size,
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

    def _parts(self, source: Binding, storage: WeightFormat, *, lookup: bool) -> list[ir.Value]:
        rows, columns = source.shape
        values = []
        for part in parts(storage.blocks):
            dtype = self.scales if part == "scales" else "uint8"
            view = lookup_shape(part, storage.blocks, rows, columns) if lookup and part == "levels" else ()
            view = (rows,) if storage.transposed and part == "scales" else view
            name = f"{source.initializer}.{part}"
            binding = replace(source, initializer=name, dtype=dtype, blocks=storage.blocks, part=part, view=view)
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
    return ".".join([*parts[0][:-2], "+".join(one[-2] for one in parts), parts[0][-1]])
