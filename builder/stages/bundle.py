"""Stage 8: assemble each target's bundle, with manifest, model card, bill of materials, license files and evidence.

Guarantees: all files but `evidence/` are the same bytes for the same inputs, pinned packages and platform.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from builder.bundle.bom import BOM, bom
from builder.bundle.layout import EVIDENCE, MANIFEST, load_graph, own_files
from builder.bundle.model_card import CARD, model_card
from builder.checkpoint.fingerprint import FETCHED, NOTICES
from builder.checkpoint.license import read_license
from builder.graph import introspection
from builder.graph.external_data import DIGESTS
from builder.graph.naming import operator
from builder.stages.engine.cache_key import plain
from builder.targets.graphs import GRAPHS, components
from builder.targets.registry import PACKAGING
from builder.targets.spec import by_name
from builder.util.files import link, sha256
from builder.util.json_files import read_json
from builder.verify.report.write import rendered, write_pages
from patches import SETS

if TYPE_CHECKING:
    from builder.stages.engine.build import Build
    from builder.targets.recipe import Target

SIDES = "inputs", "outputs"
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
    """Assemble every bundle, and return its path and its manifest's SHA-256 per target."""
    facts: dict[str, object] = {}
    for target in build.recipe.targets:
        folder = out / target.runtime
        configured = build.folder("configure") / target.runtime
        for name in own_files(configured):
            if name != MANIFEST:
                link(configured / name, folder / name)
        text = json.dumps(_described(build, target, folder), indent=1, ensure_ascii=False) + "\n"
        _write(folder / MANIFEST, text)
        _evidence(build, target, folder / EVIDENCE)
        report, context = rendered(folder)
        write_pages(report, folder / EVIDENCE, context)  # rewritten now that the manifest exists
        facts[target.runtime] = {
            "path": str(build.folder("bundle") / target.runtime),
            "manifest sha256": sha256(folder / MANIFEST),
        }
    return facts


def _described(build: Build, target: Target, folder: Path) -> dict[str, Any]:
    """Write the license files, card and bill of materials, and return the manifest that lists them."""
    notices = build.folder("fetch") / NOTICES
    license = read_license(notices)
    for name in license.files:
        link(notices / name, folder / name)
    found = manifest(build, target, folder)
    for name, text_of in ((CARD, model_card), (BOM, bom)):
        _write(folder / name, text_of(found, license))
        found["files"][name] = {"size": (folder / name).stat().st_size, "sha256": sha256(folder / name)}
    return {**found, "files": dict(sorted(found["files"].items()))}


def _write(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def manifest(build: Build, target: Target, folder: Path) -> dict[str, Any]:
    """Describe the bundle's files and sources, without times, paths or measurements."""
    checkpoint, layout = build.checkpoint, PACKAGING[target.runtime].layout
    patches = json.loads((build.folder("patch") / "patches.json").read_text(encoding="utf-8"))["patches"]
    fetched = json.loads((build.folder("fetch") / FETCHED).read_text(encoding="utf-8"))["files"]
    digests = json.loads((build.folder("quantize") / DIGESTS).read_text(encoding="utf-8"))
    names = [component.name for component in components(checkpoint, target.runtime)]
    filled = {layout(name, build.recipe).data: by_name(name, build.recipe).data for name in names}
    written = {name: digests["data"].get(f"{target.runtime}/{own}", {}).get("sha256") for name, own in filled.items()}
    files = [name for name in own_files(folder) if name != MANIFEST]
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
                name: {"size": file["size"], "sha256": digests["checkpoint"].get(name) or file["sha256"]}
                for name, file in fetched.items()
            },
        },
        "graphs": _graphs(build, target, folder),
        "opset": GRAPHS[target.runtime].opset,
        "patches": {name: patches[name] for name in sorted(SETS[target.attention])},
        "versions": {"qwen3vl-onnx": version("qwen3vl-onnx"), **{name: version(name) for name in BUILT_WITH}},
        "files": {
            name: {"size": (folder / name).stat().st_size, "sha256": written.get(name) or sha256(folder / name)}
            for name in files
        },
    }


def _graphs(build: Build, target: Target, folder: Path) -> dict[str, Any]:
    """Map each graph file to its role, as `configure` wrote it, with its ports and operators."""
    configured = read_json(build.folder("configure") / target.runtime / MANIFEST)["graphs"]
    known = {component.name: component.as_dict() for component in components(build.checkpoint, target.runtime)}
    found = {}
    for name, facts in configured.items():
        model = load_graph(folder / name)
        ports = known.get(facts["role"]) or {side: introspection.ports(model.graph, side) for side in SIDES}
        found[name] = {**facts, **_graph(folder / name, ports)}
        opset = introspection.opsets(model).get("")
        found[name] |= {"opset": opset} if opset != GRAPHS[target.runtime].opset else {}
    return found


def _graph(path: Path, ports: dict[str, Any]) -> dict[str, Any]:
    model = ir.load(path)
    types = {value.name: value.dtype for value in (*model.graph.inputs, *model.graph.outputs)}
    for port in (*ports["inputs"], *ports["outputs"]):  # float ports have the recipe's precision
        kind = types[port["name"]]
        port["dtype"] = port["dtype"] if kind is None else TYPES.get(kind, kind.name.lower())
    return {**ports, "operators": sorted({operator(node) for node in model.graph.all_nodes()})}


def _evidence(build: Build, target: Target, folder: Path) -> None:
    """Link the verification's reports, the patches' diffs and the record of every stage."""
    for file in sorted((build.folder("verify") / target.runtime).iterdir()):
        link(file, folder / file.name)
    for name in SETS[target.attention]:
        link(build.folder("patch") / f"{name}.diff", folder / "patches" / f"{name}.diff")
    for stage in ("fetch", "patch", "export", "optimize", "quantize", "configure", "verify"):
        record = build.folder(stage) / "stage.json"
        link(record, folder / "stages" / f"{stage}.json")
