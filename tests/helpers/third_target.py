"""A fictional runtime: graphs in a subfolder, its own names, embeddings that only look up.

Its graphs are those of tests/helpers/toy_graphs.py, whose answers numpy computes; it runs in plain sessions.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from builder.checkpoint.fingerprint import FETCHED, NOTICES
from builder.checkpoint.load import Checkpoint
from builder.checkpoint.parts import DECODER, EMBEDDINGS, VISION
from builder.graph.external_data import DIGESTS
from builder.stages import bundle, configure
from builder.targets import graphs, notes, registry
from builder.targets.clients import pipeline
from builder.targets.clients.pipeline import Inputs
from builder.targets.config_files import pipeline_settings, vision_processor
from builder.targets.graphs import GraphSettings
from builder.targets.notes import Notes
from builder.targets.recipe import Recipe, Target
from builder.targets.runners import registry as runners
from builder.targets.runners.protocol import SettingsRunner
from builder.targets.runners.registry import Runtime
from builder.targets.spec import GraphFiles, Packaging
from builder.util.files import sha256
from builder.verify.graphs import sessions
from builder.verify.report.context import Context
from builder.verify.report.gates import Gate, Report
from builder.verify.report.write import write
from patches import SETS
from tests.helpers.toy_graphs import Toy

NAME, EXTRA = "third", "image_preprocessor"
STEMS = {VISION: "vision_encoder", EMBEDDINGS: "embed_tokens", DECODER: "decoder_model_merged", EXTRA: EXTRA}
RECIPE = Recipe("toy", "fp32", (Target(NAME, "eager"),), 512)


def layout(graph: str, recipe: Recipe) -> GraphFiles:
    suffix = "" if recipe.precision == "fp32" else f"_{recipe.precision}"
    path = f"onnx/{STEMS[graph]}{suffix}.onnx"
    return GraphFiles(path, f"{path}_data")


class Third(SettingsRunner):
    """Greedy, in plain sessions."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.graphs = sessions.Graphs.load(folder, True, self.settings.hidden)

    def tokens(self, inputs: Inputs, max_new_tokens: int, min_new_tokens: int = 0) -> Iterator[int]:
        s, graphs = self.settings, self.graphs
        main, levels = np.zeros((0, s.hidden), np.float32), [np.zeros((0, s.hidden), np.float32)] * s.deepstack
        if inputs.pixel_values is not None and inputs.image_grid_thw is not None:
            main, levels = graphs.vision(inputs.pixel_values, inputs.image_grid_thw)
        given, levels = graphs.embed(inputs.input_ids, main, levels, s.image_token_id)
        positions, past, total = inputs.position_ids, None, inputs.input_ids.shape[1]
        for _ in range(max_new_tokens):
            logits, past = graphs.decode(given, levels, positions, np.ones((1, total), np.int64), past)
            token = int(logits[0, -1].argmax())
            yield token
            ids = np.array([[token]], np.int64)
            given, levels = graphs.embed(ids, main[:0], [level[0, :0] for level in levels], s.image_token_id)
            positions, total = np.full((3, 1, 1), total + inputs.rope_delta, np.int64), total + 1


def further(checkpoint: Checkpoint, recipe: Recipe) -> Mapping[str, onnx.ModelProto]:
    """A graph of another role, in an opset of its own."""
    x, y = (
        helper.make_tensor_value_info(name, TensorProto.UINT8, ["height", "width", 3]) for name in ("image", "same")
    )
    graph = helper.make_graph([helper.make_node("Identity", ["image"], ["same"])], EXTRA, [x], [y])
    return {EXTRA: helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)}


GRAPHS = GraphSettings(
    attentions=("eager",),
    domains=frozenset({""}),
    packed=True,
    batch="batch_size",
    precisions=("fp32", "fp16"),
)

NOTES = Notes("third.js", ("third",), ("third ask .",), ("It is not there.",))

PACKAGING = Packaging(
    configs=lambda checkpoint, recipe, target: {
        "vision_processor.json": vision_processor(checkpoint),
        "pipeline.json": pipeline_settings(checkpoint, recipe.max_length),
    },
    layout=layout,
    further=further,
)

RUNTIME = Runtime(
    open=lambda folder, trusted: Third(folder),
    versions=lambda: {"third": "3.0"},
)


def registered(patch: pytest.MonkeyPatch) -> None:
    """In the three tables, as long as `patch` holds."""
    patch.setitem(graphs.GRAPHS, NAME, GRAPHS)
    patch.setitem(registry.PACKAGING, NAME, PACKAGING)
    patch.setitem(notes.NOTES, NAME, NOTES)
    patch.setitem(runners.RUNTIMES, NAME, RUNTIME)


def built(toy: Toy, folder: Path) -> Path:
    """The bundle of `toy`, by the stages `configure` and `bundle`; what comes before them is laid there by hand."""
    build: Any = SimpleNamespace(
        recipe=RECIPE,
        checkpoint=toy.checkpoint,
        source=SimpleNamespace(repo=None),
        folder=lambda stage: folder / stage,
    )
    digests = _filled(toy, folder / "quantize" / NAME)
    patches = {name: {"target": "a:b", "why": "so", "digest": "0" * 12} for name in SETS["eager"]}
    _json(folder / "quantize" / DIGESTS, {"data": digests, "checkpoint": {}})
    _json(folder / "patch" / "patches.json", {"patches": patches})
    _json(folder / "fetch" / FETCHED, {"files": {}})
    (folder / "fetch" / NOTICES).mkdir()
    for name in patches:
        (folder / "patch" / f"{name}.diff").write_text("")
    configure.run(build, folder / "configure")
    write(Report(NAME, "toy", (Gate("tokens", "text", 0, 0),), {}), folder / "verify" / NAME, Context())
    for stage in ("fetch", "patch", "export", "optimize", "quantize", "configure", "verify"):
        _json(folder / stage / "stage.json", {})
    bundle.run(build, folder / "bundle")
    return folder / "bundle" / NAME


def _filled(toy: Toy, folder: Path) -> dict[str, Any]:
    """As `quantize` leaves them, the table of the embeddings in the decoder's file."""
    folder.mkdir(parents=True)
    for name, model in toy.graphs(NAME).items():
        path = folder / f"{name}.onnx"
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data", size_threshold=1024)
    own, shared = folder / "embeddings.onnx.data", folder / "model.onnx.data"
    offset = shared.stat().st_size
    shared.write_bytes(shared.read_bytes() + own.read_bytes())
    own.unlink()
    graph = onnx.load(folder / "embeddings.onnx", load_external_data=False)
    (table,) = [one for one in graph.graph.initializer if one.data_location == TensorProto.EXTERNAL]
    for entry in table.external_data:
        entry.value = {"location": shared.name, "offset": str(offset)}.get(entry.key, entry.value)
    onnx.save(graph, folder / "embeddings.onnx")
    data = [path for path in folder.iterdir() if path.suffix == ".data"]
    return {f"{NAME}/{path.name}": {"bytes": path.stat().st_size, "sha256": sha256(path)} for path in data}


def _json(path: Path, content: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def prepare(folder: Path, prompt: str, images: list[Path]) -> Inputs:
    """Our exact preprocessing, by the settings in the bundle."""
    settings, vision = (
        pipeline.read_settings(folder / "pipeline.json"),
        pipeline.read_image_settings(folder / "vision_processor.json"),
    )
    return pipeline.prepare(prompt, images, pipeline.load_tokenizer(folder / "tokenizer.json"), settings, vision)
