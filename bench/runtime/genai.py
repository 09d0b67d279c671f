"""Measure a folder with genai_config.json in onnxruntime-genai: `python -m bench.runtime.genai TASK FOLDER`.

Prints one line of JSON. All folders get the same calls and tokens, and run with their own settings.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import numpy.typing as npt

from bench.runtime.figures import COLD, DECODE, IMAGES, LOAD, PROMPTS, STEPS, answer, prefill

PATCH = 16  # pixels per side
# Range of ordinary tokens, without special tokens.
FIRST, LAST = 1000, 100000


def prompt(count: int) -> npt.NDArray[np.int32]:
    """Return token ids [count], the same for every contestant."""
    return np.random.default_rng(count).integers(FIRST, LAST, count, dtype=np.int32)


def short(folder: Path) -> dict[str, float]:
    """Load, answer at once, answer again, decode."""
    tokens = prompt(PROMPTS[0])
    load, generate = _loaded(folder)
    cold = generate(tokens, 1)[0]
    spent = generate(tokens, STEPS + 1)
    again = median([spent[0], generate(tokens, 1)[0], generate(tokens, 1)[0]])
    return {LOAD: load, COLD: cold, prefill(PROMPTS[0]): again, DECODE: STEPS / sum(spent[1:])}


def long(folder: Path) -> dict[str, float]:
    """Load, answer a short prompt, then the long one."""
    _, generate = _loaded(folder)
    generate(prompt(PROMPTS[0]), 1)
    return {prefill(PROMPTS[1]): generate(prompt(PROMPTS[1]), 1)[0]}


def image(folder: Path) -> dict[str, float]:
    """Measure our bundle from pixel values and token ids to the first token, after a warm-up on the smallest image."""
    from builder.targets.runners.genai import GenaiBundle

    bundle = GenaiBundle(folder)
    figures = {}
    with TemporaryDirectory() as scratch:
        for name, (height, width) in {"warm": (16, 16), **IMAGES}.items():
            file = Path(scratch) / "image.png"
            _noise(file, height * PATCH, width * PATCH)
            inputs = bundle.prepare("Describe the image.", [file])
            bundle.model  # noqa: B018 - loads it
            begin = time.perf_counter()
            next(bundle.tokens(inputs, 1, 1))
            figures[answer(name)] = time.perf_counter() - begin
    del figures[answer("warm")]
    return figures


TASKS: Mapping[str, Callable[[Path], dict[str, float]]] = {"short": short, "long": long, "image": image}


def _loaded(folder: Path) -> tuple[float, Callable[[npt.NDArray[np.int32], int], list[float]]]:
    """Return the seconds to load the model, and a function that generates."""
    import onnxruntime_genai as og

    begin = time.perf_counter()
    model = og.Model(str(folder))
    spent = time.perf_counter() - begin
    return spent, lambda tokens, count: list(generate(og, model, tokens, count))


def generate(og: Any, model: Any, tokens: npt.NDArray[np.int32], count: int) -> Iterator[float]:
    """Yield the seconds that each of `count` greedy tokens took."""
    total = len(tokens) + count
    params = og.GeneratorParams(model)
    # No token may end generation, and the shared buffer is as long as needed.
    params.set_search_options(do_sample=False, repetition_penalty=1.0, max_length=total, min_length=total)
    begin = time.perf_counter()
    generator = og.Generator(model, params)
    generator.append_tokens(tokens[None])
    for _ in range(count):
        generator.generate_next_token()
        generator.get_next_tokens()
        end = time.perf_counter()
        yield end - begin
        begin = end


def _noise(file: Path, height: int, width: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file)


if __name__ == "__main__":
    print(json.dumps(TASKS[sys.argv[1]](Path(sys.argv[2]))))
