"""The largest magnitude inside each layer, and what becomes of a layer that fp16 cannot hold."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest

from builder.checkpoint.load import open_checkpoint
from builder.checkpoint.parts import DECODER, VISION
from builder.checkpoint.source import parse_source
from builder.quantization import activation_ranges as module
from builder.quantization.activation_ranges import FP16_MAX, MARGIN, Range, activation_ranges, wide_layers
from builder.reference.cases import shipped_cases
from builder.reference.model import Reference
from builder.stages import quantize
from builder.stages.engine.build import Build
from builder.stages.engine.execute import execute
from builder.targets.recipe_file import load_recipe
from builder.verify.graphs.all_logits import FloatSession, shipped_graphs, teacher_forced
from builder.verify.graphs.sessions import Graphs
from tests.helpers.edits import edit_tensors

pytestmark = pytest.mark.torch

SHAPE = "deepstack0"
LAYER = "model.language_model.layers.1.mlp"


@pytest.fixture(autouse=True)
def _few(monkeypatch: pytest.MonkeyPatch) -> None:
    few = tuple(case for case in shipped_cases() if case.name in ("text", "one image"))
    monkeypatch.setattr(module, "suite_cases", lambda checkpoint, folder: few)


def by_hand(reference: Reference, ids: Any, positions: Any) -> float:
    """The largest magnitude of anything that a module of the first decoder layer gives, without hooks."""
    torch, text = reference.torch, reference.model.model.language_model
    layer = text.layers[0]
    with torch.no_grad():
        stream = text.embed_tokens(ids)
        angles = text.rotary_emb(stream, positions)
        normed = layer.input_layernorm(stream)
        attention, mlp = layer.self_attn, layer.mlp
        heads = (*normed.shape[:2], -1, attention.head_dim)
        query, key, value = (getattr(attention, f"{name}_proj")(normed) for name in "qkv")
        attended = attention(normed, position_embeddings=angles, attention_mask=None)[0]
        between = stream + attended
        second = layer.post_attention_layernorm(between)
        gate, up = mlp.gate_proj(second), mlp.up_proj(second)
        down = mlp.down_proj(mlp.act_fn(gate) * up)
        normed_heads = attention.q_norm(query.view(heads)), attention.k_norm(key.view(heads))
    given = (normed, query, key, value, *normed_heads, attended, second, gate, mlp.act_fn(gate), up, down)
    return max(float(one.abs().max()) for one in (*given, between + down))


def test_ranges_are_those_of_the_modules(checkpoint: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    text = tuple(case for case in shipped_cases() if case.name == "text")
    monkeypatch.setattr(module, "suite_cases", lambda checkpoint, folder: text)
    reference = Reference(open_checkpoint(checkpoint(SHAPE)))
    (case,) = text
    prompt = reference.prepare(case.prompt, case.images)
    ids, positions = (reference.torch.from_numpy(array) for array in (prompt.input_ids, prompt.position_ids))
    found = activation_ranges(reference)
    assert [(one.graph, one.layer) for one in found] == [(DECODER, layer) for layer in range(3)]
    assert found[0].magnitude == pytest.approx(by_hand(reference, ids, positions), rel=1e-5)


def test_every_layer_of_both_graphs_is_measured_and_streaming_changes_nothing(
    checkpoint: Callable[[str], Path],
) -> None:
    opened = open_checkpoint(checkpoint(SHAPE))
    found = activation_ranges(Reference(opened, streamed=True))
    depth, layers = opened.vision.depth, opened.text.layers
    assert {(one.graph, one.layer) for one in found} == {
        *((VISION, layer) for layer in range(depth)),
        *((DECODER, layer) for layer in range(layers)),
    }
    whole = activation_ranges(Reference(opened))
    assert [one.magnitude for one in found] == pytest.approx([one.magnitude for one in whole], rel=1e-5)


def test_a_layer_near_the_end_of_fp16_is_wide() -> None:
    near, far = Range(DECODER, 0, FP16_MAX / MARGIN * 1.01, ""), Range(DECODER, 1, FP16_MAX / MARGIN * 0.99, "")
    assert (near.wide, far.wide) == (True, False)
    other = Range(VISION, 2, np.inf, "mlp")
    assert wide_layers([near, far, other]) == {DECODER: frozenset({0}), VISION: frozenset({2})}
    assert wide_layers([far]) == {DECODER: frozenset()}


@pytest.fixture
def loud(checkpoint: Callable[[str], Path], tmp_path: Path) -> Path:
    """What is inside one feed-forward network is 100,000 times as large, what it gives is as it was."""
    folder = Path(shutil.copytree(checkpoint(SHAPE), tmp_path / "loud"))

    def blow_up(tensors: dict[str, Any]) -> None:
        tensors[f"{LAYER}.up_proj.weight"] *= np.float16(1e5**0.5)
        tensors[f"{LAYER}.up_proj.weight"] *= np.float16(1e5**0.5)
        tensors[f"{LAYER}.down_proj.weight"] *= np.float16(1e-5**0.5)
        tensors[f"{LAYER}.down_proj.weight"] *= np.float16(1e-5**0.5)

    edit_tensors("model.safetensors", blow_up)(folder)
    return folder


def half(checkpoint: Path, outputs: Path, name: str) -> Path:
    """A bundle in fp16."""
    build = Build(parse_source(str(checkpoint)), replace(load_recipe("fp16"), name=name), outputs / name)
    execute(build, until="configure")
    return build.folder("configure") / "genai"


def all_values_open(folder: Path) -> None:
    """Makes every value of the decoder an output: what is no output ONNX Runtime's CPU provider may keep in fp32."""
    model = onnx.load(folder / f"{DECODER}.onnx", load_external_data=False)
    known = {port.name for port in model.graph.output}
    fresh = [name for node in model.graph.node for name in node.output if name and name not in known]
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in fresh)
    (folder / f"{DECODER}.onnx").unlink()
    onnx.save(model, folder / f"{DECODER}.onnx")


def infinite(folder: Path, checkpoint: Path) -> list[str]:
    """Values of the decoder that leave the range of their type, on one prompt."""
    opened = open_checkpoint(checkpoint)
    prompt = Reference(opened).prepare("Read the number.", ())
    ids = prompt.input_ids
    session = onnxruntime.InferenceSession(folder / f"{DECODER}.onnx", providers=["CPUExecutionProvider"])
    graphs = Graphs(None, None, FloatSession(session), packed=True, hidden=opened.text.hidden)
    feed = {
        "inputs_embeds": Reference(opened).embed(ids),
        "attention_mask": np.ones_like(ids),
        "position_ids": prompt.position_ids,
        **graphs.empty_past(1),
    }
    values = zip(session.get_outputs(), graphs.model.run(None, feed), strict=True)
    return [port.name for port, value in values if value.dtype.kind == "f" and not np.isfinite(value).all()]


def test_a_layer_that_is_kept_wide_stays_finite(loud: Path, outputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = open_checkpoint(loud)
    reference = Reference(opened)
    ranges = activation_ranges(reference)
    assert wide_layers(ranges) == {VISION: frozenset(), DECODER: frozenset({1})}
    (one,) = [one for one in ranges if one.wide]
    assert one.magnitude > FP16_MAX
    assert one.module.startswith("mlp")

    wide = half(loud, outputs, "fp16-loud")
    (case,) = [case for case in shipped_cases() if case.name == "one image"]
    prompt = reference.prepare(case.prompt, case.images)
    got, streams = teacher_forced(shipped_graphs(wide, "genai", opened.text.hidden), prompt, (), opened.image_token_id)
    assert len(streams) == opened.text.layers
    want = reference.logits(prompt, ())
    assert float(np.abs(got - want).mean() / want.std()) < 0.1
    all_values_open(wide)
    assert infinite(wide, loud) == []

    monkeypatch.setattr(quantize, "wide_layers", lambda ranges: {})
    narrow = half(loud, outputs, "fp16-loud-narrow")
    all_values_open(narrow)
    assert infinite(narrow, loud)
