"""A model of a few lines of arithmetic, as the three graphs of either runtime, and in numpy.

The graphs satisfy builder/graph/ports.py, and every port of the decoder affects the logits. numpy uses no cache, so
that a wrong cache shows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from builder.checkpoint.load import Checkpoint
from builder.graph.ports import Component, Port, packed_width
from builder.targets import registry
from builder.targets.clients.pipeline import Inputs
from builder.targets.graphs import GRAPHS, components
from builder.targets.recipe import Recipe, Target

Array = npt.NDArray[Any]
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
MERGED = 4  # patches per token


@dataclass(frozen=True)
class Toy:
    """One layer that stores what it is given, and answers from the mean of what it has stored.

    Args:
        checkpoint: with one layer, one head of `hidden`, and as many DeepStack levels as asked for.
        seed: of the weights.
    """

    checkpoint: Checkpoint
    seed: int

    @cached_property
    def weights(self) -> dict[str, Array]:
        """`embed` is as wide as the packed axis, zero behind `hidden`."""
        text, vision, rng = self.checkpoint.text, self.checkpoint.vision, np.random.default_rng(self.seed)
        levels, width = len(vision.deepstack), packed_width(self.checkpoint)
        pixels = MERGED * vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        shapes = {
            "embed": (text.vocab, width),
            "project": (pixels, width),
            "level": (levels,),
            "axis": (3, text.hidden),
            "head": (text.hidden, text.vocab),
        }
        weights = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        weights["embed"][:, text.hidden :] = 0
        weights["project"] /= np.float32(np.sqrt(pixels))
        weights["axis"] /= np.float32(80)
        return weights

    def tokens(self, inputs: Inputs, count: int, barred: tuple[int, ...] = ()) -> list[int]:
        """`count` greedy tokens that are none of `barred`, the whole sequence computed again for each."""
        ids, positions, delta = inputs.input_ids, inputs.position_ids, inputs.rope_delta
        for _ in range(count):
            logits = self.logits(ids, positions, inputs.pixel_values)
            logits[list(barred)] = -np.inf
            ids = np.append(ids, [[logits.argmax()]], axis=1)
            positions = np.append(positions, np.full((3, 1, 1), ids.shape[1] - 1 + delta), axis=2)
        return [int(token) for token in ids[0, inputs.input_ids.shape[1] :]]

    def logits(self, ids: Array, positions: Array, pixels: Array | None) -> Array:
        """[vocab] of the last position, from ids [1, seq], positions [3, 1, seq] and pixel values."""
        weights, hidden = self.weights, self.checkpoint.text.hidden
        packed = weights["embed"][ids[0]]  # [seq, width]
        if pixels is not None:
            is_image = ids[0] == self.checkpoint.image_token_id
            packed[is_image] = pixels.reshape(is_image.sum(), -1) @ weights["project"]
        main, levels = packed[:, :hidden], packed[:, hidden:].reshape(len(packed), -1, hidden)
        given = main + np.einsum("sdh,d->sh", levels, weights["level"])
        given = given + np.einsum("ts,th->sh", positions[:, 0].astype(np.float32), weights["axis"])
        stored = np.float32(1.5) * given.mean(axis=0) + np.float32(len(packed) / 100)
        logits: Array = np.tanh(given[-1] + stored) @ weights["head"]
        return logits

    def write(self, folder: Path, runtime: str) -> Path:
        """A bundle of the graphs, its configuration, and a minimal manifest."""
        folder.mkdir(parents=True)
        for name, graph in self.graphs(runtime).items():
            onnx.save(graph, folder / f"{name}.onnx")
        recipe = Recipe("toy", "fp32", (Target(runtime, "eager"),), 512)
        configs = registry.PACKAGING[runtime].configs(self.checkpoint, recipe, recipe.targets[0])
        (folder / "manifest.json").write_text(f'{{"target": "{runtime}"}}')
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / file).write_bytes((self.checkpoint.folder / file).read_bytes())
        for file, text in configs.items():
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    def graphs(self, runtime: str) -> dict[str, onnx.ModelProto]:
        """Return the graphs by role."""
        settings = GRAPHS[runtime]
        vision, embeddings, model = components(self.checkpoint, runtime)
        return {
            vision.name: self._vision(vision, settings.packed),
            embeddings.name: self._embeddings(embeddings, settings.merges),
            model.name: self._model(model, settings.packed),
        }

    def _vision(self, component: Component, packed: bool) -> onnx.ModelProto:
        project, hidden = self.weights["project"], self.checkpoint.text.hidden
        levels = len(self.checkpoint.vision.deepstack)
        nodes = [
            _node("Reshape", "pixel_values square", "squares"),
            _node("MatMul", "squares project", "all"),
        ]
        if packed or not levels:
            nodes += [_node("Identity", "all", component.outputs[0].name)]
        else:
            nodes += [
                _node("Split", "all sizes", "pooled_embeds rest", axis=1),
                _node("Reshape", "rest by_level", "levels"),
                _node("Transpose", "levels", "deepstack_features", perm=[1, 0, 2]),
            ]
        square, by_level = np.array([-1, len(project)]), np.array([-1, levels, hidden])
        sizes = np.array([hidden, levels * hidden])
        return _graph(component, nodes, project=project, square=square, sizes=sizes, by_level=by_level)

    def _embeddings(self, component: Component, merges: bool) -> onnx.ModelProto:
        width = int(component.outputs[0].shape[-1])
        embed = self.weights["embed"][:, :width]
        if not merges:
            return _graph(component, [_node("Gather", "embed input_ids", "inputs_embeds")], embed=embed)
        nodes = [
            _node("Gather", "embed input_ids", "text"),
            _node("Equal", "input_ids image", "is_image"),
            _node("Cast", "is_image", "ones", to=TensorProto.INT64),
            _node("CumSum", "ones one", "counted"),
            _node("Mul", "counted ones", "nth"),  # 0, the blank row, at text
            _node("Concat", "blank image_features", "table", axis=0),
            _node("Gather", "table nth", "features"),
            _node("Unsqueeze", "is_image last", "where"),
            _node("Where", "where features text", "inputs_embeds"),
        ]
        image, one, last = np.array(self.checkpoint.image_token_id), np.array(1), np.array([-1])
        blank = np.zeros((1, width), np.float32)
        return _graph(component, nodes, embed=embed, image=image, one=one, last=last, blank=blank)

    def _model(self, component: Component, packed: bool) -> onnx.ModelProto:
        hidden, levels = self.checkpoint.text.hidden, len(self.checkpoint.vision.deepstack)
        nodes = [
            *_given(levels, packed),
            _node("Unsqueeze", "given one", "kept"),
            _node("Mul", "kept half", "halved"),
            _node("Concat", "past_key_values.0.key kept", "present.0.key", axis=2),
            _node("Concat", "past_key_values.0.value halved", "present.0.value", axis=2),
            _node("Add", "present.0.key present.0.value", "sum"),
            _node("ReduceMean", "sum middle", "mean", keepdims=0),
            _node("Cast", "attention_mask", "counts", to=TensorProto.FLOAT),
            _node("ReduceSum", "counts one", "count"),
            _node("Mul", "count hundredth", "length"),
            _node("Add", "mean length", "stored"),
            _node("Unsqueeze", "stored one", "context"),
            _node("Add", "given context", "state"),
            _node("Tanh", "state", "answer"),
            _node("MatMul", "answer head", "scores"),
            _node("Slice", "scores minus_one end one", "logits") if packed else _node("Identity", "scores", "logits"),
        ]
        constants = {name: self.weights[name] for name in ("axis", "head", "level")} | {
            "one": np.array([1]),
            "minus_one": np.array([-1]),
            "end": np.array([2**31]),
            "middle": np.array([1, 2]),
            "half": np.float32(0.5),
            "hundredth": np.float32(0.01),
            "sizes": np.array([hidden, levels * hidden]),
            "by_level": np.array([0, 0, levels, hidden]),
        }
        return _graph(component, nodes, **constants)


def _given(levels: int, packed: bool) -> list[onnx.NodeProto]:
    """What a position is given: its embedding, its DeepStack levels and its place, weighted."""
    place = [
        _node("Cast", "position_ids", "places", to=TensorProto.FLOAT),
        _node("Einsum", "places axis", "placed", equation="tbs,th->bsh"),
    ]
    if not levels:
        return [*place, _node("Add", "inputs_embeds placed", "given")]
    unpack = [
        _node("Split", "inputs_embeds sizes", "main rest", axis=2),
        _node("Reshape", "rest by_level", "levels"),
        _node("Einsum", "levels level", "weighted", equation="bsdh,d->bsh"),
    ]
    stacked = [_node("Einsum", "deepstack_embeds level", "weighted", equation="dbsh,d->bsh")]
    main = "main" if packed else "inputs_embeds"
    added = [_node("Add", f"{main} weighted", "seen"), _node("Add", "seen placed", "given")]
    return [*place, *(unpack if packed else stacked), *added]


def toy(checkpoint: Checkpoint, *, levels: int, seed: int) -> Toy:
    """A toy that a checkpoint's tokenizer, template and image settings fit."""
    text = replace(checkpoint.text, hidden=16, layers=1, heads=1, kv_heads=1, head_dim=16)
    vision = replace(checkpoint.vision, deepstack=tuple(range(levels)))
    return Toy(replace(checkpoint, text=text, vision=vision), seed)


def _node(operator: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def _graph(component: Component, nodes: list[onnx.NodeProto], **constants: Any) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    weights = [numpy_helper.from_array(np.asarray(v), name) for name, v in constants.items() if name in used]
    inputs, outputs = ([_port(port) for port in side] for side in (component.inputs, component.outputs))
    graph = helper.make_graph(nodes, component.name, inputs, outputs, initializer=weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _port(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, TYPES[port.dtype], port.shape)
