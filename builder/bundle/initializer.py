"""Read an initializer of a bundle's graph, in the graph or in its data file, without loading more than is used."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
from onnx import TensorProto, numpy_helper

COUNT = 2**20  # values in memory at a time
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Initializer:
    """An initializer, and the folder of its graph."""

    tensor: TensorProto
    folder: Path

    @property
    def packed(self) -> bool:
        """Whether a value takes less than a byte, as int4."""
        return ir.DataType(self.tensor.data_type).bitwidth < 8

    def array(self) -> Array:
        """Its values in its shape, mapped where they are in a data file; not for packed types."""
        kind: Any = ir.DataType(self.tensor.data_type).numpy()
        array: Array = self._bytes().view(kind).reshape(tuple(self.tensor.dims))
        return array

    def values(self) -> Iterator[npt.NDArray[np.float64]]:
        """Its values, `COUNT` at a time; not for packed types."""
        kind: Any = ir.DataType(self.tensor.data_type).numpy()
        for block in self._blocks():
            with np.errstate(all="ignore"):
                values = block.view(kind).astype(np.float64)
            yield values

    def digest(self) -> str:
        """SHA-256 of its bytes, in hex."""
        found = hashlib.sha256()
        for block in self._blocks():
            found.update(block.data)
        return found.hexdigest()

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        content, step = self._bytes(), max(1, COUNT * ir.DataType(self.tensor.data_type).bitwidth // 8)
        for begin in range(0, len(content), step):
            yield content[begin : begin + step]

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(numpy_helper.to_array(self.tensor).tobytes(), np.uint8)
        facts = {entry.key: entry.value for entry in self.tensor.external_data}
        length = -(-math.prod(self.tensor.dims) * ir.DataType(self.tensor.data_type).bitwidth // 8)
        if not length:  # nothing can be mapped
            return np.empty(0, np.uint8)
        return np.memmap(self.folder / facts["location"], np.uint8, "r", int(facts.get("offset", "0")), (length,))
