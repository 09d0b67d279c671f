"""Malicious bundles: `qwen3vl-onnx run` and `qwen3vl-onnx verify` refuse them before a runtime in C reads them.

A bundle's graphs run, and so does an `onnxruntime` bundle's pipeline.py: no more is promised than that a bundle that
someone changed on its way is told from a whole one, that no file outside its folder is read or written, and that what
is broken ends in an error of ours.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from builder.bundle.layout import check_bundle, own_evidence
from builder.cli.app import app
from builder.targets.clients.pipeline import SettingsError, load_tokenizer, read_image_settings, read_settings
from builder.util.errors import BundleError, UnsafeError
from builder.util.files import write_text
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.edits import Change, both, edit_json, remove, truncate, write
from tests.helpers.hostile import HUGE, ODD_VALUES, mutated, outcome, record_counts, snapshot

DRAWN = 2000
DATA = "model.onnx.data"
STEPS = {"DecodeImage": {"color_space": "RGB"}, "ConvertRGB": {}}
SIZES = {"patch_size": 16, "merge_size": 2}
BOUNDS = {"min_pixels": 1024, "max_pixels": 65536}


def vision_processor() -> dict[str, Any]:
    resize = {"interpolation": "CUBIC", "smart_resize": 1, "width": 32, "height": 32, **BOUNDS, **SIZES}
    steps: list[tuple[str, Mapping[str, Any]]] = [
        *STEPS.items(),
        ("Resize", resize),
        ("Rescale", {"rescale_factor": 1.0}),
        ("Normalize", {"mean": [0.0] * 3, "std": [255.0] * 3}),
        ("Normalize", {"mean": [0.5] * 3, "std": [0.5] * 3, "qwen3_vl": 1}),
        ("PatchImage", {**SIZES, "temporal_patch_size": 2}),
    ]
    transforms = [{"operation": {"type": kind, **({"attrs": dict(attrs)} if attrs else {})}} for kind, attrs in steps]
    return {"processor": {"name": "p", "transforms": transforms}}


PIPELINE = {
    "prompt": {"prefix": "<user>", "image": "<vision><image>", "suffix": "<end>"},
    "image_token": "<image>",
    "image_token_id": 5,
    "video_token": "<video>",
    "spatial_merge_size": 2,
    "eos_token_ids": [1],
    "max_length": 64,
    "deepstack": 0,
    "hidden": 4,
}


def graph(path: Path) -> None:
    """A graph with one weight, which is in `DATA`."""
    weight = numpy_helper.from_array(np.ones((4, 4), np.float32), "w")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4]) for name in "xy")
    made = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", [x], [y], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    onnx.save_model(model, path, save_as_external_data=True, location=DATA, size_threshold=0)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal bundle for `check_bundle`."""
    folder = tmp_path_factory.mktemp("bundles") / "genai"
    folder.mkdir()
    graph(folder / "model.onnx")
    shutil.copyfile(MINIATURE / "tokenizer.json", folder / "tokenizer.json")
    (folder / "vision_processor.json").write_text(json.dumps(vision_processor()))
    (folder / "pipeline.json").write_text(json.dumps(PIPELINE))
    model = {"decoder": {"filename": "model.onnx"}, "vision": {"config_filename": "vision_processor.json"}}
    (folder / "genai_config.json").write_text(json.dumps({"model": model}))
    files = {file.name: {"size": file.stat().st_size} for file in sorted(folder.iterdir())}
    (folder / "manifest.json").write_text(json.dumps({"target": "genai", "files": files}))
    return folder


def external(**facts: str) -> Change:
    """Change where the graph's weight is."""

    def change(folder: Path) -> None:
        model = onnx.load(folder / "model.onnx", load_external_data=False)
        for entry in model.graph.initializer[0].external_data:
            entry.value = facts.get(entry.key, entry.value)
        onnx.save(model, folder / "model.onnx")

    return both(change, unlisted)


def unlisted(folder: Path) -> None:
    """A manifest without files, so that later checks run."""
    (folder / "manifest.json").write_text(json.dumps({"target": "genai"}))


def manifest(**values: Any) -> Change:
    return edit_json("manifest.json", lambda content: content.update(values))


def manifest_file(name: str, facts: Any) -> Change:
    return edit_json("manifest.json", lambda content: content["files"].update({name: facts}))


def settings_of(file: str, edit: Callable[[dict[str, Any]], object]) -> Change:
    return both(edit_json(file, edit), unlisted)


def setting_of(file: str, key: str, value: Any) -> Change:
    return settings_of(file, lambda content: content.update({key: value}))


LEAVING = ("../outside", "/etc/passwd", "a/../../outside", "C:\\x", "\\\\host\\x", "/dev/zero", "a\0b", "../genai")
MANIFESTS: Mapping[str, Change] = (
    {f"target = {str(value)[:20]!r}": manifest(target=value) for value in ODD_VALUES}
    | {f"files = {str(value)[:20]!r}": manifest(files=value) for value in ODD_VALUES if value not in ({},)}
    | {f"lists {name!r}": manifest_file(name, {"size": 1}) for name in (*LEAVING, "not there", "x" * 5000, "", ".")}
    | {f"size = {str(value)[:20]!r}": manifest_file("model.onnx", {"size": value}) for value in ODD_VALUES}
    | {
        "facts are a list": manifest_file("model.onnx", [1]),
        "one byte less": truncate("model.onnx.data", 0.99),
        "another graph": write("model.onnx", b"\0" * 100),
        "missing": remove("manifest.json"),
        "a folder": both(remove("manifest.json"), lambda f: (f / "manifest.json").mkdir()),
        "a pipe": both(remove("manifest.json"), lambda f: os.mkfifo(f / "manifest.json")),
        "deep": write("manifest.json", b'{"a":' * 100_000),
        "a million lists": write("manifest.json", b'{"a":[' + b"[]," * 1_500_000 + b"[]]}"),
        "garbage": write("manifest.json", random.Random(1).randbytes(1000)),
    }
)
GRAPHS: Mapping[str, Change] = {f"data in {place!r}": external(location=place) for place in (*LEAVING, "", ".")} | {
    "data not there": external(location="other.data"),
    "data is a link out": both(unlisted, remove(DATA), lambda f: (f / DATA).symlink_to("/etc/passwd")),
    "data is a link to a device": both(unlisted, remove(DATA), lambda f: (f / DATA).symlink_to("/dev/zero")),
    "data is a link in a circle": both(unlisted, remove(DATA), lambda f: (f / DATA).symlink_to(f / DATA)),
    "data is a pipe": both(unlisted, remove(DATA), lambda f: os.mkfifo(f / DATA)),
    "graph is a link out": both(unlisted, remove("model.onnx"), lambda f: (f / "model.onnx").symlink_to("/etc/passwd")),
    "graph is a folder": both(unlisted, remove("model.onnx"), lambda f: (f / "model.onnx").mkdir()),
    "graph of zeros": both(unlisted, write("model.onnx", b"\0" * 10_000)),
    "half a graph": both(unlisted, truncate("model.onnx", 0.5)),
    "sparse graph of 1 GB": both(unlisted, lambda f: os.truncate(f / "model.onnx", 2**30)),
    "deep protobuf": both(unlisted, write("model.onnx", b"\x3a\xff\xff\xff\xff\x07" * 10_000)),
}
RUNTIME: Mapping[str, Change] = (
    {
        f"genai_config.json: {key} {name!r}": setting_of("genai_config.json", key, name)
        for key in ("filename", "config_filename", "custom_ops_filename")
        for name in (*LEAVING, "not there", "")
    }
    | {
        f"genai_config.json in a list: {name!r}": setting_of(
            "genai_config.json", "pipeline", [{"x": {"filename": name}}]
        )
        for name in LEAVING
    }
    | {
        f"{file}: {what}": both(unlisted, write(file, content))
        for file in ("genai_config.json", "tokenizer.json", "pipeline.json", "vision_processor.json")
        for what, content in {
            "deep": b'{"a":' * 100_000,
            "deep and whole": b'{"a":' * 900 + b"1" + b"}" * 900,
            "NaN": b'{"a": NaN}',
            "empty": b"",
            "garbage": random.Random(2).randbytes(1000),
            "a million lists": b'{"a":[' + b"[]," * 1_500_000 + b"[]]}",
        }.items()
    }
)
BUNDLES: Mapping[str, Mapping[str, Change]] = {"manifest": MANIFESTS, "graph": GRAPHS, "runtime's settings": RUNTIME}
NAMED = [(kind, name) for kind, table in BUNDLES.items() for name in table]
# Each of these the runtime could be given: it is another graph of this folder, or a file without a target to mind.
HARMLESS = {"target = ''", "target = '\\ud800'", f"target = {'x' * 20!r}"}


def spoiled(good: Path, folder: Path, change: Change) -> Path:
    shutil.copytree(good, folder)
    change(folder)
    return folder


def test_the_good_one_is_taken(good: Path) -> None:
    assert check_bundle(good) == "genai"


@pytest.mark.parametrize(("kind", "name"), NAMED, ids=[f"{kind}: {name}"[:80] for kind, name in NAMED])
def test_named_ones_are_refused(good: Path, tmp_path: Path, kind: str, name: str) -> None:
    copy = spoiled(good, tmp_path / "genai", BUNDLES[kind][name])
    before = snapshot(tmp_path)
    found = outcome(lambda: check_bundle(copy))
    assert found in ("BundleError", "UnsafeError") or name in HARMLESS
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["data in '../outside'", "data is a link out"])
@pytest.mark.parametrize("command", ["run", "verify"])
def test_the_command_line_refuses_and_writes_nothing(good: Path, tmp_path: Path, name: str, command: str) -> None:
    copy = spoiled(good, tmp_path / "genai", GRAPHS[name])
    before = snapshot(tmp_path)
    options = ["--prompt", "x"] if command == "run" else ["--reference", str(MINIATURE)]
    result = CliRunner().invoke(app, [command, str(copy), *options])
    assert result.exit_code == UnsafeError.exit_code, result.output
    assert "Traceback" not in result.output
    assert snapshot(tmp_path) == before


def test_reports_do_not_go_through_a_link(good: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    copy = spoiled(good, tmp_path / "genai", lambda f: (f / "evidence").symlink_to(elsewhere))
    with pytest.raises(UnsafeError, match="not a folder of this bundle"):
        own_evidence(copy)
    result = CliRunner().invoke(app, ["verify", str(copy), "--reference", str(MINIATURE)])
    assert result.exit_code == UnsafeError.exit_code
    assert not list(elsewhere.iterdir())


def test_a_report_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("mine")
    (tmp_path / "report.txt").symlink_to(outside)
    (tmp_path / "report.txt.part").symlink_to(outside)
    write_text(tmp_path / "report.txt", "theirs")
    assert (outside.read_text(), (tmp_path / "report.txt").read_text()) == ("mine", "theirs")
    assert not (tmp_path / "report.txt").is_symlink()


# --- settings that this project reads itself ---

Read = Callable[[Path], object]
READ: Mapping[str, Read] = {
    "pipeline.json": read_settings,
    "vision_processor.json": read_image_settings,
    "tokenizer.json": load_tokenizer,
}


def read_all(folder: Path) -> None:
    """Open a bundle, with errors converted as `builder.bundle.generate` and `builder.verify.tokens` do."""
    check_bundle(folder)
    for file, read in READ.items():
        try:
            read(folder / file)
        except (SettingsError, BaseException) as error:
            if isinstance(error, (KeyboardInterrupt, AssertionError)) or (
                file != "tokenizer.json" and not isinstance(error, SettingsError)
            ):
                raise
            raise BundleError(f"{folder} cannot be opened", found=error) from error


def attributes(**values: Any) -> Callable[[dict[str, Any]], None]:
    def edit(content: dict[str, Any]) -> None:
        for step in content["processor"]["transforms"]:
            attrs = step["operation"].get("attrs", {})
            attrs.update({key: value for key, value in values.items() if key in attrs})

    return edit


SETTINGS: Mapping[str, Change] = {
    f"vision_processor.json: {key} = {str(value)[:20]!r}": settings_of(
        "vision_processor.json", attributes(**{key: value})
    )
    for key in ("min_pixels", "max_pixels", "patch_size", "merge_size", "temporal_patch_size", "mean", "std")
    for value in (*ODD_VALUES, 2**40, [1e400] * 3)
    if (key, value) not in (("max_pixels", HUGE), ("max_pixels", 2**40))
} | {
    f"pipeline.json: {key} = {str(value)[:20]!r}": setting_of("pipeline.json", key, value)
    for key in ("prompt", "image_token", "spatial_merge_size", "eos_token_ids", "max_length", "deepstack")
    for value in ODD_VALUES
    if (key, value) not in (("eos_token_ids", []), ("max_length", HUGE), ("deepstack", 0), ("deepstack", HUGE))
    and (key, value) != ("eos_token_ids", [HUGE])
}


@pytest.mark.parametrize("name", SETTINGS, ids=lambda name: name[:80])
def test_settings_out_of_bounds_are_refused(good: Path, tmp_path: Path, name: str) -> None:
    copy = spoiled(good, tmp_path / "genai", SETTINGS[name])
    assert outcome(lambda: read_all(copy)) == "BundleError"


FILES = ("manifest.json", "model.onnx", "genai_config.json", "pipeline.json", "vision_processor.json", "tokenizer.json")


def drawn(good: Path, folder: Path, seed: int) -> str:
    """The bundle with a file in which a few bytes changed."""
    file, content = FILES[seed % len(FILES)], (good / FILES[seed % len(FILES)]).read_bytes()
    (folder / file).write_bytes(mutated(content, random.Random(seed)))
    try:
        return f"bytes of {file}: {outcome(lambda: read_all(folder))}"
    except BaseException as error:
        error.add_note(f"bytes of {file}, seed {seed}")
        raise
    finally:
        (folder / file).write_bytes(content)


def test_a_few_random_bytes(good: Path, tmp_path: Path) -> None:
    folder = spoiled(good, tmp_path / "genai", unlisted)
    counts = Counter(drawn(good, folder, seed) for seed in range(120))
    assert sum(count for what, count in counts.items() if not what.endswith("accepted")) > 40


@pytest.mark.slow
def test_many_random_bytes(good: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    folder = spoiled(good, tmp_path / "genai", unlisted)
    record_counts(Counter(drawn(good, folder, seed) for seed in range(1000, 1000 + DRAWN)), record_property)
