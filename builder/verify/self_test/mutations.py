"""Ways to break a bundle, each a function of a folder.

In: a copy of a bundle that may be changed, and its target. Out: the same folder, one thing in it wrong. Guaranteed: the
runtimes load and run what is broken; a bundle that cannot be broken so is told by InapplicableError; a file is
replaced, never written through a hard link.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.ports import RESIDUAL
from builder.targets.graphs import GRAPHS
from builder.targets.image_preprocessor import NAME as PREPROCESSOR
from builder.verify.image_preprocessor import preprocessor_file
from builder.verify.self_test.edits import (
    DOWN,
    InapplicableError,
    as_output,
    behind,
    constant,
    edit_json,
    edited,
    feature_levels,
    into_input,
    need_layer,
    numbers,
    port,
    reader,
    rolled,
    steps,
    weight,
    zeros_behind,
)


def mean_changed(bundle: Path, target: str) -> None:
    """The mean of one channel."""
    edit_json(bundle / "vision_processor.json", lambda document: _scale_first(steps(document, ("qwen3_vl",)), "mean"))


def std_changed(bundle: Path, target: str) -> None:
    """The standard deviation of one channel."""
    edit_json(bundle / "vision_processor.json", lambda document: _scale_first(steps(document, ("qwen3_vl",)), "std"))


def _scale_first(found: list[dict[str, Any]], key: str) -> None:
    (attributes,) = found
    attributes[key][0] *= 1.01


def patch_size_changed(bundle: Path, target: str) -> None:
    """Half of the patch size, in every step that has one."""

    def halve(document: Any) -> None:
        for step in steps(document, ("patch_size",)):
            step["patch_size"] //= 2

    edit_json(bundle / "vision_processor.json", halve)


def newline_lost(bundle: Path, target: str) -> None:
    """The line break at the end of the prompt, behind which the answer begins."""

    def lose(settings: Any) -> None:
        settings["prompt"]["suffix"] = settings["prompt"]["suffix"].removesuffix("\n")

    edit_json(bundle / "pipeline.json", lose)


def vision_mlp_scaled(bundle: Path, target: str, block: int = 1) -> None:
    """What the feed-forward network of one vision block adds to the residual stream, 1 % too large."""
    with edited(bundle, VISION) as graph:
        name = f"{RESIDUAL}.{block}"
        (node,) = [node for node in graph if any(value.name == name for value in node.outputs)]
        more = constant(graph, "more", np.float32(1.01))
        into_input(graph, node, 1, ir.node("Mul", [node.inputs[1], more]))


def image_features_shifted(bundle: Path, target: str) -> None:
    """Each image token takes the features of the next one, the last one those of the first."""
    runtime = GRAPHS[target]
    with edited(bundle, EMBEDDINGS if runtime.merges else VISION) as graph:
        if runtime.merges:
            features = port(graph.inputs, runtime.features)
            behind(graph, features, *rolled(graph, features))
        else:
            features = port(graph.outputs, runtime.features)
            as_output(graph, features, *rolled(graph, features))


def last_image_dropped(bundle: Path, target: str) -> None:
    """Features of the last image of a call are 0."""
    with edited(bundle, VISION) as graph:
        pixels, grid = port(graph.inputs, "pixel_values"), port(graph.inputs, "image_grid_thw")
        features = port(graph.outputs, GRAPHS[target].features)
        last, end, axis = (constant(graph, f"row_{n}", np.array([n], np.int64)) for n in (-1, 2**62, 0))
        row = ir.node("Slice", [grid, last, end, axis])
        patches = ir.node("ReduceProd", [row.outputs[0]], {"keepdims": 0})
        count = ir.node("Shape", [features], {"start": 0, "end": 1})
        whole = ir.node("Shape", [pixels], {"start": 0, "end": 1})
        # Tokens are to patches as one is to merge².
        share = ir.node("Mul", [patches.outputs[0], count.outputs[0]])
        tokens = ir.node("Div", [share.outputs[0], whole.outputs[0]])
        start = ir.node("Sub", [count.outputs[0], tokens.outputs[0]])
        counted = [row, patches, count, whole, share, tokens, start]
        as_output(graph, features, *counted, *zeros_behind(graph, features, start.outputs[0]))


def deepstack_zeroed(bundle: Path, target: str) -> None:
    """The vision encoder's DeepStack features times 0; its main features stay."""
    with edited(bundle, VISION) as graph:
        node, levels = feature_levels(graph, target)
        zero = constant(graph, "zero", np.float32(0))
        for index in levels:
            into_input(graph, node, index, ir.node("Mul", [node.inputs[index], zero]))


def deepstack_levels_swapped(bundle: Path, target: str) -> None:
    """The first two DeepStack levels are given in each other's place."""
    with edited(bundle, VISION) as graph:
        node, levels = feature_levels(graph, target)
        if len(levels) < 2:
            raise InapplicableError("the checkpoint has one DeepStack level")
        first, second = (node.inputs[index] for index in levels[:2])
        node.replace_input_with(levels[0], second)
        node.replace_input_with(levels[1], first)


def attention_mask_off_by_one(bundle: Path, target: str) -> None:
    """Every token is masked as the one behind it, the last one away; fused: the operator counts one token too few."""
    with edited(bundle, DECODER) as graph:
        fused = [node for node in graph if node.op_type == "GroupQueryAttention"]
        for node in fused:
            fewer = ir.node("Add", [node.inputs[5], _once(graph, "fewer", np.int32(-1))])
            into_input(graph, node, 5, fewer)
        if fused:
            return
        mask = port(graph.inputs, "attention_mask")
        one, end, axis = (constant(graph, f"column_{n}", np.array([n], np.int64)) for n in (1, 2**62, -1))
        rest = ir.node("Slice", [mask, one, end, axis])
        shape = ir.node("Slice", [mask, constant(graph, "column_first", np.array([0], np.int64)), one, axis])
        blank = ir.node("Sub", [shape.outputs[0], shape.outputs[0]])
        behind(graph, mask, rest, shape, blank, ir.node("Concat", [rest.outputs[0], blank.outputs[0]], {"axis": -1}))


def causal_mask_off_by_one(bundle: Path, target: str) -> None:
    """A query sees one token behind itself."""
    with edited(bundle, DECODER) as graph:
        causal = [node for node in graph if node.op_type == "LessOrEqual"]
        if not causal:
            raise InapplicableError("attention is fused: the mask is inside the operator")
        for node in causal:
            later = ir.node("Add", [node.inputs[1], _once(graph, "later", np.int64(1))])
            into_input(graph, node, 1, later)


def rotary_axes_swapped(bundle: Path, target: str) -> None:
    """The decoder takes a position's height for its width and the other way round."""
    with edited(bundle, DECODER) as graph:
        positions = port(graph.inputs, "position_ids")
        order = constant(graph, "time_width_height", np.array([0, 2, 1], np.int64))
        behind(graph, positions, ir.node("Gather", [positions, order], {"axis": 0}))


def mrope_sections_permuted(bundle: Path, target: str) -> None:
    """The sections of the rotary embedding as blocks one after the other, where they are interleaved."""
    with edited(bundle, DECODER) as graph:
        positions = port(graph.inputs, "position_ids")
        bounded = [node.outputs[0] for node, _ in positions.uses() if node.op_type == "Min"]
        (node,) = [node for value in (positions, *bounded) for node, _ in value.uses() if node.op_type == "Gather"]
        axes = node.inputs[1]
        assert axes is not None
        interleaved = numbers(axes)
        blocks = np.sort(interleaved)
        if (blocks == interleaved).all():
            raise InapplicableError("the sections are blocks")
        axes.const_value = ir.tensor(blocks, name=axes.name)


def rotary_theta_changed(bundle: Path, target: str) -> None:
    """The base of the rotary frequencies, 1 % too large."""
    with edited(bundle, DECODER) as graph:
        frequencies = weight(graph, "rotary_emb.inv_freq")
        values = numbers(frequencies)
        exponents = np.arange(values.size).reshape(values.shape) / values.size
        frequencies.const_value = ir.tensor((values * 1.01**-exponents).astype(np.float32), name=frequencies.name)


def norm_epsilon_changed(bundle: Path, target: str) -> None:
    """The decoder's norms add 1e-5 where the checkpoint says 1e-6: ten times as much."""
    with edited(bundle, DECODER) as graph:
        norms = [node for node in graph if "epsilon" in node.attributes]
        for node in norms:
            node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 10 * node.attributes["epsilon"].as_float())
        if norms:
            return
        means = [node.outputs[0] for node in graph if node.op_type == "ReduceMean"]
        adding = [(node, 1 - index) for mean in means for node, index in mean.uses() if node.op_type == "Add"]
        assert adding
        for node, index in adding:
            small = node.inputs[index]
            assert small is not None
            ten = _once(graph, "ten", np.float32(10))
            into_input(graph, node, index, ir.node("Mul", [small, ten]))


def mlp_scaled(bundle: Path, target: str, layer: int = 3) -> None:
    """What the feed-forward network of one decoder layer adds to the residual stream, 1 % too large."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, layer)
        down = reader(weight(graph, DOWN.format(layer))).outputs[0]
        behind(graph, down, ir.node("Mul", [down, constant(graph, "more", np.float32(1.01))]))


def layers_swapped(bundle: Path, target: str, layers: tuple[int, int] = (1, 2)) -> None:
    """Two decoder layers read each other's down projection."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, max(layers))
        one, two = (weight(graph, DOWN.format(layer)) for layer in layers)
        one.const_value, two.const_value = two.const_value, one.const_value


def weight_transposed(bundle: Path, target: str, layer: int = 1) -> None:
    """The output projection of one decoder layer holds its numbers column by column where the graph reads rows."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, layer)
        matrix = weight(graph, f"layers.{layer}.self_attn.o_proj.weight")
        values = numbers(matrix)
        turned = np.ascontiguousarray(values.T).reshape(values.shape)
        matrix.const_value = ir.tensor(turned, name=matrix.name)


def image_token_unknown(bundle: Path, target: str) -> None:
    """genai_config.json names another token for images."""
    path = bundle / "genai_config.json"
    if not path.exists():
        raise InapplicableError("the target has no settings but those that make its inputs")
    edit_json(path, lambda settings: settings["model"].update(image_token_id=settings["model"]["bos_token_id"]))


def preprocessor_brighter(bundle: Path, target: str) -> None:
    """The image preprocessor's table of what becomes of each level."""
    if preprocessor_file(bundle) is None:
        raise InapplicableError("the bundle has no image preprocessor")
    with edited(bundle, PREPROCESSOR) as graph:
        (table,) = [value for value in graph.initializers.values() if numbers(value).size == 3 * 256]
        table.const_value = ir.tensor(numbers(table) * np.float32(1.01), name=table.name)


def _once(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    return graph.initializers.get(f"mutation_{name}") or constant(graph, name, value)
