"""A bundle of a few hundred bytes that passes all checks, and ways to alter it. No torch.

`relisted` updates the manifest after a change, like an attacker who can write a manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from builder.graph.introspection import operators, ports
from builder.verify.report.context import Context
from builder.verify.report.exhibits import Exhibit
from builder.verify.report.gates import Gate, Report
from builder.verify.report.write import write

DATA = "model.onnx.data"
COMMIT = "c0ffee" + "0" * 34


def small_bundle(folder: Path, seed: int = 0, width: int = 4, error: float = 2e-6) -> Path:
    """A `genai` bundle of one graph, `y = Gelu(x · w) + b`; with random weights; `error` is the figure in parity."""
    folder.mkdir(parents=True)
    graph(folder / "model.onnx", seed, width)
    write_json(folder / "genai_config.json", {"model": {"decoder": {"filename": "model.onnx", "hidden_size": width}}})
    write_json(folder / "tokenizer.json", {"model": {"vocab": {"a": 0, "b": 1}}})
    (folder / "chat_template.jinja").write_text("{{ messages }}\n")
    manifest = {
        "format": 1,
        "target": "genai",
        "attention": "fused",
        "recipe": {"name": "fp32", "precision": "fp32", "max_length": 64},
        "checkpoint": {
            "name": "Tiny",
            "repository": "Org/Tiny",
            "revision": COMMIT,
            "config_sha256": "0" * 64,
            "files": {"model.safetensors": {"size": 8, "sha256": "1" * 64}},
        },
        "opset": 18,
        "patches": {"rotary": {"target": "a:b", "why": "so", "digest": "0" * 12}},
        "versions": {"qwen3vl-onnx": "0.1.0", "torch": "2.13.0", "onnx": "1.23.2"},
    }
    write_json(folder / "manifest.json", manifest)
    relisted(folder)
    gates = (Gate("decoder prefill", "text", error, 1e-4), Gate("tokens", "text", 0, 0))
    write(
        Report("genai", "Tiny", gates, {}, exhibits=(Exhibit("text", "case", "Hello"),)), folder / "evidence", Context()
    )
    return folder


def graph(path: Path, seed: int = 0, width: int = 4) -> None:
    """Return a graph with a weight in `DATA` and an embedded bias."""
    generator = np.random.default_rng(seed)
    weight = numpy_helper.from_array(generator.standard_normal((width, width), np.float32), "w")
    bias = numpy_helper.from_array(np.full(width, 0.5, np.float32), "b")
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", width]) for name in "xy")
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["p"]),
        helper.make_node("FastGelu", ["p"], ["q"], domain="com.microsoft"),
        helper.make_node("Add", ["q", "b"], ["y"]),
    ]
    made = helper.make_graph(nodes, "g", [x], [y], [weight, bias])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=opsets, ir_version=9)
    path.with_name(DATA).unlink(missing_ok=True)
    onnx.save_model(model, path, save_as_external_data=True, location=DATA, size_threshold=64)


def edit_graph(folder: Path, change: Callable[[onnx.ModelProto], object]) -> None:
    """Alter model.onnx but not its data."""
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    change(model)
    onnx.save(model, folder / "model.onnx")


def edit_manifest(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    write_json(folder / "manifest.json", content)


def relisted(folder: Path, *, graphs: bool = True) -> None:
    """Update the files in the manifest, and by default its graphs too."""

    def change(content: dict[str, Any]) -> None:
        there = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
        names = sorted(path.relative_to(folder).as_posix() for path in there)
        content["files"] = {
            name: {"size": (folder / name).stat().st_size, "sha256": digest(folder / name)}
            for name in names
            if name not in ("manifest.json", "model.sig") and not name.startswith("evidence/")
        }
        if graphs:
            content["graphs"] = {name: described(folder / name) for name in names if name.endswith(".onnx")}

    edit_manifest(folder, change)


def described(path: Path) -> Mapping[str, Any]:
    model = onnx.load(path, load_external_data=False)
    sides = {side: ports(model.graph, side) for side in ("inputs", "outputs")}
    return {**sides, "operators": operators(model)}


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=1) + "\n")
