"""The image preprocessor graph (builder/graph/image_preprocessor/build.py) in a bundle, for clients that have none.

The graph is the same for every target, in an opset that all runtimes support.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from builder.checkpoint.load import Checkpoint
from builder.util.onnx_session import open_session

if TYPE_CHECKING:
    from onnx import ModelProto

NAME, OPSET = "image_preprocessor", 18

Array = npt.NDArray[Any]
Preprocess = Callable[[Array], tuple[Array, Array]]
"""RGB image, uint8 [height, width, 3] → (pixel_values, image_grid_thw)."""


def image_preprocessor_graph(checkpoint: Checkpoint, recipe: Any) -> Mapping[str, ModelProto]:
    """Build the graph; a value for `Packaging.further`."""
    import onnx_ir as ir

    from builder.graph.image_preprocessor.build import image_preprocessor

    return {NAME: ir.to_proto(image_preprocessor(checkpoint.preprocessor, OPSET))}


def in_onnxruntime(path: Path) -> Preprocess:
    """Open the graph in ONNX Runtime; a value for `Runtime.preprocessor`.

    It runs on one thread: most of its thousands of nodes are smaller than the overhead of a thread.
    """
    session = open_session(path, intra_op_num_threads=1)

    def run(image: Array) -> tuple[Array, Array]:
        pixels, grid = session.run(["pixel_values", "image_grid_thw"], {"image": np.ascontiguousarray(image)})
        return pixels, grid

    return run
