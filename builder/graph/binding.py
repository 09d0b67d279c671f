"""Graphs without weights: a small `.onnx`, and a JSON file that binds its initializers to checkpoint tensors.

Bound initializers are external tensors whose location is not a file, so saving and loading touch no weight.
Guarantees: the same inputs give the same bytes in both files.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401 – numpy learns the name bfloat16
import numpy as np
import onnx_ir as ir

from builder.quantization.blockwise import Blocks
from builder.quantization.packing import Part, part_shape
from builder.util.errors import WeightError

UNBOUND = "<unbound>"
# numpy's names of the types that initializers have, and ONNX's.
DATA_TYPES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "uint8": "UINT8"}


@dataclass(frozen=True)
class Binding:
    """How an initializer is made from checkpoint tensors: reshape, transpose, then cast or quantize.

    The same type serves as three keys: all fields identify an initializer, `content` identifies bytes that several
    graphs share, and `source` identifies the matrix that all parts of a quantized matrix come from.

    Example:
        A linear layer's weight, transposed for MatMul and cast to fp16:

        >>> binding = Binding("up.weight", "model.up.weight", "float16", (12, 4), transposed=True)
        >>> binding.stored_shape, binding.nbytes
        ((4, 12), 96)

    Args:
        initializer: its name in the graph.
        tensor: its name in the checkpoint.
        dtype: numpy's name of the initializer's type ("float32").
        shape: shape of the tensor, stacked with those in `below`, before it is transposed.
        below: further tensors, whose rows follow those of `tensor`.
        blocks: the quantization format; None where the tensor is only cast.
        part: the part of the quantized matrix that the initializer is.
        view: the initializer's shape in the graph, where an operator reads the same bytes in another shape.
    """

    initializer: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool = False
    below: tuple[str, ...] = ()
    blocks: Blocks | None = None
    part: Part | None = None
    view: tuple[int, ...] = ()

    @property
    def tensors(self) -> tuple[str, ...]:
        """All source tensors, in row order."""
        return (self.tensor, *self.below)

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The initializer's shape in the graph."""
        if self.view:
            return self.view
        if self.blocks is not None and self.part is not None:
            shape = part_shape(self.part, self.blocks, *self.shape)
            return self.shape[::-1] if self.transposed and self.part == "levels" else shape
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def content(self) -> Binding:
        """The binding without name and view: equal for initializers that have the same bytes."""
        return replace(self, initializer="", view=())

    @property
    def source(self) -> Binding:
        """The binding without what differs between the parts of one quantized matrix."""
        return replace(self.content, dtype="", part=None)

    @property
    def nbytes(self) -> int:
        """Size of the initializer in bytes."""
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize

    def with_axes_swapped(self) -> Binding:
        """The same tensor with its two axes swapped."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True)
class BoundGraph:
    """A model and the bindings of its initializers, by initializer name."""

    model: ir.Model
    bindings: Mapping[str, Binding]


def unbound(binding: Binding) -> ir.ExternalTensor:
    """A placeholder for the initializer's value: type and shape, no bytes."""
    return ir.ExternalTensor(
        UNBOUND,
        None,
        None,
        ir.DataType[DATA_TYPES[binding.dtype]],
        shape=ir.Shape(binding.stored_shape),
        name=binding.initializer,
    )


def bind(model: ir.Model, bindings: Iterable[Binding]) -> BoundGraph:
    """Replace the value of each bound initializer with a placeholder.

    Raises:
        WeightError: the graph has no such initializer, or its shape differs.
    """
    table = {binding.initializer: binding for binding in bindings}
    for name, binding in sorted(table.items()):
        value = model.graph.initializers.get(name)
        if value is None:
            raise WeightError(f"the graph has no initializer {name}", found=f"a binding to {binding.tensor}")
        if value.shape is not None and value.shape != binding.stored_shape:
            raise WeightError(
                f"initializer {name} does not have the shape of its binding to {binding.tensor}",
                expected=value.shape,
                found=ir.Shape(binding.stored_shape),
            )
        value.const_value = unbound(binding)
        value.shape, value.type = ir.Shape(binding.stored_shape), ir.TensorType(value.const_value.dtype)
    return BoundGraph(model, table)


def save(graph: BoundGraph, path: Path) -> None:
    """Write `path` and `path`.bindings.json, without the exporter's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _strip_metadata(graph.model)
    proto = ir.to_proto(graph.model)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    rows = [asdict(graph.bindings[name]) for name in sorted(graph.bindings)]
    bindings_file(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _strip_metadata(model: ir.Model) -> None:
    # The exporter puts absolute source paths on every node: the bytes would differ from folder to folder.
    model.metadata_props.clear()
    model.doc_string = model.producer_version = None
    for graph in (model.graph, *model.graph.subgraphs()):
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.doc_string = None
            node.metadata_props.clear()
        for value in (*graph.inputs, *graph.initializers.values(), *(out for node in graph for out in node.outputs)):
            value.doc_string = None
            value.metadata_props.clear()


def load(path: Path) -> BoundGraph:
    """Read what `save` wrote."""
    rows = json.loads(bindings_file(path).read_text(encoding="utf-8"))
    return bind(ir.load(path), [_binding(row) for row in rows])


def _binding(row: dict[str, Any]) -> Binding:
    lists = {name: tuple(row.get(name, ())) for name in ("shape", "below", "view")}
    return Binding(**{**row, **lists, "blocks": row.get("blocks") and Blocks(**row["blocks"])})


def bindings_file(path: Path) -> Path:
    """The bindings file of the graph at `path`."""
    return path.with_name(path.name + ".bindings.json")
