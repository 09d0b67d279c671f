"""Read an initializer of a bundle's graph, from the graph or its data file, in blocks of bounded memory."""

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

COUNT = 2**20  # values per block
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class Initializer:
    """An initializer, with the folder of its graph."""

    tensor: TensorProto
    folder: Path

    @property
    def packed(self) -> bool:
        """Whether a value takes less than a byte, as int4 does."""
        return ir.DataType(self.tensor.data_type).bitwidth < 8

    def array(self) -> Array:
        """Return the values in their shape, memory-mapped from a data file; not for packed types."""
        kind: Any = ir.DataType(self.tensor.data_type).numpy()
        array: Array = self._bytes().view(kind).reshape(tuple(self.tensor.dims))
        return array

    def values(self) -> Iterator[npt.NDArray[np.float64]]:
        """Yield the values in blocks of `COUNT`; not for packed types."""
        kind: Any = ir.DataType(self.tensor.data_type).numpy()
        for block in self._blocks():
            with np.errstate(all="ignore"):
                values = block.view(kind).astype(np.float64)
            yield values

    def digest(self) -> str:
        """Return SHA-256 of the bytes, in hex."""
        digest = hashlib.sha256()
        for block in self._blocks():
            digest.update(block.data)
        return digest.hexdigest()

    def _blocks(self) -> Iterator[npt.NDArray[np.uint8]]:
        content, step = self._bytes(), max(1, COUNT * ir.DataType(self.tensor.data_type).bitwidth // 8)
        for begin in range(0, len(content), step):
            yield content[begin : begin + step]

    def _bytes(self) -> npt.NDArray[np.uint8]:
        if self.tensor.data_location != TensorProto.EXTERNAL:
            return np.frombuffer(numpy_helper.to_array(self.tensor).tobytes(), np.uint8)
        facts = {entry.key: entry.value for entry in self.tensor.external_data}
        length = -(-math.prod(self.tensor.dims) * ir.DataType(self.tensor.data_type).bitwidth // 8)
        if not length:  # an empty file cannot be mapped
            return np.empty(0, np.uint8)
        return np.memmap(self.folder / facts["location"], np.uint8, "r", int(facts.get("offset", "0")), (length,))
