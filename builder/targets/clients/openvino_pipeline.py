"""From a prompt and image files to text in OpenVINO: pipeline.py with its three graphs compiled by OpenVINO.

In: the folder of an `openvino` bundle; a text; image files. Out: token ids and text, as they come.
Guaranteed: everything but the graphs is pipeline.py's; whatever the device could do faster, products are made in
float32 and nothing is rounded that the bundle has not rounded: `properties` of your own choose otherwise.
Stands beside pipeline.py: both lie in each bundle, `python openvino_pipeline.py --prompt TEXT --image FILE`.
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
else:  # started in a bundle
    import pipeline

# OpenVINO's own choice is bfloat16 where the processor has it, activations in 8 bits where weights are compressed, and
# a key-value cache in 8 bits: fast, and not what was verified.
EXACT = {
    "INFERENCE_PRECISION_HINT": "f32",
    "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0",
    "KV_CACHE_PRECISION": "f32",
}


@dataclass(frozen=True)
class Port:
    """An input; axes that are not fixed are None."""

    name: str
    shape: tuple[int | None, ...]


class Session:
    """A graph as pipeline.py asks a session.

    Args:
        path: an `.onnx`; its data file is found beside it.
        properties: of OpenVINO's `compile_model`.
    """

    def __init__(self, path: Path, device: str = "CPU", properties: Mapping[str, str] = EXACT) -> None:
        import openvino

        compiled = openvino.Core().compile_model(str(path), device, dict(properties))
        self._ports = [Port(port.any_name, _shape(port.partial_shape)) for port in compiled.inputs]
        self._outputs = [port.any_name for port in compiled.outputs]
        self._request = compiled.create_infer_request()

    def get_inputs(self) -> Sequence[Port]:
        """In the graph's order."""
        return self._ports

    def run(self, outputs: Sequence[str] | None, feed: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """The outputs of these names, all of them if None."""
        found = self._request.infer({name: np.ascontiguousarray(value) for name, value in feed.items()})
        return [found[name] for name in outputs or self._outputs]


def _shape(partial_shape: Any) -> tuple[int | None, ...]:
    return tuple(int(axis.get_length()) if axis.is_static else None for axis in partial_shape)


def load(folder: Path, device: str = "CPU", properties: Mapping[str, str] = EXACT) -> pipeline.Pipeline:
    """Opens a bundle. Raises what `pipeline.Pipeline.load` raises."""
    return pipeline.Pipeline.load(folder, partial(Session, device=device, properties=properties))


def main() -> None:
    """The command line of the copy that lies in a bundle."""
    parser = argparse.ArgumentParser(description="Ask the model in this folder, in OpenVINO.")
    pipeline.add_arguments(parser)
    parser.add_argument("--device", default="CPU", metavar="NAME", help="CPU, GPU, NPU, AUTO …")
    parser.add_argument("--fast", action="store_true", help="let OpenVINO choose in what it computes")
    given = parser.parse_args()
    opened = partial(load, device=given.device, properties={} if given.fast else EXACT)
    pipeline.answer(parser, given, opened)


if __name__ == "__main__":
    main()
