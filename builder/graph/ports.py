"""Every graph's inputs and outputs, in one place (design: contracts of the graphs).

In: a checkpoint's facts and a target's name. Out: one `Component` a graph, as the target's `ports` puts them together
from what is here. Guaranteed: the exporter names ports from here, the bundle's manifest quotes them, `verify` feeds by
them.
Axis names: batch, seq, past, total, patches, images, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION

Dim = int | str
ROLES = (VISION, EMBEDDINGS, DECODER)  # which every target has; it may have further ones
PACKED_FEATURES, PLAIN_FEATURES = "image_features", "pooled_embeds"
CONTRIB, STANDARD = "com.microsoft", ""
RESIDUAL = "residual"  # `residual.N` is the residual stream behind layer N, no port but a name that every graph keeps


@dataclass(frozen=True)
class Port:
    """One input or output: `dtype` is "float32" or "int64", `shape` has ints where static and axis names where not."""

    name: str
    dtype: str
    shape: tuple[Dim, ...]


@dataclass(frozen=True)
class Component:
    """One graph: `name` is its role, and the stem of its file until `configure` lays it out."""

    name: str
    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]

    @property
    def file(self) -> str:
        return f"{self.name}.onnx"

    def as_dict(self) -> dict[str, Any]:
        """For the manifest."""
        ports = {"inputs": self.inputs, "outputs": self.outputs}
        return {
            key: [{"name": p.name, "dtype": p.dtype, "shape": list(p.shape)} for p in value]
            for key, value in ports.items()
        }


def packed_components(
    checkpoint: Checkpoint, *, merges: bool = True, logits: Dim = 1, batch: str = "batch"
) -> tuple[Component, ...]:
    """DeepStack side by side with the main features, on the last axis.

    Args:
        merges: whether the embeddings graph takes the features; where not, the runtime puts them in their place.
        logits: how many positions' logits there are: 1 for the last one's alone, or an axis.
        batch: how the batch axis is spelled.
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
    """DeepStack in ports of its own, absent where the checkpoint has none; the client merges; logits of all tokens."""
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
    """What every vision encoder takes."""
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
    """(1 + D) · H: main features and the D DeepStack features side by side."""
    return (1 + len(checkpoint.vision.deepstack)) * checkpoint.text.hidden


def patch_width(checkpoint: Checkpoint) -> int:
    """channels · temporal · patch², the last axis of `pixel_values`."""
    vision = checkpoint.vision
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
