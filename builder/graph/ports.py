"""Inputs and outputs of every graph: export, manifest and `verify` all take them from here.

Axis names: batch, seq, past, total, patches, images, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION

Dim = int | str
ROLES = (VISION, EMBEDDINGS, DECODER)  # every target has these graphs, and may have more
PACKED_FEATURES, PLAIN_FEATURES = "image_features", "pooled_embeds"
CONTRIB, STANDARD = "com.microsoft", ""
RESIDUAL = "residual"  # `residual.N`, the residual stream after layer N, is not a port, but every graph keeps the name


@dataclass(frozen=True)
class Port:
    """An input or output: `dtype` is "float32" or "int64"; `shape` has ints for static axes, names for dynamic axes."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Component:
    """A graph's ports: `name` is its role, and the stem of its file until the bundle is laid out."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    def as_dict(self) -> dict[str, Any]:
        """The ports as in the manifest."""
        ports = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            key: [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in value]
            for key, value in ports.items()
        }


def packed_components(
    checkpoint: Checkpoint, *, merges: bool = True, logits: Dim = 1, batch: str = "batch"
) -> tuple[Component, ...]:
    """Components with DeepStack features concatenated to the main features on the last axis.

    Args:
        merges: whether the embeddings graph inserts the features; if not, the runtime does.
        logits: the positions that have logits: 1 for the last position alone, or an axis name.
        batch: name of the batch axis.
    """
    width = packed_width(checkpoint)
    features = Port(PACKED_FEATURES, "float32", ("tokens", width))
    embeds = Port("inputs_embeds", "float32", (batch, "seq", width))
    return (
        Component(VISION, vision_ports(checkpoint), (features,)),
        Component(EMBEDDINGS, (_ids(batch), features) if merges else (_ids(batch),), (embeds,)),
        _decoder(checkpoint, (embeds,), logits, batch),
    )


def plain_components(checkpoint: Checkpoint, *, batch: str = "batch") -> tuple[Component, ...]:
    """Components with separate DeepStack ports, if the checkpoint has any; the client merges; logits of all tokens."""
    hidden, levels = checkpoint.text.hidden, len(checkpoint.vision.deepstack)
    features = [Port(PLAIN_FEATURES, "float32", ("tokens", hidden))]
    embeds = [Port("inputs_embeds", "float32", (batch, "seq", hidden))]
    ids = Component(EMBEDDINGS, (_ids(batch),), tuple(embeds))
    if levels:
        features.append(Port("deepstack_features", "float32", (levels, "tokens", hidden)))
        embeds.append(Port("deepstack_embeds", "float32", (levels, batch, "seq", hidden)))
    return (
        Component(VISION, vision_ports(checkpoint), tuple(features)),
        ids,
        _decoder(checkpoint, tuple(embeds), "seq", batch),
    )


def vision_ports(checkpoint: Checkpoint) -> tuple[Port, Port]:
    """Inputs of every vision encoder."""
    return (
        Port("pixel_values", "float32", ("patches", patch_width(checkpoint))),
        Port("image_grid_thw", "int64", ("images", 3)),
    )


def past_ports(checkpoint: Checkpoint, batch: str = "batch") -> tuple[Port, ...]:
    """past_key_values.N.key and .value, each [batch, kv_heads, past, head_dim]."""
    return _cache(checkpoint, "past_key_values", "past", batch)


def present_ports(checkpoint: Checkpoint, batch: str = "batch") -> tuple[Port, ...]:
    """present.N.key and .value, each [batch, kv_heads, total, head_dim]."""
    return _cache(checkpoint, "present", "total", batch)


def _cache(checkpoint: Checkpoint, stem: str, axis: str, batch: str) -> tuple[Port, ...]:
    text = checkpoint.text
    shape: tuple[Dim, ...] = (batch, text.kv_heads, axis, text.head_dim)
    return tuple(
        Port(f"{stem}.{layer}.{kind}", "float32", shape) for layer in range(text.layers) for kind in ("key", "value")
    )


def _ids(batch: str) -> Port:
    return Port("input_ids", "int64", (batch, "seq"))


def _decoder(checkpoint: Checkpoint, embeds: tuple[Port, ...], logits: Dim, batch: str) -> Component:
    mask = Port("attention_mask", "int64", (batch, "total"))
    positions = Port("position_ids", "int64", (3, batch, "seq"))
    scores = Port("logits", "float32", (batch, logits, checkpoint.text.vocab))
    return Component(
        DECODER,
        (*embeds, mask, positions, *past_ports(checkpoint, batch)),
        (scores, *present_ports(checkpoint, batch)),
    )


def packed_width(checkpoint: Checkpoint) -> int:
    """(1 + D) · H: the main features and the D DeepStack features, concatenated."""
    return (1 + len(checkpoint.vision.deepstack)) * checkpoint.text.hidden


def patch_width(checkpoint: Checkpoint) -> int:
    """channels · temporal · patch², the last axis of `pixel_values`."""
    vision = checkpoint.vision
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
