"""Run the three graphs of a bundle in plain ONNX Runtime sessions, with one interface for all targets.

The ports are those of builder/graph/ports.py; packing and unpacking only slice and concatenate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from builder.bundle.layout import graph_files
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import PACKED_FEATURES, RESIDUAL, ROLES
from builder.util.onnx_session import does_not_load, open_session

Array = npt.NDArray[Any]
Values = dict[str, Array]
Past = Values
PAST, PRESENT = "past_key_values.", "present."


@dataclass(frozen=True)
class Graphs:
    """Sessions of the three graphs; `packed` graphs concatenate the DeepStack levels along the hidden axis."""

    vision_encoder: Any
    embeddings: Any
    model: Any
    packed: bool
    hidden: int

    @classmethod
    def load(cls, folder: Path, packed: bool, hidden: int, *, layer_outputs: bool = False) -> Graphs:
        """Open the sessions on the CPU.

        Args:
            layer_outputs: add every `residual.N` to the outputs.

        Raises:
            BundleError: ONNX Runtime cannot load a graph.
        """
        files, sessions = graph_files(folder), []
        for name in ROLES:
            path = files[name]
            try:
                sessions.append(open_session(_with_layer_outputs(path) if layer_outputs else path, path.parent))
            except Exception as error:
                rebuild = "build it again: qwen3vl-onnx build --force export"
                raise does_not_load(path, error, next=rebuild) from error
        vision_encoder, embeddings, model = sessions
        return cls(vision_encoder, embeddings, model, packed, hidden)

    def run(self, graph: str, conversations: Sequence[Sequence[Values]]) -> Iterator[list[Values]]:
        """See `builder.verify.graphs.compare.GraphRunner`."""
        session = {VISION: self.vision_encoder, EMBEDDINGS: self.embeddings, DECODER: self.model}[graph]
        names = [port.name for port in session.get_outputs()]
        for calls in conversations:
            past = self.empty_past(1) if graph == DECODER else {}
            results = []
            for call in calls:
                values = dict(zip(names, session.run(names, {**call, **past}), strict=True))
                past = {name: values.pop(PRESENT + name.removeprefix(PAST)) for name in past}
                results.append(values)
            yield results

    def vision(self, pixels: Array, grid: Array) -> tuple[Array, list[Array]]:
        """Return the main features [tokens, H] and the DeepStack levels, [tokens, H] each."""
        main, *rest = self.vision_encoder.run(None, {"pixel_values": pixels, "image_grid_thw": grid})
        if self.packed:
            first, *levels = unpacked(main, self.hidden)
            return first, levels
        return main, list(rest[0]) if rest else []

    def embed(self, ids: Array, main: Array, levels: Sequence[Array], image_token_id: int) -> tuple[Array, list[Array]]:
        """Return inputs_embeds [batch, seq, H] with the features merged, and DeepStack inputs, [batch, seq, H] each."""
        if self.packed and self.merges:
            features = np.concatenate([main, *levels], axis=1)
            (packed,) = self.embeddings.run(None, {"input_ids": ids, PACKED_FEATURES: features})
            first, *rest = unpacked(packed, self.hidden)
            return first, rest
        (packed,) = self.embeddings.run(None, {"input_ids": ids})
        embeds, *blank = unpacked(packed, self.hidden)  # a lookup's DeepStack columns are 0
        first, rest = merged(embeds, ids == image_token_id, main, levels)
        return first, [a + b for a, b in zip(rest, blank, strict=True)] if self.packed else rest

    @property
    def merges(self) -> bool:
        """Whether the embeddings graph merges the features."""
        return any(port.name == PACKED_FEATURES for port in self.embeddings.get_inputs())

    def decode(
        self, embeds: Array, levels: Sequence[Array], positions: Array, mask: Array, past: Past | None = None
    ) -> tuple[Array, Past]:
        """Return logits [batch, seq, vocab] (packed: [batch, 1, vocab] of the last position) and the next past."""
        past = self.empty_past(embeds.shape[0]) if past is None else past
        call = decoder_call(self.packed, [embeds, *levels], positions, mask)
        logits, *present = self.model.run(None, {**call, **past})
        return logits, dict(zip(past, present, strict=True))

    def empty_past(self, batch: int) -> Past:
        """Return past_key_values.N.key and .value, [batch, kv_heads, 0, head_dim] each."""
        ports = [port for port in self.model.get_inputs() if port.name.startswith(PAST)]
        return {port.name: np.zeros((batch, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}


def unpacked(packed: Array, hidden: int) -> list[Array]:
    """Split an array [..., parts · hidden] into its main and DeepStack parts, [..., hidden] each."""
    return [packed[..., i : i + hidden] for i in range(0, packed.shape[-1], hidden)]


def decoder_call(packed: bool, parts: Sequence[Array], positions: Array, mask: Array) -> Values:
    """Return the decoder's inputs by name, except its past.

    Args:
        parts: embeddings, then each DeepStack input, [batch, seq, H] each.
    """
    feed, (main, *levels) = {"attention_mask": mask, "position_ids": positions}, parts
    if packed:
        return {**feed, "inputs_embeds": np.concatenate(parts, axis=-1)}
    return {**feed, "inputs_embeds": main, **({"deepstack_embeds": np.stack(levels)} if levels else {})}


def merged(embeds: Array, mask: Array, main: Array, levels: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Replace the image tokens by the features, and scatter the DeepStack levels into zeros."""
    out, spread = embeds.copy(), [np.zeros_like(embeds) for _ in levels]
    out[mask] = main
    for target, level in zip(spread, levels, strict=True):
        target[mask] = level
    return out, spread


def _with_layer_outputs(path: Path) -> bytes:
    model = onnx.load(path, load_external_data=False)
    streams = [value for node in model.graph.node for value in node.output if value.startswith(f"{RESIDUAL}.")]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in streams)
    serialized: bytes = model.SerializeToString()
    return serialized
