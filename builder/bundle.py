"""Stage 8: the final folder a target, with its manifest and its evidence.

In: configured folders, the verification's reports, the records of the stages before. Out: `<target>/` with every file
linked, the checkpoint's licence and notices, a model card, a bill of materials, `manifest.json`, and `evidence/`.
Guaranteed: all but `evidence/` is the same bytes for the same inputs, pinned
packages and platform.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from builder.bom import BOM, bom
from builder.contract import components
from builder.fetch import FETCHED, NOTICES
from builder.files import link, sha256
from builder.key import plain
from builder.licence import read_licence
from builder.model_card import CARD, model_card
from builder.optimize import operator
from builder.quantize import DIGESTS
from builder.report import rendered, write_pages
from builder.targets import TARGETS
from patches import SETS

if TYPE_CHECKING:
    from builder.recipe import Target
    from builder.stage import Build

MANIFEST, EVIDENCE = "manifest.json", "evidence"
TYPES = {ir.DataType.FLOAT: "float32"}
BUILT_WITH = (
    "torch",
    "transformers",
    "onnx",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "numpy",
)


def run(build: Build, out: Path) -> Mapping[str, object]:
    """Returns the path and the manifest's SHA-256 of each target's bundle."""
    facts: dict[str, object] = {}
    for target in build.recipe.targets:
        folder = out / target.runtime
        for file in sorted((build.folder("configure") / target.runtime).iterdir()):
            link(file, folder / file.name)
        text = json.dumps(_described(build, target, folder), indent=1, ensure_ascii=False) + "\n"
        _write(folder / MANIFEST, text)
        _evidence(build, target, folder / EVIDENCE)
        report, context = rendered(folder)
        write_pages(report, folder / EVIDENCE, context)  # again: now that the manifest is there, and every time
        facts[target.runtime] = {
            "path": str(build.folder("bundle") / target.runtime),
            "manifest sha256": sha256(folder / MANIFEST),
        }
    return facts


def _described(build: Build, target: Target, folder: Path) -> dict[str, Any]:
    """The manifest, after what is made from it has been laid beside the graphs; the card lists no digest of itself."""
    notices = build.folder("fetch") / NOTICES
    licence = read_licence(notices)
    for name in licence.files:
        link(notices / name, folder / name)
    found = manifest(build, target, folder)
    for name, made in ((CARD, model_card), (BOM, bom)):
        _write(folder / name, made(found, licence))
        found["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return {**found, "files": dict(sorted(found["files"].items()))}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def manifest(build: Build, target: Target, folder: Path) -> dict[str, Any]:
    """What is in the bundle and what it was made from; no time, no path, no measurement."""
    checkpoint, runtime = build.checkpoint, TARGETS[target.runtime]
    patches = json.loads((build.folder("patch") / "patches.json").read_text(encoding="utf-8"))["patches"]
    fetched = json.loads((build.folder("fetch") / FETCHED).read_text(encoding="utf-8"))["files"]
    digests = json.loads((build.folder("quantize") / DIGESTS).read_text(encoding="utf-8"))
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != MANIFEST)
    written = {file: digests["data"].get(f"{target.runtime}/{file.name}", {}).get("sha256") for file in files}
    return {
        "format": 1,
        "target": target.runtime,
        "attention": target.attention,
        "recipe": {
            "name": build.recipe.name,
            "precision": build.recipe.precision,
            "provider": build.recipe.provider,
            "max_length": build.recipe.max_length,
            "rules": plain(build.recipe.rules),
            "limits": plain(build.recipe.limits),
        },
        "checkpoint": {
            "name": checkpoint.name,
            "repository": build.source.repo,
            "revision": checkpoint.revision,
            "config_sha256": checkpoint.config_digest,
            "files": {
                name: {"size": one["size"], "sha256": digests["checkpoint"].get(name) or one["sha256"]}
                for name, one in fetched.items()
            },
        },
        "graphs": {c.file: _graph(folder / c.file, c.as_dict()) for c in components(checkpoint, target.runtime)},
        "opset": runtime.opset,
        "patches": {name: patches[name] for name in sorted(SETS[target.attention])},
        "versions": {"qwen3vl-onnx": version("qwen3vl-onnx"), **{name: version(name) for name in BUILT_WITH}},
        "files": {file.name: {"size": file.stat().st_size, "sha256": written[file] or sha256(file)} for file in files},
    }


def _graph(path: Path, ports: dict[str, Any]) -> dict[str, Any]:
    model = ir.load(path)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    for port in (*ports["inputs"], *ports["outputs"]):  # the contract's float is the recipe's precision
        kind = types[port["name"]]
        port["dtype"] = port["dtype"] if kind is None else TYPES.get(kind, kind.name.lower())
    return {**ports, "operators": sorted({operator(node) for node in model.graph.all_nodes()})}


def _evidence(build: Build, target: Target, folder: Path) -> None:
    """Reports of the verification, the patches' diffs, and the record of every stage."""
    for file in sorted((build.folder("verify") / target.runtime).iterdir()):
        link(file, folder / file.name)
    for name in SETS[target.attention]:
        link(build.folder("patch") / f"{name}.diff", folder / "patches" / f"{name}.diff")
    for stage in ("fetch", "patch", "export", "optimize", "quantize", "configure", "verify"):
        record = build.folder(stage) / "stage.json"
        link(record, folder / "stages" / f"{stage}.json")
