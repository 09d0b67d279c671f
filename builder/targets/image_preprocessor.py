"""The image preprocessor as a graph of the bundle, for runtimes whose clients have none.

Made by builder/graph/image_preprocessor/build.py.

In: a checkpoint; the graph's file. Out: the graph, as `Runtime.further` wants it; a session, as `Runtime.preprocessor`.
Guaranteed: one graph whatever the runtime, of the opset that all of them read.
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
"""A picture, uint8 [height, width, 3] → pixel_values and image_grid_thw."""


def image_preprocessor_graph(checkpoint: Checkpoint, recipe: Any) -> Mapping[str, ModelProto]:
    """For `Runtime.further`."""
    import onnx_ir as ir

    from builder.graph.image_preprocessor.build import image_preprocessor

    return {NAME: ir.to_proto(image_preprocessor(checkpoint.preprocessor, OPSET))}


def in_onnxruntime(path: Path) -> Preprocess:
    """The graph in a plain session, on one thread: thousands of its nodes are smaller than what starts one."""
    session = open_session(path, intra_op_num_threads=1)

    def run(picture: Array) -> tuple[Array, Array]:
        pixels, grid = session.run(["pixel_values", "image_grid_thw"], {"image": np.ascontiguousarray(picture)})
        return pixels, grid

    return run
