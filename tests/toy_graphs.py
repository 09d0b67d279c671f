"""A model of a few lines of arithmetic, as the three graphs of either runtime, and once more in numpy.

In: a checkpoint's facts and a seed. Out: graphs that keep the contracts of builder/contract.py, and the greedy tokens
that they must lead to. Guaranteed: every port has its say in the logits; numpy knows no cache, so that a cache which
is kept wrongly shows.
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

from builder import targets
from builder.checkpoint import Checkpoint
from builder.contract import Component, Port, components, packed_width
from builder.pipeline import Inputs
from builder.recipe import Recipe, Target

Array = npt.NDArray[Any]
TYPES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64}
MERGED = 4  # patches a token


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
        drawn = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
        drawn["embed"][:, text.hidden :] = 0
        drawn["project"] /= np.float32(np.sqrt(pixels))
        drawn["axis"] /= np.float32(10)
        return drawn

    def tokens(self, inputs: Inputs, count: int, barred: tuple[int, ...] = ()) -> list[int]:
        """`count` greedy tokens that are none of `barred`, the whole sequence computed again for each."""
        ids, positions, delta = inputs.input_ids, inputs.position_ids, inputs.rope_delta
        for _ in range(count):
            logits = self._logits(ids, positions, inputs.pixel_values)
            logits[list(barred)] = -np.inf
            ids = np.append(ids, [[logits.argmax()]], axis=1)
            positions = np.append(positions, np.full((3, 1, 1), ids.shape[1] - 1 + delta), axis=2)
        return [int(token) for token in ids[0, inputs.input_ids.shape[1] :]]

    def _logits(self, ids: Array, positions: Array, pixels: Array | None) -> Array:
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
        """A bundle of the graphs, its configuration, and the least manifest."""
        folder.mkdir(parents=True)
        build = {"vision_encoder": self._vision, "embeddings": self._embeddings, "model": self._model}
        for component in components(self.checkpoint, runtime):
            onnx.save(build[component.name](component, runtime == "genai"), folder / component.file)
        recipe = Recipe("toy", "fp32", (Target(runtime, "eager"),), 512)  # type: ignore[arg-type]
        configs = targets.TARGETS[runtime].configs(self.checkpoint, recipe, recipe.targets[0])
        (folder / "manifest.json").write_text(f'{{"target": "{runtime}"}}')
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            (folder / file).write_bytes((self.checkpoint.folder / file).read_bytes())
        for file, text in configs.items():
            (folder / file).write_text(text, encoding="utf-8")
        return folder

    def _vision(self, component: Component, packed: bool) -> onnx.ModelProto:
        hidden, levels = self.checkpoint.text.hidden, len(self.checkpoint.vision.deepstack)
        square = self.weights["project"].shape[0]
        nodes = [
            helper.make_node("Reshape", ["pixel_values", "square"], ["squares"]),
            helper.make_node("MatMul", ["squares", "project"], [component.outputs[0].name if packed else "all"]),
        ]
        constants = {"square": np.array([-1, square]), "project": self.weights["project"]}
        if not packed:
            nodes += [
                helper.make_node("Split", ["all", "sizes"], ["pooled_embeds", "rest"], axis=1),
                helper.make_node("Reshape", ["rest", "by_level"], ["levels"]),
                helper.make_node("Transpose", ["levels"], ["deepstack_features"], perm=[1, 0, 2]),
            ][: 3 if levels else 0]
            nodes += [] if levels else [helper.make_node("Identity", ["all"], ["pooled_embeds"])]
            constants |= {"sizes": np.array([hidden, levels * hidden]), "by_level": np.array([-1, levels, hidden])}
        return _graph(component, nodes, constants)

    def _embeddings(self, component: Component, packed: bool) -> onnx.ModelProto:
        width = component.outputs[0].shape[-1]
        constants = {"embed": self.weights["embed"][:, :width]}
        if not packed:
            return _graph(component, [helper.make_node("Gather", ["embed", "input_ids"], ["inputs_embeds"])], constants)
        nodes = [
            helper.make_node("Gather", ["embed", "input_ids"], ["text"]),
            helper.make_node("Equal", ["input_ids", "image"], ["is_image"]),
            helper.make_node("Cast", ["is_image"], ["ones"], to=TensorProto.INT64),
            helper.make_node("CumSum", ["ones", "one"], ["counted"]),
            helper.make_node("Mul", ["counted", "ones"], ["nth"]),
            helper.make_node("Concat", ["blank", "image_features"], ["table"], axis=0),
            helper.make_node("Gather", ["table", "nth"], ["features"]),
            helper.make_node("Unsqueeze", ["is_image", "last"], ["where"]),
            helper.make_node("Where", ["where", "features", "text"], ["inputs_embeds"]),
        ]
        constants |= {"image": np.array(self.checkpoint.image_token_id), "one": np.array(1), "last": np.array([-1])}
        return _graph(component, nodes, constants | {"blank": np.zeros((1, int(width)), np.float32)})

    def _model(self, component: Component, packed: bool) -> onnx.ModelProto:
        hidden, levels = self.checkpoint.text.hidden, len(self.checkpoint.vision.deepstack)
        nodes = [
            helper.make_node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT),
            helper.make_node("Einsum", ["places", "axis"], ["placed"], equation="tbs,th->bsh"),
            helper.make_node("Add", ["main", "placed"], ["plain"]),
            helper.make_node("Unsqueeze", ["given", "one"], ["kept"]),
            helper.make_node("Mul", ["kept", "half"], ["halved"]),
            helper.make_node("Concat", ["past_key_values.0.key", "kept"], ["present.0.key"], axis=2),
            helper.make_node("Concat", ["past_key_values.0.value", "halved"], ["present.0.value"], axis=2),
            helper.make_node("Add", ["present.0.key", "present.0.value"], ["sum"]),
            helper.make_node("ReduceMean", ["sum", "middle"], ["mean"], keepdims=0),
            helper.make_node("Cast", ["attention_mask"], ["counts"], to=TensorProto.FLOAT),
            helper.make_node("ReduceSum", ["counts", "one"], ["count"]),
            helper.make_node("Mul", ["count", "hundredth"], ["length"]),
            helper.make_node("Add", ["mean", "length"], ["stored"]),
            helper.make_node("Unsqueeze", ["stored", "one"], ["context"]),
            helper.make_node("Add", ["given", "context"], ["state"]),
            helper.make_node("Tanh", ["state"], ["answer"]),
            helper.make_node("MatMul", ["answer", "head"], ["all_logits"]),
            helper.make_node("Gather" if packed else "Identity", ["all_logits", "end"][: 1 + packed], ["logits"])
            if not packed
            else helper.make_node("Slice", ["all_logits", "minus_one", "end", "one"], ["logits"]),
        ]
        weights = {name: self.weights[name] for name in ("axis", "head", "level")}
        constants = weights | {
            "one": np.array([1]),
            "minus_one": np.array([-1]),
            "end": np.array([2**31]),
            "middle": np.array([1, 2]),
            "half": np.float32(0.5),
            "hundredth": np.float32(0.01),
            "sizes": np.array([hidden, levels * hidden]),
            "by_level": np.array([0, 0, levels, hidden]),
        }
        nodes[:0] = [helper.make_node("Identity", ["inputs_embeds"], ["main"])]
        nodes.insert(4, helper.make_node("Identity", ["plain"], ["given"]))
        if levels:
            nodes[4] = helper.make_node("Add", ["plain", "levels"], ["given"])
            stacked, equation = ("deepstack_embeds", "dbsh,d->bsh")
            if packed:
                nodes[:1] = [
                    helper.make_node("Split", ["inputs_embeds", "sizes"], ["main", "rest"], axis=2),
                    helper.make_node("Reshape", ["rest", "by_level"], ["stacked"]),
                ]
                stacked, equation = ("stacked", "bsdh,d->bsh")
            index = next(i for i, node in enumerate(nodes) if "given" in node.output)
            nodes.insert(index, helper.make_node("Einsum", [stacked, "level"], ["levels"], equation=equation))
        return _graph(component, nodes, constants)


def toy(checkpoint: Checkpoint, *, levels: int, seed: int) -> Toy:
    """A toy that a checkpoint's tokenizer, template and image settings fit."""
    text = replace(checkpoint.text, hidden=8, layers=1, heads=1, kv_heads=1, head_dim=8)
    vision = replace(checkpoint.vision, deepstack=tuple(range(levels)))
    return Toy(replace(checkpoint, text=text, vision=vision), seed)


def _graph(component: Component, nodes: list[onnx.NodeProto], constants: dict[str, Any]) -> onnx.ModelProto:
    used = {name for node in nodes for name in node.input}
    initializers = [
        numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items() if name in used
    ]
    ports = ([_port(port) for port in side] for side in (component.inputs, component.outputs))
    graph = helper.make_graph(nodes, component.name, *ports, initializer=initializers)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def _port(port: Port) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(port.name, TYPES[port.dtype], port.shape)
