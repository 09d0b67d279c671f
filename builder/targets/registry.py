"""Packaging of each target's bundle, by the target's name."""

from __future__ import annotations

from builder.targets import genai, onnxruntime, openvino, transformersjs
from builder.targets.spec import Packaging

PACKAGING: dict[str, Packaging] = {
    "genai": genai.PACKAGING,
    "onnxruntime": onnxruntime.PACKAGING,
    "openvino": openvino.PACKAGING,
    "transformersjs": transformersjs.PACKAGING,
}
