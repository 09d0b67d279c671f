"""Measure the checkpoint in PyTorch: `python -m bench.runtime.pytorch TASK CHECKPOINT DTYPE ATTENTION THREADS`.

DTYPE is `float32` or `bfloat16`, ATTENTION `eager` or `sdpa`. Prints one line of JSON. transformers runs unpatched,
with logits of the last position only.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoConfig, Qwen3VLForConditionalGeneration, Qwen3VLVisionModel

from bench.runtime import vision
from bench.runtime.figures import COLD, DECODE, IMAGES, LOAD, PROMPTS, prefill
from bench.runtime.genai import prompt

FEW = 8  # decoded tokens: enough for a stable rate
PREFIX = "model.visual."


@dataclass(frozen=True)
class Options:
    """What to load, and how to compute."""

    checkpoint: Path
    dtype: torch.dtype
    attention: str


def text(options: Options) -> dict[str, float]:
    """Load, answer at once, prefill both prompts, decode a few tokens."""
    begin = time.perf_counter()
    kind: Any = Qwen3VLForConditionalGeneration
    model = kind.from_pretrained(options.checkpoint, dtype=options.dtype, attn_implementation=options.attention)
    figures = {LOAD: time.perf_counter() - begin, COLD: _generate(model, PROMPTS[0], 1)[0]}
    first, *rest = _generate(model, PROMPTS[0], FEW + 1)
    figures |= {prefill(PROMPTS[0]): first, DECODE: FEW / sum(rest)}
    return figures | {prefill(PROMPTS[1]): _generate(model, PROMPTS[1], 1)[0]}


def images(options: Options) -> dict[str, float]:
    """Measure the vision encoder alone, with only its weights loaded."""
    config = AutoConfig.from_pretrained(options.checkpoint).vision_config
    kind: Any = Qwen3VLVisionModel
    encoder = kind._from_config(config, dtype=options.dtype, attn_implementation=options.attention).eval()
    weights: dict[str, torch.Tensor] = {}
    for file in options.checkpoint.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            weights |= {k.removeprefix(PREFIX): tensors.get_tensor(k) for k in tensors.keys() if k.startswith(PREFIX)}  # noqa: SIM118
    encoder.load_state_dict(weights)
    ready = {image: [torch.from_numpy(array) for array in vision.inputs(image)] for image in IMAGES}
    return vision.measure(lambda name: encoder(ready[name][0].to(options.dtype), grid_thw=ready[name][1]))


TASKS: Mapping[str, Callable[[Options], dict[str, float]]] = {"text": text, "vision": images}


def _generate(model: Any, tokens: int, count: int) -> list[float]:
    """Return the seconds that each of `count` greedy tokens took."""
    ids, cache, spent = torch.from_numpy(prompt(tokens)).long()[None], None, []
    for _ in range(count):
        begin = time.perf_counter()
        out = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        spent.append(time.perf_counter() - begin)
    return spent


def main(task: str, checkpoint: str, dtype: str, attention: str, threads: str) -> dict[str, float]:
    """Return the figures of one task."""
    torch.set_num_threads(int(threads))
    with torch.inference_mode():
        return TASKS[task](Options(Path(checkpoint), getattr(torch, dtype), attention))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
