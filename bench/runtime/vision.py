"""A vision encoder in ONNX Runtime, alone: `python -m bench.runtime.vision FOLDER THREADS`.

In: a `genai` bundle of ours. Out: one line of JSON on stdout, seconds a picture.
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

from bench.runtime.figures import PICTURES, vision

CHANNELS = 1536  # of a patch: 3 colours, 2 frames, 16 × 16 pixels
RUNS = 3


def inputs(picture: str) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """`pixel_values` [patches, CHANNELS] and `image_grid_thw` [1, 3] of a picture of noise."""
    height, width = PICTURES[picture]
    pixels = np.random.default_rng(width).uniform(-1, 1, (height * width, CHANNELS)).astype(np.float32)
    return pixels, np.array([[1, height, width]], np.int64)


def measure(encode: Callable[[str], object]) -> dict[str, float]:
    """Seconds of `encode` for each picture: the median of `RUNS`, one before them that does not count."""
    figures = {}
    for picture in PICTURES:
        spent = []
        for _ in range(RUNS + 1):
            begin = time.perf_counter()
            encode(picture)
            spent.append(time.perf_counter() - begin)
        figures[vision(picture)] = median(spent[1:])
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
    """Both pictures, once through."""
    encoder = session(folder, threads)
    ready = {
        picture: dict(zip(("pixel_values", "image_grid_thw"), inputs(picture), strict=True)) for picture in PICTURES
    }
    return measure(lambda picture: encoder.run(None, ready[picture]))


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]))))
