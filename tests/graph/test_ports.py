"""The ports of every graph, for both targets, with three DeepStack levels and with none."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from builder.checkpoint.load import Checkpoint, open_checkpoint
from builder.graph.ports import Component, Port, packed_width, past_ports, patch_width, present_ports
from builder.targets.graphs import components

Facts = dict[str, tuple[int | str, ...]]
PIXELS: Facts = {"pixel_values": ("patches", 1536), "image_grid_thw": ("images", 3)}


@pytest.fixture
def three(miniature: Path) -> Checkpoint:
    """H = 160, D = 3, 5 layers, 2 key-value heads of 32."""
    return open_checkpoint(miniature)


@pytest.fixture
def none(checkpoint: Callable[[str], Path]) -> Checkpoint:
    """H = 80, D = 0, 3 layers, 1 key-value head of 32."""
    return open_checkpoint(checkpoint("deepstack0"))


def shapes(ports: tuple[Port, ...]) -> Facts:
    """Name → shape, in the order of the ports, caches aside."""
    return {port.name: port.shape for port in ports if not port.name.startswith(("past_key", "present"))}


def ports(parts: tuple[Component, ...]) -> dict[str, tuple[Facts, Facts]]:
    return {part.name: (shapes(part.inputs), shapes(part.outputs)) for part in parts}


def masks() -> Facts:
    return {"attention_mask": ("batch", "total"), "position_ids": (3, "batch", "seq")}


@pytest.mark.parametrize(("fixture", "width", "vocab"), [("three", 640, 4096), ("none", 80, 4096)])
def test_genai_packs_deepstack_into_the_last_axis(
    request: pytest.FixtureRequest, fixture: str, width: int, vocab: int
) -> None:
    opened: Checkpoint = request.getfixturevalue(fixture)
    assert packed_width(opened) == width
    features: Facts = {"image_features": ("tokens", width)}
    embeds: Facts = {"inputs_embeds": ("batch", "seq", width)}
    assert ports(components(opened, "genai")) == {
        "vision_encoder": (PIXELS, features),
        "embeddings": ({"input_ids": ("batch", "seq"), **features}, embeds),
        "model": ({**embeds, **masks()}, {"logits": ("batch", 1, vocab)}),
    }


def test_onnxruntime_has_deepstack_in_ports_of_its_own(three: Checkpoint) -> None:
    embeds: Facts = {"inputs_embeds": ("batch", "seq", 160)}
    assert ports(components(three, "onnxruntime")) == {
        "vision_encoder": (PIXELS, {"pooled_embeds": ("tokens", 160), "deepstack_features": (3, "tokens", 160)}),
        "embeddings": ({"input_ids": ("batch", "seq")}, embeds),
        "model": (
            {**embeds, "deepstack_embeds": (3, "batch", "seq", 160), **masks()},
            {"logits": ("batch", "seq", 4096)},
        ),
    }


def test_onnxruntime_without_deepstack_has_no_such_ports(none: Checkpoint) -> None:
    embeds: Facts = {"inputs_embeds": ("batch", "seq", 80)}
    assert ports(components(none, "onnxruntime")) == {
        "vision_encoder": (PIXELS, {"pooled_embeds": ("tokens", 80)}),
        "embeddings": ({"input_ids": ("batch", "seq")}, embeds),
        "model": ({**embeds, **masks()}, {"logits": ("batch", "seq", 4096)}),
    }


@pytest.mark.parametrize("runtime", ["genai", "onnxruntime"])
@pytest.mark.parametrize(("fixture", "layers", "heads"), [("three", 5, 2), ("none", 3, 1)])
def test_caches_come_last_key_and_value_a_layer(
    request: pytest.FixtureRequest, runtime: str, fixture: str, layers: int, heads: int
) -> None:
    opened: Checkpoint = request.getfixturevalue(fixture)
    decoder = components(opened, runtime)[-1]
    for side, stem, axis in ((decoder.inputs, "past_key_values", "past"), (decoder.outputs, "present", "total")):
        wanted = [
            Port(f"{stem}.{layer}.{kind}", "float32", ("batch", heads, axis, 32))
            for layer in range(layers)
            for kind in ("key", "value")
        ]
        assert list(side[-2 * layers :]) == wanted
        assert sum(port.name.startswith(stem) for port in side) == 2 * layers
    assert decoder.inputs[-2 * layers :] == past_ports(opened)
    assert decoder.outputs[-2 * layers :] == present_ports(opened)


@pytest.mark.parametrize("runtime", ["genai", "onnxruntime"])
def test_what_counts_is_an_integer_and_what_is_computed_a_float(three: Checkpoint, runtime: str) -> None:
    integers = {"image_grid_thw", "input_ids", "attention_mask", "position_ids"}
    for component in components(three, runtime):
        for port in (*component.inputs, *component.outputs):
            assert port.dtype == ("int64" if port.name in integers else "float32")


def test_the_width_of_a_patch_follows_the_checkpoint(three: Checkpoint, checkpoint: Callable[[str], Path]) -> None:
    assert patch_width(three) == 3 * 2 * 16 * 16
    assert patch_width(open_checkpoint(checkpoint("patch14merge3"))) == 3 * 2 * 14 * 14


def test_the_manifest_quotes_files_and_ports(three: Checkpoint) -> None:
    vision, embeddings, model = components(three, "genai")
    assert [part.file for part in (vision, embeddings, model)] == [
        "vision_encoder.onnx",
        "embeddings.onnx",
        "model.onnx",
    ]
    assert embeddings.as_dict() == {
        "inputs": [
            {"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]},
            {"name": "image_features", "dtype": "float32", "shape": ["tokens", 640]},
        ],
        "outputs": [{"name": "inputs_embeds", "dtype": "float32", "shape": ["batch", "seq", 640]}],
    }
