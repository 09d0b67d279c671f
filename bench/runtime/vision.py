"""Measure the vision encoder of a `genai` bundle in ONNX Runtime: `python -m bench.runtime.vision FOLDER THREADS`.

Prints one line of JSON: seconds per image. The session has the settings of the bundle's genai_config.json, and THREADS.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.runtime.figures import IMAGES, vision

CHANNELS = 1536  # per patch: 3 colours, 2 frames, 16 × 16 pixels
RUNS = 3


def inputs(image: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Return `pixel_values` [patches, CHANNELS] float32 and `image_grid_thw` [1, 3] int64 of a noise image."""
    height, width = IMAGES[image]
    pixels = np.random.default_rng(width).uniform(-1, 1, (height * width, CHANNELS)).astype(np.float32)
    return pixels, np.array([[1, height, width]], np.int64)


def measure(encode: Callable[[str], object]) -> dict[str, float]:
    """Return the seconds of `encode` for each image: the median of `RUNS`, after a warm-up."""
    figures = {}
    for image in IMAGES:
        spent = []
        for _ in range(RUNS + 1):
            begin = time.perf_counter()
            encode(image)
            spent.append(time.perf_counter() - begin)
        figures[vision(image)] = median(spent[1:])
    return figures


def session(folder: Path, threads: int) -> Any:
    """Load the vision encoder of the bundle as onnxruntime-genai does."""
    import onnxruntime as ort

    config = json.loads((folder / "genai_config.json").read_bytes())["model"]["vision"]
    options = ort.SessionOptions()
    for name, value in config.get("session_options", {}).items():
        if isinstance(value, str) and "." in name:
            options.add_session_config_entry(name, value)
    options.intra_op_num_threads = threads
    return ort.InferenceSession(folder / config["filename"], options, providers=["CPUExecutionProvider"])


def main(folder: Path, threads: int) -> dict[str, float]:
    """Measure both images."""
    encoder = session(folder, threads)
    ready = {image: dict(zip(("pixel_values", "image_grid_thw"), inputs(image), strict=True)) for image in IMAGES}
    return measure(lambda image: encoder.run(None, ready[image]))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
