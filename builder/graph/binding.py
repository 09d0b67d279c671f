"""A graph without weights: a small `.onnx` and beside it the bindings of its initializers.

In and out: onnx-ir models whose bound initializers are external tensors that point nowhere, and `Binding`s that say
which checkpoint tensor fills each and how. Guaranteed: saving and loading reads and writes no weight byte; a bound
initializer cannot be mistaken for a filled one (its location is not a file); the text of both files is the same for
the same inputs.
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
    """initializer ← checkpoint tensor, reshaped to `shape` ([] keeps it), transposed, cast to `dtype` or quantized.

    One type for three keys, as they differ by blanks only: all of it names an initializer; `content` the bytes, which
    initializers of several graphs share; `source` the matrix that the parts of a quantized one are made of together.

    Args:
        tensor: of the checkpoint.
        dtype: numpy's name of the initializer's type ("float32").
        shape: of the tensor (with those of `below`) before the transposition.
        below: further tensors, whose rows follow those of `tensor`.
        blocks: how the matrix is quantized; None where it is only cast.
        part: which part of the quantized matrix this is.
        view: the initializer's shape in the graph, where an operator reads the same bytes in another.
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
        """All that it is made of, in the order of its rows."""
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
        """The binding under no name and in no particular shape: equal where the bytes are."""
        return replace(self, initializer="", view=())

    @property
    def source(self) -> Binding:
        """What the parts of one quantized matrix have in common."""
        return replace(self.content, dtype="", part=None)

    @property
    def nbytes(self) -> int:
        """Bytes of the initializer."""
        return math.prod(self.stored_shape) * np.dtype(self.dtype).itemsize

    def with_axes_swapped(self) -> Binding:
        """The same tensor, its two axes swapped."""
        return replace(self, transposed=not self.transposed)


@dataclass(frozen=True)
class BoundGraph:
    """A model and the bindings of its initializers, by initializer name."""

    model: ir.Model
    bindings: Mapping[str, Binding]


def unbound(binding: Binding) -> ir.ExternalTensor:
    """A stand-in for the initializer's value: type and shape, no bytes."""
    return ir.ExternalTensor(
        UNBOUND,
        None,
        None,
        ir.DataType[DATA_TYPES[binding.dtype]],
        shape=ir.Shape(binding.stored_shape),
        name=binding.initializer,
    )


def bind(model: ir.Model, bindings: Iterable[Binding]) -> BoundGraph:
    """Puts a stand-in in the place of each bound initializer.

    Raises:
        WeightError: the graph has no such initializer, or one of another shape.
    """
    table = {binding.initializer: binding for binding in bindings}
    for name, binding in sorted(table.items()):
        value = model.graph.initializers.get(name)
        if value is None:
            raise WeightError(f"the graph has no initializer {name}", found=f"a binding to {binding.tensor}")
        if value.shape is not None and value.shape != binding.stored_shape:
            raise WeightError(
                f"initializer {name} is not of the shape of its binding to {binding.tensor}",
                expected=value.shape,
                found=ir.Shape(binding.stored_shape),
            )
        value.const_value = unbound(binding)
        value.shape, value.type = ir.Shape(binding.stored_shape), ir.TensorType(value.const_value.dtype)
    return BoundGraph(model, table)


def save(graph: BoundGraph, path: Path) -> None:
    """Writes `path` and `path`.bindings.json, without the exporter's metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _strip_metadata(graph.model)
    proto = ir.to_proto(graph.model)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    rows = [asdict(graph.bindings[name]) for name in sorted(graph.bindings)]
    bindings_file(path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _strip_metadata(model: ir.Model) -> None:
    """The exporter notes absolute source paths on every node: the bytes would differ by folder."""
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
    """The pair that `save` wrote."""
    rows = json.loads(bindings_file(path).read_text(encoding="utf-8"))
    return bind(ir.load(path), [_binding(row) for row in rows])


def _binding(row: dict[str, Any]) -> Binding:
    lists = {name: tuple(row.get(name, ())) for name in ("shape", "below", "view")}
    return Binding(**{**row, **lists, "blocks": row.get("blocks") and Blocks(**row["blocks"])})


def bindings_file(path: Path) -> Path:
    """Where the bindings of the graph at `path` lie."""
    return path.with_name(path.name + ".bindings.json")
