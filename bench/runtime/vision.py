"""A vision encoder in ONNX Runtime, alone: `python -m bench.runtime.vision FOLDER THREADS`.

In: a `genai` bundle of ours. Out: one line of JSON on stdout, seconds an image.
Guaranteed: the session has the settings that the bundle's genai_config.json gives to it, and so many threads.
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

CHANNELS = 1536  # of a patch: 3 colours, 2 frames, 16 × 16 pixels
RUNS = 3


def inputs(image: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """`pixel_values` [patches, CHANNELS] and `image_grid_thw` [1, 3] of an image of noise."""
    height, width = IMAGES[image]
    pixels = np.random.default_rng(width).uniform(-1, 1, (height * width, CHANNELS)).astype(np.float32)
    return pixels, np.array([[1, height, width]], np.int64)


def measure(encode: Callable[[str], object]) -> dict[str, float]:
    """Seconds of `encode` for each image: the median of `RUNS`, one before them that does not count."""
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
    """The vision encoder of the bundle, as onnxruntime-genai would load it."""
    import onnxruntime as ort

    config = json.loads((folder / "genai_config.json").read_bytes())["model"]["vision"]
    options = ort.SessionOptions()
    for name, value in config.get("session_options", {}).items():
        if isinstance(value, str) and "." in name:
            options.add_session_config_entry(name, value)
    options.intra_op_num_threads = threads
    return ort.InferenceSession(folder / config["filename"], options, providers=["CPUExecutionProvider"])


def main(folder: Path, threads: int) -> dict[str, float]:
    """Both images, once through."""
    encoder = session(folder, threads)
    ready = {image: dict(zip(("pixel_values", "image_grid_thw"), inputs(image), strict=True)) for image in IMAGES}
    return measure(lambda image: encoder.run(None, ready[image]))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
