"""Break a copy of a bundle in one respect, as functions of its folder and target.

Guarantees: the runtimes load and run the broken bundle; InapplicableError if the bundle cannot be broken in this way.
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
    constant,
    edit_json,
    edited,
    feature_levels,
    insert_after,
    insert_before_input,
    need_layer,
    numbers,
    port,
    reader,
    replace_output,
    roll_rows,
    steps,
    weight,
    zero_rows_from,
)


def mean_changed(bundle: Path, target: str) -> None:
    """Change the mean of one channel."""
    edit_json(bundle / "vision_processor.json", lambda document: _scale_first(steps(document, ("qwen3_vl",)), "mean"))


def std_changed(bundle: Path, target: str) -> None:
    """Change the standard deviation of one channel."""
    edit_json(bundle / "vision_processor.json", lambda document: _scale_first(steps(document, ("qwen3_vl",)), "std"))


def _scale_first(processor_steps: list[dict[str, Any]], key: str) -> None:
    (attributes,) = processor_steps
    attributes[key][0] *= 1.01


def patch_size_changed(bundle: Path, target: str) -> None:
    """Halve the patch size in every step that has one."""

    def halve(document: Any) -> None:
        for step in steps(document, ("patch_size",)):
            step["patch_size"] //= 2

    edit_json(bundle / "vision_processor.json", halve)


def newline_lost(bundle: Path, target: str) -> None:
    """Remove the line break at the end of the prompt, before the answer."""

    def lose(settings: Any) -> None:
        settings["prompt"]["suffix"] = settings["prompt"]["suffix"].removesuffix("\n")

    edit_json(bundle / "pipeline.json", lose)


def vision_mlp_scaled(bundle: Path, target: str, block: int = 1) -> None:
    """Scale the output of the MLP of one vision block by 1.01."""
    with edited(bundle, VISION) as graph:
        name = f"{RESIDUAL}.{block}"
        (node,) = [node for node in graph if any(value.name == name for value in node.outputs)]
        more = constant(graph, "more", np.float32(1.01))
        insert_before_input(graph, node, 1, ir.node("Mul", [node.inputs[1], more]))


def image_features_shifted(bundle: Path, target: str) -> None:
    """Give each image token the features of the next, and the last those of the first."""
    runtime = GRAPHS[target]
    with edited(bundle, EMBEDDINGS if runtime.merges else VISION) as graph:
        if runtime.merges:
            features = port(graph.inputs, runtime.features)
            insert_after(graph, features, *roll_rows(graph, features))
        else:
            features = port(graph.outputs, runtime.features)
            replace_output(graph, features, *roll_rows(graph, features))


def last_image_dropped(bundle: Path, target: str) -> None:
    """Set the features of the last image of a call to 0."""
    with edited(bundle, VISION) as graph:
        pixels, grid = port(graph.inputs, "pixel_values"), port(graph.inputs, "image_grid_thw")
        features = port(graph.outputs, GRAPHS[target].features)
        last, end, axis = (constant(graph, f"row_{n}", np.array([n], np.int64)) for n in (-1, 2**62, 0))
        row = ir.node("Slice", [grid, last, end, axis])
        patches = ir.node("ReduceProd", [row.outputs[0]], {"keepdims": 0})
        count = ir.node("Shape", [features], {"start": 0, "end": 1})
        total = ir.node("Shape", [pixels], {"start": 0, "end": 1})
        # tokens = patches · all tokens / all patches
        share = ir.node("Mul", [patches.outputs[0], count.outputs[0]])
        tokens = ir.node("Div", [share.outputs[0], total.outputs[0]])
        start = ir.node("Sub", [count.outputs[0], tokens.outputs[0]])
        nodes = [row, patches, count, total, share, tokens, start]
        replace_output(graph, features, *nodes, *zero_rows_from(graph, features, start.outputs[0]))


def deepstack_zeroed(bundle: Path, target: str) -> None:
    """Set the vision encoder's DeepStack features to 0, but not its main features."""
    with edited(bundle, VISION) as graph:
        node, levels = feature_levels(graph, target)
        zero = constant(graph, "zero", np.float32(0))
        for index in levels:
            insert_before_input(graph, node, index, ir.node("Mul", [node.inputs[index], zero]))


def deepstack_levels_swapped(bundle: Path, target: str) -> None:
    """Swap the first two DeepStack levels."""
    with edited(bundle, VISION) as graph:
        node, levels = feature_levels(graph, target)
        if len(levels) < 2:
            raise InapplicableError("the checkpoint has one DeepStack level")
        first, second = (node.inputs[index] for index in levels[:2])
        node.replace_input_with(levels[0], second)
        node.replace_input_with(levels[1], first)


def attention_mask_off_by_one(bundle: Path, target: str) -> None:
    """Shift the attention mask by one token; fused: decrease the operator's token count by one."""
    with edited(bundle, DECODER) as graph:
        fused = [node for node in graph if node.op_type == "GroupQueryAttention"]
        for node in fused:
            fewer = ir.node("Add", [node.inputs[5], _once(graph, "fewer", np.int32(-1))])
            insert_before_input(graph, node, 5, fewer)
        if fused:
            return
        mask = port(graph.inputs, "attention_mask")
        start, end, axis = (constant(graph, f"column_{n}", np.array([n], np.int64)) for n in (1, 2**62, -1))
        rest = ir.node("Slice", [mask, start, end, axis])
        shape = ir.node("Slice", [mask, constant(graph, "column_first", np.array([0], np.int64)), start, axis])
        blank = ir.node("Sub", [shape.outputs[0], shape.outputs[0]])
        insert_after(
            graph, mask, rest, shape, blank, ir.node("Concat", [rest.outputs[0], blank.outputs[0]], {"axis": -1})
        )


def causal_mask_off_by_one(bundle: Path, target: str) -> None:
    """Let each query attend to one token after itself."""
    with edited(bundle, DECODER) as graph:
        causal = [node for node in graph if node.op_type == "LessOrEqual"]
        if not causal:
            raise InapplicableError("attention is fused: the mask is inside the operator")
        for node in causal:
            later = ir.node("Add", [node.inputs[1], _once(graph, "later", np.int64(1))])
            insert_before_input(graph, node, 1, later)


def rotary_axes_swapped(bundle: Path, target: str) -> None:
    """Swap the height and width axes of the decoder's positions."""
    with edited(bundle, DECODER) as graph:
        positions = port(graph.inputs, "position_ids")
        order = constant(graph, "time_width_height", np.array([0, 2, 1], np.int64))
        insert_after(graph, positions, ir.node("Gather", [positions, order], {"axis": 0}))


def mrope_sections_permuted(bundle: Path, target: str) -> None:
    """Make the interleaved sections of the rotary embedding contiguous."""
    with edited(bundle, DECODER) as graph:
        positions = port(graph.inputs, "position_ids")
        bounded = [node.outputs[0] for node, _ in positions.uses() if node.op_type == "Min"]
        (node,) = [node for value in (positions, *bounded) for node, _ in value.uses() if node.op_type == "Gather"]
        axes = node.inputs[1]
        assert axes is not None
        interleaved = numbers(axes)
        blocks = np.sort(interleaved)
        if (blocks == interleaved).all():
            raise InapplicableError("the sections are contiguous")
        axes.const_value = ir.tensor(blocks, name=axes.name)


def rotary_theta_changed(bundle: Path, target: str) -> None:
    """Scale the base of the rotary frequencies by 1.01."""
    with edited(bundle, DECODER) as graph:
        frequencies = weight(graph, "rotary_emb.inv_freq")
        values = numbers(frequencies)
        exponents = np.arange(values.size).reshape(values.shape) / values.size
        frequencies.const_value = ir.tensor((values * 1.01**-exponents).astype(np.float32), name=frequencies.name)


def norm_epsilon_changed(bundle: Path, target: str) -> None:
    """Multiply the epsilon of the decoder's norms by 10."""
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
            insert_before_input(graph, node, index, ir.node("Mul", [small, ten]))


def mlp_scaled(bundle: Path, target: str, layer: int = 3) -> None:
    """Scale the output of the MLP of one decoder layer by 1.01."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, layer)
        down = reader(weight(graph, DOWN.format(layer))).outputs[0]
        insert_after(graph, down, ir.node("Mul", [down, constant(graph, "more", np.float32(1.01))]))


def layers_swapped(bundle: Path, target: str, layers: tuple[int, int] = (1, 2)) -> None:
    """Swap the down projections of two decoder layers."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, max(layers))
        first, second = (weight(graph, DOWN.format(layer)) for layer in layers)
        first.const_value, second.const_value = second.const_value, first.const_value


def weight_transposed(bundle: Path, target: str, layer: int = 1) -> None:
    """Store the output projection of one decoder layer in column-major order, without changing its shape."""
    with edited(bundle, DECODER) as graph:
        need_layer(graph, layer)
        matrix = weight(graph, f"layers.{layer}.self_attn.o_proj.weight")
        values = numbers(matrix)
        transposed = np.ascontiguousarray(values.T).reshape(values.shape)
        matrix.const_value = ir.tensor(transposed, name=matrix.name)


def image_token_unknown(bundle: Path, target: str) -> None:
    """Change the image token in genai_config.json."""
    path = bundle / "genai_config.json"
    if not path.exists():
        raise InapplicableError("the target has only settings for its inputs")
    edit_json(path, lambda settings: settings["model"].update(image_token_id=settings["model"]["bos_token_id"]))


def preprocessor_brighter(bundle: Path, target: str) -> None:
    """Scale the image preprocessor's table of normalized pixel values by 1.01."""
    if preprocessor_file(bundle) is None:
        raise InapplicableError("the bundle has no image preprocessor")
    with edited(bundle, PREPROCESSOR) as graph:
        (table,) = [value for value in graph.initializers.values() if numbers(value).size == 3 * 256]
        table.const_value = ir.tensor(numbers(table) * np.float32(1.01), name=table.name)


def _once(graph: ir.Graph, name: str, value: Any) -> ir.Value:
    return graph.initializers.get(f"mutation_{name}") or constant(graph, name, value)
