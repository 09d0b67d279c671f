"""Run `openvino` bundles in OpenVINO, with our own openvino_pipeline.py."""

from __future__ import annotations

from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from builder.targets.image_preprocessor import Array, Preprocess
from builder.targets.runners.pipeline import PipelineRunner


def open_openvino(folder: Path, trusted: bool) -> PipelineRunner:
    """Open a bundle; no program in it is run."""
    from builder.targets.clients import openvino_pipeline, pipeline

    return PipelineRunner(pipeline, openvino_pipeline.load(folder))


def preprocess_in_openvino(path: Path) -> Preprocess:
    """Open the image preprocessor graph in OpenVINO."""
    from builder.targets.clients.openvino_pipeline import Session

    session = Session(path)

    def run(image: Array) -> tuple[Array, Array]:
        pixels, grid = session.run(["pixel_values", "image_grid_thw"], {"image": image})
        return pixels, grid

    return run


def missing() -> str | None:
    """Return why OpenVINO cannot run here, with the next command; None if it can."""
    if find_spec("openvino") is None:
        return 'openvino is not installed: pip install "qwen3vl-onnx[openvino]"'
    return None


def versions() -> dict[str, str]:
    """Return the installed version; empty if there is none."""
    return {} if missing() else {"openvino": version("openvino")}
