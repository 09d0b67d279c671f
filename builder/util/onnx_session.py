"""Open ONNX Runtime sessions on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from builder.util.errors import BundleError


def open_session(model: Path | bytes, data: Path | None = None, **settings: int) -> Any:
    """Open a graph on the CPU.

    Args:
        model: a graph file, or a serialized graph.
        data: the folder with the data files of a serialized graph.
        settings: attributes of `onnxruntime.SessionOptions`.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    for name, value in settings.items():
        setattr(options, name, value)
    if data is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(data))
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def does_not_load(path: Path, error: Exception, *, expected: str | None = None, next: str | None = None) -> BundleError:
    """Return the error for a graph that onnxruntime refuses; onnxruntime's exceptions have no common base class."""
    import onnxruntime

    return BundleError(
        f"{path} does not load in onnxruntime {onnxruntime.__version__}",
        expected=expected,
        found=(str(error).splitlines() or [type(error).__name__])[0],
        next=next,
    )
