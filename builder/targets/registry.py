"""The runtimes that artifacts are built for: one module each, one table here."""

from __future__ import annotations

from builder.targets import genai, onnxruntime, openvino, transformersjs
from builder.targets.spec import Runtime

TARGETS: dict[str, Runtime] = {
    runtime.name: runtime for runtime in (genai.RUNTIME, onnxruntime.RUNTIME, openvino.RUNTIME, transformersjs.RUNTIME)
}
