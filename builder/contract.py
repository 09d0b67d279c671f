"""Every graph's inputs and outputs, in one place (design: contracts of the graphs).

In: a checkpoint's facts and a target's name. Out: one `Component` a graph.
Guaranteed: the exporter names ports from here, the bundle's manifest quotes them, `verify` feeds by them.
Axis names: batch, seq, past, total, patches, images, tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.checkpoint import Checkpoint

Dim = int | str
VISION, EMBEDDINGS, DECODER = "vision_encoder", "embeddings", "model"
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
    """One graph: `name` is the file's stem."""

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


def past_ports(checkpoint: Checkpoint) -> tuple[Port, ...]:
    """past_key_values.N.key and .value, each [batch, kv_heads, past, head_dim]."""
    return _cache(checkpoint, "past_key_values", "past")


def present_ports(checkpoint: Checkpoint) -> tuple[Port, ...]:
    """present.N.key and .value, each [batch, kv_heads, total, head_dim]."""
    return _cache(checkpoint, "present", "total")


def _cache(checkpoint: Checkpoint, stem: str, axis: str) -> tuple[Port, ...]:
    text = checkpoint.text
    shape: tuple[Dim, ...] = ("batch", text.kv_heads, axis, text.head_dim)
    return tuple(
        Port(f"{stem}.{layer}.{kind}", "float32", shape) for layer in range(text.layers) for kind in ("key", "value")
    )


def packed_width(checkpoint: Checkpoint) -> int:
    """(1 + D) · H: main features and the D DeepStack features side by side."""
    return (1 + len(checkpoint.vision.deepstack)) * checkpoint.text.hidden


def components(checkpoint: Checkpoint, runtime: str) -> tuple[Component, ...]:
    """The vision encoder, the embeddings and the text decoder of a target ("genai" or "onnxruntime")."""
    packed = runtime == "genai"
    text, levels = checkpoint.text, len(checkpoint.vision.deepstack)
    width = packed_width(checkpoint) if packed else text.hidden
    stacked = () if packed or not levels else (levels,)
    pixels = Port("pixel_values", "float32", ("patches", patch_width(checkpoint)))
    grid = Port("image_grid_thw", "int64", ("images", 3))
    features = Port("image_features" if packed else "pooled_embeds", "float32", ("tokens", width))
    deepstack = (Port("deepstack_features", "float32", (*stacked, "tokens", text.hidden)),) if stacked else ()
    ids = Port("input_ids", "int64", ("batch", "seq"))
    embeds = Port("inputs_embeds", "float32", ("batch", "seq", width))
    deepstack_in = (Port("deepstack_embeds", "float32", (*stacked, "batch", "seq", text.hidden)),) if stacked else ()
    mask = Port("attention_mask", "int64", ("batch", "total"))
    positions = Port("position_ids", "int64", (3, "batch", "seq"))
    logits = Port("logits", "float32", ("batch", 1 if packed else "seq", text.vocab))
    return (
        Component(VISION, (pixels, grid), (features, *deepstack)),
        Component(EMBEDDINGS, (ids, features) if packed else (ids,), (embeds,)),
        Component(
            DECODER,
            (embeds, *deepstack_in, mask, positions, *past_ports(checkpoint)),
            (logits, *present_ports(checkpoint)),
        ),
    )


def patch_width(checkpoint: Checkpoint) -> int:
    """channels · temporal · patch², the last axis of `pixel_values`."""
    vision = checkpoint.vision
    return vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
