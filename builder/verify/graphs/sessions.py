"""The three graphs of a bundle in plain ONNX Runtime sessions, fed and read in one form whatever the target.

In: a bundle's folder and its target. Out: main and DeepStack features apart, embeddings, logits.
Guaranteed: nothing here computes; packing and unpacking are slices and concatenations of builder/graph/ports.py's
ports.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from builder.bundle.layout import graph_files
from builder.graph.ports import PACKED_FEATURES, ROLES
from builder.util.onnx_session import does_not_load, open_session

Array = npt.NDArray[Any]
Past = dict[str, Array]


@dataclass(frozen=True)
class Graphs:
    """Sessions of the three graphs; `packed` is whether DeepStack rides in the hidden axis."""

    vision_encoder: Any
    embeddings: Any
    model: Any
    packed: bool
    hidden: int

    @classmethod
    def load(cls, folder: Path, packed: bool, hidden: int) -> Graphs:
        """Opens the sessions on the CPU.

        Raises:
            BundleError: ONNX Runtime does not accept a graph.
        """
        files, sessions = graph_files(folder), []
        for name in ROLES:
            try:
                sessions.append(open_session(files[name]))
            except Exception as error:
                again = "build it again: qwen3vl-onnx build --force export"
                raise does_not_load(files[name], error, next=again) from error
        vision_encoder, embeddings, model = sessions
        return cls(vision_encoder, embeddings, model, packed, hidden)

    def vision(self, pixels: Array, grid: Array) -> tuple[Array, list[Array]]:
        """Main features [tokens, H] and D levels [tokens, H]."""
        main, *rest = self.vision_encoder.run(None, {"pixel_values": pixels, "image_grid_thw": grid})
        if self.packed:
            first, *levels = self._unpacked(main)
            return first, levels
        return main, list(rest[0]) if rest else []

    def embed(self, ids: Array, main: Array, levels: Sequence[Array], image_token_id: int) -> tuple[Array, list[Array]]:
        """inputs_embeds [batch, seq, H] with the features merged, and D DeepStack inputs [batch, seq, H]."""
        if self.packed and self.merges:
            features = np.concatenate([main, *levels], axis=1)
            first, *rest = self._unpacked(self.embeddings.run(None, {"input_ids": ids, PACKED_FEATURES: features})[0])
            return first, rest
        (found,) = self.embeddings.run(None, {"input_ids": ids})
        embeds, *blank = self._unpacked(found)  # behind a lookup's own columns, those of DeepStack are 0
        first, rest = merged(embeds, ids == image_token_id, main, levels)
        return first, [a + b for a, b in zip(rest, blank, strict=True)] if self.packed else rest

    @property
    def merges(self) -> bool:
        """Whether the embeddings graph puts the features in their place."""
        return any(port.name == PACKED_FEATURES for port in self.embeddings.get_inputs())

    def decode(
        self, embeds: Array, levels: Sequence[Array], positions: Array, mask: Array, past: Past | None = None
    ) -> tuple[Array, Past]:
        """logits [batch, seq, vocab] (packed: [batch, 1, vocab], the last position's) and the next past."""
        past = self.empty_past(embeds.shape[0]) if past is None else past
        logits, *present = self.model.run(None, self.decoder_feed(embeds, levels, positions, mask, past))
        return logits, dict(zip(past, present, strict=True))

    def decoder_feed(
        self, embeds: Array, levels: Sequence[Array], positions: Array, mask: Array, past: Past
    ) -> dict[str, Array]:
        """The decoder's inputs, by name."""
        feed = {"attention_mask": mask, "position_ids": positions, **past}
        if self.packed:
            return {**feed, "inputs_embeds": np.concatenate([embeds, *levels], axis=-1)}
        return {**feed, "inputs_embeds": embeds, **({"deepstack_embeds": np.stack(levels)} if levels else {})}

    def empty_past(self, batch: int) -> Past:
        """past_key_values.N.key and .value, [batch, kv_heads, 0, head_dim] each."""
        ports = [port for port in self.model.get_inputs() if port.name.startswith("past_key_values.")]
        return {port.name: np.zeros((batch, port.shape[1], 0, port.shape[3]), np.float32) for port in ports}

    def _unpacked(self, packed: Array) -> list[Array]:
        return [packed[..., i : i + self.hidden] for i in range(0, packed.shape[-1], self.hidden)]


def merged(embeds: Array, mask: Array, main: Array, levels: Sequence[Array]) -> tuple[Array, list[Array]]:
    """Features in the place of the image tokens; DeepStack levels scattered into zeros."""
    out, spread = embeds.copy(), [np.zeros_like(embeds) for _ in levels]
    out[mask] = main
    for target, level in zip(spread, levels, strict=True):
        target[mask] = level
    return out, spread
