"""Generate text from a prompt and image files with OpenVINO: pipeline.py on graphs that OpenVINO compiles.

Every `openvino` bundle contains a copy of this file and of pipeline.py, which does everything but run the graphs:

    python openvino_pipeline.py --prompt TEXT --image FILE

Guarantees: with the default `properties`, OpenVINO computes in float32 and quantizes nothing that is not quantized in
the bundle, whatever the device could do faster.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING or __package__:
    from builder.targets.clients import pipeline
else:  # run from a bundle
    import pipeline

# By default OpenVINO computes in bfloat16 where the processor supports it, with 8-bit activations where weights are
# compressed, and with an 8-bit key-value cache: fast, but not what was verified.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


@dataclass(frozen=True)
class Port:
    """An input of a graph; dynamic axes are None."""

    name: str
    shape: tuple[int | None, ...]


class Session:
    """A compiled graph with the interface that pipeline.py expects of a session.

    Args:
        path: an `.onnx` file, with its data file next to it.
        device: OpenVINO's name of the device.
        properties: see `openvino.Core.compile_model`.
    """

    def __init__(self, path: Path, device: str = "CPU", properties: Mapping[str, str] = EXACT) -> None:
        import openvino

        compiled = openvino.Core().compile_model(str(path), device, dict(properties))
        self._ports = [Port(port.any_name, _shape(port.partial_shape)) for port in compiled.inputs]
        self._outputs = [port.any_name for port in compiled.outputs]
        self._request = compiled.create_infer_request()

    def get_inputs(self) -> Sequence[Port]:
        """Return the inputs in the graph's order."""
        return self._ports

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run the graph and return the named outputs, or all of them if `outputs` is None."""
        results = self._request.infer({name: np.ascontiguousarray(value) for name, value in feed.items()})
        return [results[name] for name in outputs or self._outputs]


def _shape(partial_shape: Any) -> tuple[int | None, ...]:
    return tuple(int(axis.get_length()) if axis.is_static else None for axis in partial_shape)


def load(folder: Path, device: str = "CPU", properties: Mapping[str, str] = EXACT) -> pipeline.Pipeline:
    """Open a bundle.

    Raises:
        pipeline.SettingsError: see `pipeline.Pipeline.load`.
    """
    return pipeline.Pipeline.load(folder, partial(Session, device=device, properties=properties))


def main() -> None:
    """Run the command line of the copy in a bundle."""
    parser = argparse.ArgumentParser(description="Ask the model in this folder, in OpenVINO.")
    pipeline.add_arguments(parser)
    parser.add_argument("--device", default="CPU", metavar="NAME", help="CPU, GPU, NPU, AUTO …")
    parser.add_argument("--fast", action="store_true", help="let OpenVINO choose the precision")
    arguments = parser.parse_args()
    properties = {} if arguments.fast else EXACT
    pipeline.answer(parser, arguments, partial(load, device=arguments.device, properties=properties))


if __name__ == "__main__":
    main()
