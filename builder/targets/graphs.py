"""The graphs of each target: ports, traced modules and passes.

Packaging and runtimes are separate, so that a change to them does not invalidate the stages `export` and `quantize`.
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
        attentions: supported attentions, the default first.
        domains: operator domains that the graphs may contain.
        packed: whether DeepStack is packed into the hidden axis (`builder.graph.ports.packed_components`) and the
            decoder returns logits of the last position only; otherwise DeepStack has its own ports, and the decoder
            returns logits of every position.
        merges: whether the embeddings graph scatters the image features; otherwise the client does.
        batch: name of the batch axis.
        bounded_positions: whether the decoder clamps position ids to the number of tokens.
        fused_norms: whether RMS norms become contrib operators.
        precisions: supported activation types.
        quantized: whether rules may quantize matrices.
        wide_ports: inputs and outputs that are float32 in every precision, besides pixel values.
        own_data: whether each graph has its own data file; otherwise graphs may share weights (tied embeddings).
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
        """Name of the vision encoder's output with the main features."""
        return PACKED_FEATURES if self.packed else PLAIN_FEATURES


GRAPHS: dict[str, GraphSettings] = {
    # onnxruntime-genai allocates `image_features` and `inputs_embeds` with `model.decoder.hidden_size` as their last
    # dimension, so (1 + D)·H passes through it unchanged.
    "genai": GraphSettings(
        attentions=("fused", "eager"),
        packed=True,
        merges=True,
        fused_norms=True,
        precisions=("fp32", "fp16", "bf16"),
        quantized=True,
    ),
    "onnxruntime": GraphSettings(attentions=("eager",), domains=frozenset({STANDARD})),
    # OpenVINO fuses eager attention itself. It supports the contrib operators of blockwise quantized weights
    # (MatMulNBits, GatherBlockQuantized), but not the contrib RotaryEmbedding of the fused graphs.
    "openvino": GraphSettings(attentions=("eager",), quantized=True),
    # transformers.js looks up the tokens, replaces the embedding of each image token by a row of `image_features`, and
    # passes the result to the decoder, whatever its width. It copies those rows as raw memory, hence float32 in every
    # precision. It creates the empty cache from the decoder's ports and recognizes the axis `batch_size` by name. In a
    # browser, a graph can only use the data file named after it. Without an image, the library (4.3.1) starts the
    # positions of generated tokens at three times the prompt's length, hence the bound.
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
    """Return a target's vision encoder, embeddings and text decoder."""
    graphs = GRAPHS[target]
    if graphs.packed:
        return packed_components(checkpoint, merges=graphs.merges, batch=graphs.batch)
    return plain_components(checkpoint, batch=graphs.batch)


def module(checkpoint: Checkpoint, model: Any, graph: str, target: Target) -> Any:
    """Return the `nn.Module` to trace for a graph, composed of the modules of upstream's `model`."""
    from builder.graph import modules

    graphs, layers = GRAPHS[target.runtime], len(checkpoint.vision.deepstack)
    if graph == VISION:
        return modules.VisionEncoder(model, packed=graphs.packed)
    if graph == EMBEDDINGS:
        if graphs.merges:
            return modules.PackedEmbeddings(model, checkpoint.image_token_id)
        return modules.PaddedEmbeddings(model, layers) if graphs.packed else modules.Embeddings(model)
    return modules.TextDecoder(
        model,
        layers,
        packed=graphs.packed,
        fused=target.attention == "fused",
        bounded=graphs.bounded_positions,
    )


def passes(graph: str, target: Target) -> tuple[str, ...]:
    """Return the names of a graph's passes, in order (builder/graph/passes/registry.py)."""
    graphs = GRAPHS[target.runtime]
    if graph == VISION:
        return ("simplify", f"lower_segment_attention_{target.attention}")
    if graph == EMBEDDINGS:
        return ("simplify",) if graphs.merges else ()
    norms = ("fuse_rms_norm", "fuse_skip_rms_norm") if graphs.fused_norms else ()
    return ("simplify", "gemm_head", "fold_weight_transposes", *norms)
