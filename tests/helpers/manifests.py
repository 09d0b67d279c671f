"""A manifest as a build writes it, and variants, for documents generated from manifests."""

from __future__ import annotations

import copy
from typing import Any

COMMIT = "c0ffee" + "0" * 34
PORT = {"name": "inputs_embeds", "dtype": "float32", "shape": ["batch", "seq", 8]}
CACHE = [{"name": f"past_key_values.{n}.key", "dtype": "float32", "shape": ["batch", 2, "past", 4]} for n in range(3)]
MANIFEST: dict[str, Any] = {
    "format": 1,
    "target": "genai",
    "attention": "fused",
    "recipe": {"name": "fp32", "precision": "fp32", "max_length": 4096},
    "checkpoint": {
        "name": "Tiny-VL",
        "repository": "Org/Tiny-VL",
        "revision": COMMIT,
        "config_sha256": "0" * 64,
        "files": {"model.safetensors": {"size": 8, "sha256": "1" * 64}},
    },
    "graphs": {"model.onnx": {"inputs": [PORT, *CACHE], "outputs": [PORT], "operators": ["Add"]}},
    "opset": 18,
    "patches": {"rotary": {"target": "a:b", "why": "so", "digest": "0" * 12}},
    "versions": {"qwen3vl-onnx": "0.1.0", "onnxruntime-genai": "0.18.0", "torch": "2.13.0+cpu", "onnx_ir": "1.1.0"},
    "files": {"model.onnx": {"size": 9, "sha256": "2" * 64}, "README.md": {"size": 7, "sha256": "3" * 64}},
}


def manifest(**changes: Any) -> dict[str, Any]:
    """`MANIFEST` with other values; those of `checkpoint` and `recipe` are merged."""
    found = copy.deepcopy(MANIFEST)
    for key, value in changes.items():
        found[key] = {**found[key], **value} if key in ("checkpoint", "recipe") else value
    return found
