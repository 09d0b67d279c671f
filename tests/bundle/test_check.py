"""`check`: an unchanged bundle passes; every change is refused, with the file's name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import helper
from typer.testing import CliRunner, Result

from builder.bundle.check import check
from builder.bundle.inventory import open_content
from builder.cli.app import app
from builder.targets.clients import pipeline
from tests.helpers.bundles import DATA, edit_graph, edit_manifest, relisted, small_bundle, write_json
from tests.helpers.hostile import ODD_VALUES, outcome, snapshot

Change = Callable[[Path], object]


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "genai")


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_complete_bundle_passes_and_is_described(bundle: Path) -> None:
    before = snapshot(bundle)
    result = invoke("check", bundle)
    assert result.exit_code == 0, result.output
    for text in ("files", "contract", "operators", "external data", "SHA-256 of", "not signed", "manifest.json"):
        assert text in result.stdout
    payload = json.loads(invoke("check", bundle, "--json").stdout)
    assert (payload["ok"], payload["target"], payload["signature"]) == (True, "genai", "none")
    assert payload["checks"][0]["check"] == "files"
    assert snapshot(bundle) == before


def test_files_of_the_hub_client_are_ignored(bundle: Path) -> None:
    (bundle / ".gitattributes").write_text("*.data filter=lfs\n")
    (bundle / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (bundle / ".cache" / "huggingface" / "download" / "x.metadata").write_text("x")
    assert check(bundle).target == "genai"
    (bundle / ".cache" / "more").write_text("x")
    assert "more" in json.loads(invoke("check", bundle, "--json").stdout)["what"]


def test_programs_are_listed_and_this_releases_are_known(bundle: Path) -> None:
    shutil.copyfile(Path(pipeline.__file__), bundle / "pipeline.py")
    relisted(bundle)
    rows = {row.check: row.found for row in check(bundle).rows}
    assert rows["code"] == "pipeline.py"
    (bundle / "demo.html").write_text("<script></script>")
    relisted(bundle)
    rows = {row.check: row.found for row in check(bundle).rows}
    assert rows["code"].startswith("not checked: demo.html (differs from this release's")


# --- refused, with the name of the file ---


def flipped(name: str) -> Change:
    """Flip one bit in the middle."""

    def change(folder: Path) -> None:
        content = bytearray((folder / name).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / name).write_bytes(content)

    return change


def copied(path: Path, to: Path) -> None:
    """Listed but not described."""
    shutil.copyfile(path, to)
    relisted(to.parent, graphs=False)


def swapped(folder: Path) -> None:
    """The weights of another model with the same shapes."""
    other = small_bundle(folder.parent / "other", seed=1)
    os.replace(other / DATA, folder / DATA)


def external(**facts: str) -> Change:
    """Change where the weight is, and update the manifest."""

    def change(folder: Path) -> None:
        def edit(model: onnx.ModelProto) -> None:
            for entry in model.graph.initializer[0].external_data:
                entry.value = facts.get(entry.key, entry.value)

        edit_graph(folder, edit)
        relisted(folder)

    return change


def graph_with(change: Callable[[onnx.ModelProto], object], *, listed: bool = False) -> Change:
    """Another graph; `listed`: the manifest describes it."""

    def both(folder: Path) -> None:
        edit_graph(folder, change)
        relisted(folder, graphs=listed)

    return both


def settings(name: str, content: Any) -> Change:
    def change(folder: Path) -> None:
        write_json(folder / name, content)
        relisted(folder)

    return change


def laid(name: str, content: bytes = b"x", *, listed: bool = False) -> Change:
    def change(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        if listed:
            relisted(folder)

    return change


def in_the_manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    return lambda folder: edit_manifest(folder, change)


def function(model: onnx.ModelProto) -> None:
    opsets = [helper.make_opsetid("", 18)]
    model.functions.append(helper.make_function("", "F", ["a"], ["b"], [], opsets))


def nested(domain: str, operator: str) -> Callable[[onnx.ModelProto], object]:
    """An operator in the branch of an If."""

    def change(model: onnx.ModelProto) -> None:
        inner = helper.make_graph([helper.make_node(operator, ["x"], ["z"], domain=domain)], "i", [], [])
        model.graph.node.append(helper.make_node("If", ["x"], ["z"], then_branch=inner, else_branch=inner))

    return change


def link(name: str, to: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(to)

    return change


# what is done → (exit code, the file that the error names, the change)
REFUSED: Mapping[str, tuple[int, str, Change]] = {
    "a tampered graph": (21, "model.onnx", flipped("model.onnx")),
    "a tampered weight": (21, DATA, flipped(DATA)),
    "a tampered text": (21, "chat_template.jinja", flipped("chat_template.jinja")),
    "a swapped data file": (21, DATA, swapped),
    "a missing file": (21, DATA, lambda folder: (folder / DATA).unlink()),
    "a missing manifest": (21, "manifest.json", lambda folder: (folder / "manifest.json").unlink()),
    "an unlisted file": (21, "extra.txt", laid("extra.txt")),
    "an unlisted file, deep": (21, "a/b/extra.txt", laid("a/b/extra.txt")),
    "a file of a like name": (21, "evidence.txt", laid("evidence.txt")),
    "a part left behind": (21, "model.sig.part", laid("model.sig.part")),
    "data above": (12, "model.onnx", external(location="../x")),
    "data at a path": (12, "model.onnx", external(location="/etc/passwd")),
    "data in memory": (21, "model.onnx", external(location="*/_ORT_MEM_ADDR_/*")),
    "data in the evidence": (12, "model.onnx", external(location="evidence/parity.json")),
    "data in the manifest": (12, "model.onnx", external(location="manifest.json")),
    "data past the end": (21, DATA, external(offset="32")),
    "data before the start": (21, DATA, external(offset="-4")),
    "data too long": (21, DATA, external(length="128")),
    "data nowhere": (21, DATA, external(offset="x")),
    "a link out": (12, "tokenizer.json", link("tokenizer.json", "/etc/passwd")),
    "an unlisted link": (12, "x.json", link("x.json", "/etc/passwd")),
    "a link to a folder": (12, "more", link("more", "/etc")),
    "a link in the evidence": (12, "evidence/x", link("evidence/x", "/etc/passwd")),
    "a pipe": (12, "pipe", lambda folder: os.mkfifo(folder / "pipe")),
    "a pickle": (12, "weights.bin", laid("weights.bin", listed=True)),
    "a library": (12, "ops.so", laid("ops.so", listed=True)),
    "remote code": (12, "config.json", settings("config.json", {"auto_map": {"AutoModel": "x.py"}})),
    "a custom library": (12, "genai_config.json", settings("genai_config.json", {"s": {"custom_ops_library": "x"}})),
    "deep JSON": (21, "tokenizer.json", laid("tokenizer.json", b'{"a":' * 900 + b"1" + b"}" * 900, listed=True)),
    "no JSON": (21, "pipeline.json", laid("pipeline.json", b"{", listed=True)),
    "an operator from elsewhere": (
        12,
        "model.onnx",
        graph_with(lambda model: setattr(model.graph.node[1], "domain", "evil"), listed=True),
    ),
    "an operator from elsewhere, inside": (12, "model.onnx", graph_with(nested("evil", "Run"), listed=True)),
    "an operator that ONNX lacks": (12, "model.onnx", graph_with(nested("", "Run"), listed=True)),
    "a contrib operator that ONNX Runtime lacks": (
        12,
        "model.onnx",
        graph_with(nested("com.microsoft", "Run"), listed=True),
    ),
    "a function": (12, "model.onnx", graph_with(function, listed=True)),
    "an undeclared operator": (
        21,
        "model.onnx",
        graph_with(lambda model: setattr(model.graph.node[2], "op_type", "Sub")),
    ),
    "another opset": (21, "model.onnx", graph_with(lambda model: setattr(model.opset_import[0], "version", 21))),
    "another port": (21, "model.onnx", graph_with(lambda model: setattr(model.graph.input[0], "name", "z"))),
    "a port more": (21, "model.onnx", graph_with(lambda model: model.graph.output.append(model.graph.input[0]))),
    "a port less": (21, "model.onnx", graph_with(lambda model: model.graph.output.pop())),
    "a graph that nobody described": (
        21,
        "extra.onnx",
        lambda folder: copied(folder / "model.onnx", folder / "extra.onnx"),
    ),
    "no digest": (21, "model.onnx", in_the_manifest(lambda content: content["files"]["model.onnx"].pop("sha256"))),
    "no files": (21, "manifest.json", in_the_manifest(lambda content: content.pop("files"))),
    "no graphs": (21, "model.onnx", in_the_manifest(lambda content: content.pop("graphs"))),
    "a name by a detour": (
        21,
        "./model.onnx",
        in_the_manifest(lambda content: content["files"].update({"./model.onnx": content["files"]["model.onnx"]})),
    ),
    "evidence that is listed": (
        21,
        "evidence/parity.txt",
        lambda folder: edit_manifest(
            folder,
            lambda content: content["files"].update(
                {"evidence/parity.txt": {"size": (folder / "evidence/parity.txt").stat().st_size, "sha256": "0" * 64}}
            ),
        ),
    ),
    "a runtime nobody knows": (21, "genai", in_the_manifest(lambda content: content.update(target="abacus"))),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_was_changed_is_refused_by_name(bundle: Path, name: str) -> None:
    code, file, change = REFUSED[name]
    change(bundle)
    before = snapshot(bundle)
    result = invoke("check", bundle, "--json")
    assert result.exit_code == code, result.output
    error = json.loads(result.stdout)
    assert file in error["what"] + str(error["found"])
    assert error["next"]
    assert "Traceback" not in result.output
    assert snapshot(bundle) == before


@pytest.mark.parametrize("key", ["files", "graphs", "opset", "target", "recipe", "checkpoint"])
def test_a_manifest_of_odd_values_is_refused_or_harmless(bundle: Path, key: str) -> None:
    for value in ODD_VALUES:
        edit_manifest(bundle, lambda content, value=value: content.update({key: value}))  # type: ignore[misc]
        found = outcome(lambda: check(bundle))
        assert found in ("BundleError", "UnsafeError") or key in ("recipe", "checkpoint")


def test_the_bundles_name_is_a_file_name_for_any_manifest(bundle: Path) -> None:
    assert open_content(bundle).name == "Tiny-fp32-genai"
    for name in ("../../etc", "a/b", "", ".", "\x1b[2J", "x" * 10_000, None, 7):
        edit_manifest(bundle, lambda content, name=name: content.update(checkpoint={"name": name}))  # type: ignore[misc]
        name = open_content(bundle).name
        assert name == Path(name).name
        assert 0 < len(name) < 255
        assert name.isprintable()
