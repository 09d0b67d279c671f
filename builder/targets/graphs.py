"""Which graphs each target takes, as data: ports, the modules that are traced, the passes that run on them.

Nothing here knows how a bundle is packed or run, so that a change there traces and quantizes nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import EMBEDDINGS, VISION
from builder.graph.ports import (
    CONTRIB,
    PACKED_FEATURES,
    PLAIN_FEATURES,
    STANDARD,
    Component,
    packed_components,
    plain_components,
)
from builder.targets.recipe import Attention, Target


@dataclass(frozen=True)
class GraphSettings:
    """The three graphs of a target.

    Args:
        attentions: that they may use, the default first.
        domains: operator domains that they may contain.
        packed: DeepStack is packed into the hidden axis (`builder.graph.ports.packed_components`), and the logits are
            those of the last position; else DeepStack has ports of its own, and there are logits of every position.
        merges: the embeddings graph takes the image features and scatters them; else the client merges.
        batch: how the batch axis is spelled.
        bounded_positions: the decoder clamps position ids to the number of tokens.
        fused_norms: RMS norms become contrib operators.
        precisions: of activations.
        quantized: whether rules may store matrices in fewer bits.
        wide_ports: inputs and outputs that are float32 in every precision, besides pixel values.
        own_data: every graph has a data file of its own; else graphs may share equal weights (tied embeddings).
        opset: of every graph.
    """

    attentions: tuple[Attention, ...]
    domains: frozenset[str] = frozenset({STANDARD, CONTRIB})
    packed: bool = False
    merges: bool = False
    batch: str = "batch"
    bounded_positions: bool = False
    fused_norms: bool = False
    precisions: tuple[str, ...] = ("fp32",)
    quantized: bool = False
    wide_ports: frozenset[str] = frozenset()
    own_data: bool = False
    opset: int = 18

    @property
    def features(self) -> str:
        """The vision encoder's output with the main features."""
        return PACKED_FEATURES if self.packed else PLAIN_FEATURES


GRAPHS: dict[str, GraphSettings] = {
    # onnxruntime-genai allocates `image_features` and `inputs_embeds` with `model.decoder.hidden_size` as their last
    # size, so that (1 + D)·H passes through it unchanged.
    "genai": GraphSettings(
        attentions=("fused", "eager"),
        packed=True,
        merges=True,
        fused_norms=True,
        precisions=("fp32", "fp16", "bf16"),
        quantized=True,
    ),
    "onnxruntime": GraphSettings(attentions=("eager",), domains=frozenset({STANDARD})),
    # OpenVINO fuses eager attention itself, and does not read the contrib RotaryEmbedding of the fused graphs. Weights
    # in blocks are contrib operators that it does read (MatMulNBits, GatherBlockQuantized).
    "openvino": GraphSettings(attentions=("eager",), quantized=True),
    # transformers.js looks tokens up, writes each image token's row of `image_features` over its embedding, and passes
    # the result to the decoder, whatever its width. It copies those rows as raw memory, hence float32 in every
    # precision; it creates the empty cache from the decoder's ports, and knows the axis `batch_size` by name. A browser
    # gives each graph the data file that bears its name and no other. Without an image the library (4.3.1) places the
    # tokens of an answer at three times the prompt's length, hence the bound.
    "transformersjs": GraphSettings(
        attentions=("fused", "eager"),
        packed=True,
        batch="batch_size",
        bounded_positions=True,
        fused_norms=True,
        precisions=("fp32", "fp16"),
        quantized=True,
        wide_ports=frozenset({"inputs_embeds", PACKED_FEATURES}),
        own_data=True,
    ),
}


def components(checkpoint: Checkpoint, target: str) -> tuple[Component, ...]:
    """The vision encoder, the embeddings and the text decoder of a target, by its name."""
    graphs = GRAPHS[target]
    if graphs.packed:
        return packed_components(checkpoint, merges=graphs.merges, batch=graphs.batch)
    return plain_components(checkpoint, batch=graphs.batch)


def module(checkpoint: Checkpoint, model: Any, graph: str, target: Target) -> Any:
    """The `nn.Module` to trace for a graph, composed of upstream's `model`."""
    from builder.graph import modules

    graphs, levels = GRAPHS[target.runtime], len(checkpoint.vision.deepstack)
    if graph == VISION:
        return modules.VisionEncoder(model, packed=graphs.packed)
    if graph == EMBEDDINGS:
        if graphs.merges:
            return modules.PackedEmbeddings(model, checkpoint.image_token_id)
        return modules.PaddedEmbeddings(model, levels) if graphs.packed else modules.Embeddings(model)
    return modules.TextDecoder(
        model,
        levels,
        packed=graphs.packed,
        fused=target.attention == "fused",
        bounded=graphs.bounded_positions,
    )


def passes(graph: str, target: Target) -> tuple[str, ...]:
    """Names of the passes to run on a graph, in order (builder/graph/passes/registry.py)."""
    graphs = GRAPHS[target.runtime]
    if graph == VISION:
        return ("simplify", f"lower_segment_attention_{target.attention}")
    if graph == EMBEDDINGS:
        return ("simplify",) if graphs.merges else ()
    norms = ("fuse_rms_norm", "fuse_skip_rms_norm") if graphs.fused_norms else ()
    return ("simplify", "gemm_head", "fold_weight_transposes", *norms)
