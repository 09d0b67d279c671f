"""Write ONNX graphs as Python expressions: each operator on a `Term` appends a node.

A number takes the element type of the term that it is combined with; there are no implicit casts, so that float64
stays float64. Guarantees: the same expressions give the same bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

IR_VERSION = 10  # of opset 21 and older


@dataclass(frozen=True)
class Formulas:
    """The nodes and initializers written so far."""

    tape: ir.tape.Tape = field(default_factory=ir.tape.Tape)
    constants: dict[tuple[str, tuple[int, ...], bytes], ir.Value] = field(default_factory=dict)

    def input(self, name: str, dtype: npt.DTypeLike, shape: tuple[int | str, ...]) -> Term:
        """Declare an input of the graph."""
        kind = np.dtype(dtype)
        return Term(self, ir.val(name, ir.DataType.from_numpy(kind), shape), kind)

    def constant(self, value: npt.ArrayLike, dtype: npt.DTypeLike) -> Term:
        """An initializer; equal values share it."""
        array = np.asarray(value, dtype, order="C")
        key = (array.dtype.name, array.shape, array.tobytes())
        if key not in self.constants:
            name = f"{array.dtype}_{array}" if array.ndim == 0 else f"constant_{len(self.constants)}"
            self.constants[key] = self.tape.initializer(ir.tensor(array, name=name))
        return Term(self, self.constants[key], array.dtype)

    def model(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], opset: int) -> ir.Model:
        """Build a model of all nodes and initializers."""
        nodes, initializers = self.tape.nodes, self.tape.initializers
        graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": opset}, name=name)
        return ir.Model(graph, ir_version=IR_VERSION)


@dataclass(frozen=True, eq=False)
class Term:
    """A value of a graph, and its element type."""

    formulas: Formulas
    value: ir.Value
    dtype: np.dtype[Any]

    def op(self, kind: str, *others: Term | float, dtype: npt.DTypeLike | None = None, **attributes: Any) -> Term:
        """Append a node that reads this value, then the others.

        Args:
            kind: operator type.
            others: further inputs.
            dtype: element type of the output; None for that of this value.
            attributes: attributes of the node.
        """
        inputs = [self.value, *(self._like(other).value for other in others)]
        output = self.formulas.tape.op(kind, inputs, attributes)
        return Term(self.formulas, output, self.dtype if dtype is None else np.dtype(dtype))

    def _like(self, other: Term | float) -> Term:
        return other if isinstance(other, Term) else self.formulas.constant(other, self.dtype)

    def output(self, name: str, shape: tuple[int | str, ...]) -> ir.Value:
        """Name the value as an output of the graph."""
        self.value.name, self.value.shape = name, ir.Shape(shape)
        self.value.type = ir.TensorType(ir.DataType.from_numpy(self.dtype))
        return self.value

    def to(self, dtype: npt.DTypeLike) -> Term:
        """Cast to another type; casts to integers truncate."""
        return self.op("Cast", dtype=dtype, to=int(ir.DataType.from_numpy(np.dtype(dtype))))

    def __add__(self, other: Term | float) -> Term:
        return self.op("Add", other)

    def __sub__(self, other: Term | float) -> Term:
        return self.op("Sub", other)

    def __mul__(self, other: Term | float) -> Term:
        return self.op("Mul", other)

    def __truediv__(self, other: Term | float) -> Term:
        return self.op("Div", other)

    def __rtruediv__(self, other: float) -> Term:
        return self._like(other) / self

    def __lt__(self, other: Term | float) -> Term:
        return self.op("Less", other, dtype=np.bool_)

    def __gt__(self, other: Term | float) -> Term:
        return self.op("Greater", other, dtype=np.bool_)

    def where(self, yes: Term, no: Term | float) -> Term:
        """`yes` where this value is true, `no` elsewhere."""
        return self.op("Where", yes, yes._like(no), dtype=yes.dtype)

    def reshape(self, *sizes: Term | int) -> Term:
        """Reshape; each size is a number or a scalar of the graph, -1 is inferred."""
        numbers = [size for size in sizes if isinstance(size, int)]
        if len(numbers) == len(sizes):
            return self.op("Reshape", self.formulas.constant(numbers, np.int64))
        one = self.formulas.constant([1], np.int64)
        vectors = (
            size.op("Reshape", one) if isinstance(size, Term) else self.formulas.constant([size], np.int64)
            for size in sizes
        )
        return self.op("Reshape", stacked(*vectors))

    def transpose(self, *order: int) -> Term:
        """Reorder the axes."""
        return self.op("Transpose", perm=order)

    def gather(self, index: Term | int, axis: int = 0) -> Term:
        """Entries at these indices; a number removes the axis."""
        at = index if isinstance(index, Term) else self.formulas.constant(index, np.int64)
        return self.op("Gather", at, axis=axis)

    def expanded(self, axis: int) -> Term:
        """Insert an axis of size 1."""
        return self.op("Unsqueeze", self.formulas.constant([axis], np.int64))


def counted(size: Term) -> Term:
    """0, 1, …, size - 1."""
    zero, one = (size.formulas.constant(number, size.dtype) for number in (0, 1))
    return zero.op("Range", size, one)


def stacked(*vectors: Term) -> Term:
    """Concatenate vectors."""
    return vectors[0].op("Concat", *vectors[1:], axis=0)


def computes_float64(number: Term) -> Term:
    """Whether the runtime has real float64 arithmetic; OpenVINO computes in float32, where the added 1 is lost.

    Factors close to 1 would not do as a test: optimizers round them to 1.

    Args:
        number: an integer from 1 to 2**27, as float64.
    """
    large = number * 2.0**25
    return large + 1.0 > large
