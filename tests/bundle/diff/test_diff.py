"""`diff`: equal bundles are equal, every kind of change is named, errors are figures, weights are streamed."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from typer.testing import CliRunner, Result

from builder.bundle.diff.diff import diff, flat
from builder.bundle.diff.render import markdown, renderables, sections
from builder.cli.app import app
from builder.util.console_table import as_text
from tests.helpers.bundles import DATA, edit_graph, edit_manifest, graph, relisted, small_bundle, write_json
from tests.helpers.hostile import mutated, outcome

Change = Callable[[Path], object]


@pytest.fixture
def one(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "one")


@pytest.fixture
def other(one: Path, tmp_path: Path) -> Path:
    """A copy that a test may alter."""
    return Path(shutil.copytree(one, tmp_path / "other"))


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["diff", *(str(one) for one in arguments)])


def changed(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    edit_graph(folder, change)
    relisted(folder)


def test_equal_bundles_are_equal_whatever_was_measured(one: Path, tmp_path: Path) -> None:
    again = small_bundle(tmp_path / "other", error=3e-5)
    result = invoke(one, again)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("The bundles are equal; 2 weights compared.")
    found = json.loads(invoke(one, again, "--json").stdout)
    assert found["equal"] is True
    assert found["quality"]["decoder prefill"] == [2e-6, 3e-5]
    assert found["quality"]["verdict"] == ["passed", "passed"]
    assert "2.0e-06" in result.stdout


def test_other_weights_have_an_error(one: Path, other: Path) -> None:
    """Equal to what numpy says of the whole tensors."""
    graph(other / "model.onnx", seed=1)
    relisted(other)
    found = diff(one, other)
    assert not found.equal
    (weight,) = found.weights
    a, b = (np.fromfile(folder / DATA, np.float32).astype(np.float64) for folder in (one, other))
    assert (weight.graph, weight.name) == ("model.onnx", "w")
    assert weight.largest == pytest.approx(np.abs(a - b).max() / a.std())
    assert weight.rms == pytest.approx(np.sqrt(np.square(a - b).mean() / np.square(a).mean()))
    assert found.graphs == {}
    assert invoke(one, other).exit_code == 1


def half(model: onnx.ModelProto) -> None:
    """The bias in float16."""
    bias = model.graph.initializer[1]
    bias.CopyFrom(numpy_helper.from_array(np.full(4, 0.5, np.float16), "b"))


def renamed(model: onnx.ModelProto) -> None:
    model.graph.initializer[1].name = "c"
    model.graph.node[2].input[1] = "c"


def joined(model: onnx.ModelProto) -> None:
    """The same operators in another order."""
    model.graph.node[2].input[:] = reversed(model.graph.node[2].input)


GRAPHS: dict[str, tuple[Callable[[onnx.ModelProto], object], str, str]] = {
    "an operator more": (
        lambda model: model.graph.node.append(helper.make_node("Relu", ["y"], ["z"])),
        "operators",
        "Relu",
    ),
    "another operator": (lambda model: setattr(model.graph.node[2], "op_type", "Sub"), "operators", "Add"),
    "another opset": (lambda model: setattr(model.opset_import[0], "version", 19), "opsets", ""),
    "another port": (lambda model: setattr(model.graph.input[0], "name", "z"), "ports", "inputs: x"),
    "another axis": (
        lambda model: setattr(model.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "m"),
        "ports",
        "inputs: x",
    ),
    "another type": (half, "initializers", "b"),
    "another name": (renamed, "initializers", "c"),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_what_changed_in_a_graph_is_named(one: Path, other: Path, name: str) -> None:
    change, kind, key = GRAPHS[name]
    changed(other, change)
    found = diff(one, other)
    assert key in getattr(found.graphs["model.onnx"], kind)
    assert not found.equal
    assert "model.onnx" in as_text(*renderables(found))


def test_another_type_of_equal_values_has_no_error(one: Path, other: Path) -> None:
    changed(other, half)
    (weight,) = diff(one, other).weights
    assert (weight.largest, weight.rms) == (0.0, 0.0)
    assert weight.digests[0] != weight.digests[1]


def test_the_same_operators_joined_otherwise_are_told(one: Path, other: Path) -> None:
    changed(other, joined)
    found = diff(one, other)
    assert found.graphs["model.onnx"].other
    assert "joined, named or set otherwise" in as_text(*renderables(found))


def test_constants_without_a_name_are_told_apart_by_value(one: Path, other: Path) -> None:
    """A pass that adds one renumbers the others."""

    def constants(*values: int) -> Callable[[onnx.ModelProto], object]:
        return lambda model: model.graph.initializer.extend(
            numpy_helper.from_array(np.array(value), f"constant_{n}") for n, value in enumerate(values)
        )

    changed(one, constants(1, 2, 3))
    changed(other, constants(0, 1, 2, 3))
    found = diff(one, other)
    assert found.graphs["model.onnx"].constants == (0, 1)
    assert found.weights == ()
    assert "1 that the other lacks" in as_text(*renderables(found))


def test_settings_differ_by_key(one: Path, other: Path) -> None:
    settings = {"model": {"decoder": {"filename": "model.onnx", "hidden_size": 8}, "eos": [1, 2]}}
    write_json(other / "genai_config.json", settings)
    (other / "chat_template.jinja").write_text("{{ messages }}\nmore\n")
    (other / "new.txt").write_text("x")
    relisted(other)
    found = diff(one, other)
    assert found.settings == {
        "genai_config.json": {
            "model.decoder.hidden_size": (4, 8),
            "model.eos[0]": (None, 1),
            "model.eos[1]": (None, 2),
        }
    }
    assert found.files == {"chat_template.jinja": "1 lines added, 0 removed", "new.txt": "only in the second"}


def test_facts_differ_by_key(one: Path, other: Path) -> None:
    edit_manifest(other, lambda content: content["versions"].update({"torch": "2.14.0"}))
    edit_manifest(other, lambda content: content["recipe"].update({"max_length": 128}))
    found = diff(one, other)
    assert found.facts == {"recipe.max_length": (64, 128), "versions.torch": ("2.13.0", "2.14.0")}
    assert "The bundles differ in 2 facts" in as_text(*renderables(found))


def test_other_bytes_that_say_the_same_are_no_secret(one: Path, other: Path) -> None:
    """Weights laid out otherwise in their file, a JSON file indented otherwise."""

    def moved(model: onnx.ModelProto) -> None:
        for entry in model.graph.initializer[0].external_data:
            entry.value = {"offset": "64"}.get(entry.key, entry.value)

    (other / DATA).write_bytes(b"\0" * 64 + (other / DATA).read_bytes())
    changed(other, moved)
    found = diff(one, other)
    assert set(found.files) == {DATA, "model.onnx"}
    assert not found.equal
    write_json(other / "tokenizer.json", json.loads((other / "tokenizer.json").read_text()))
    (one / "tokenizer.json").write_text(json.dumps(json.loads((one / "tokenizer.json").read_text())))
    relisted(one)
    assert diff(one, other).settings == {"tokenizer.json": {"": ("the same values", "in another order or layout")}}


def test_markdown_and_text_and_json_say_the_same(one: Path, other: Path) -> None:
    graph(other / "model.onnx", seed=1)
    write_json(other / "x.json", {"<b>|`": "</code> @everyone"})
    write_json(one / "x.json", {"<b>|`": "\x1b[2J"})
    for folder in (one, other):
        relisted(folder)
    page = invoke(one, other, "--markdown")
    assert page.exit_code == 1
    for said in ("### The bundles differ in", "#### Weights", "#### Settings", "| <code>model&#46;onnx</code> |"):
        assert said in page.stdout
    assert "@everyone" not in page.stdout
    assert "\x1b" not in page.stdout + invoke(one, other).stdout
    titles = [section.title for section in sections(diff(one, other))]
    assert titles == ["Weights", "Settings", "Measured (makes no difference)"]
    assert markdown(diff(one, other)) + "\n" == page.stdout
    payload = json.loads(invoke(one, other, "--json").stdout)
    assert (payload["ok"], payload["equal"], payload["weights"]["compared"]) == (True, False, 2)
    assert invoke(one, other, "--json", "--markdown").exit_code == 2


def test_a_long_list_is_cut_and_says_so(one: Path, other: Path) -> None:
    write_json(other / "tokenizer.json", {"vocab": {str(n): n for n in range(5000)}})
    relisted(other)
    found = diff(one, other)
    assert len(found.settings["tokenizer.json"]) == 1001
    assert "more; --json has all" in as_text(*renderables(found))
    assert len(as_text(*renderables(found))) < 20_000


def test_what_is_no_bundle_or_leads_out_is_refused(one: Path, other: Path, tmp_path: Path) -> None:
    def above(model: onnx.ModelProto) -> None:
        model.graph.initializer[0].external_data[0].value = "../one/model.onnx.data"

    changed(other, above)
    assert invoke(one, other).exit_code == 12
    assert invoke(one, tmp_path).exit_code == 21


@pytest.mark.parametrize(
    ("value", "expected"), [({"a": [], "b": {}}, {"a": [], "b": {}}), ([], {"": []}), (1, {"": 1})]
)
def test_flat_keeps_what_is_empty(value: Any, expected: dict[str, Any]) -> None:
    assert dict(flat(value)) == expected


FILES = ("model.onnx", "manifest.json", "genai_config.json", DATA)


@pytest.mark.seconds
def test_a_few_drawn_bytes_are_compared_or_refused(one: Path, other: Path) -> None:
    """Whatever a file holds, in a manifest that lists it."""
    counts: Counter[str] = Counter()
    for seed in range(160):
        name = FILES[seed % len(FILES)]
        kept = {file: (other / file).read_bytes() for file in (name, "manifest.json")}
        (other / name).write_bytes(mutated(kept[name], random.Random(seed)))
        if name != "manifest.json":
            relisted(other, graphs=False)
        counts[outcome(lambda: as_text(*renderables(diff(one, other))))] += 1
        for file, content in kept.items():
            (other / file).write_bytes(content)
    assert counts["accepted"] > 20
    assert counts["BundleError"] > 20
