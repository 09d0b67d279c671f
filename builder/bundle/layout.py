"""In: the folder of a bundle. Out: the target that its manifest names.

Guaranteed, before a runtime that is written in C sees any of it: the manifest's files are there and of its sizes, no
name (in the manifest, the settings, a graph's external data) leads out of the folder, not by a link either, and
what the runtime reads as JSON is JSON of moderate size and depth.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from builder.checkpoint.safetensors import leaves_folder
from builder.graph.ports import ROLES
from builder.util.errors import BundleError, CheckpointError, UnsafeError
from builder.util.json_files import read_json

if TYPE_CHECKING:
    from onnx import ModelProto

MANIFEST, EVIDENCE = "manifest.json", "evidence"
MAX_GRAPH = 512 * 2**20  # bytes of a graph file; weights lie beside it
GRAPH = ".onnx"
GENAI = "genai_config.json"
READ_BY_RUNTIMES = (GENAI, "vision_processor.json", "pipeline.json", "tokenizer.json")
OTHERWISE = "take the bundle again from where it was built; do not run one that someone changed"


def check_bundle(folder: Path) -> str:
    """The runtime that the bundle in `folder` is for.

    Raises:
        BundleError: no bundle, or files that are not those of its manifest.
        UnsafeError: a file that lies outside the folder.
    """
    manifest = _read(folder / MANIFEST, "`qwen3vl-onnx build` prints the path of a bundle on its last line")
    target = manifest.get("target")
    if not isinstance(target, str):
        raise BundleError(f"{folder} is no bundle", expected=f"a {MANIFEST} that names its target", found=target)
    _check_sizes(folder, manifest.get("files", {}))
    for name in READ_BY_RUNTIMES:
        if (folder / name).exists():
            content = _read(folder / name, None)
            for file in _file_names(content) if name == GENAI else ():
                _inside(folder, file, name)
    graphs = (path.relative_to(folder) for path in folder.rglob(f"*{GRAPH}"))
    for name in sorted(path.as_posix() for path in graphs if path.parts[0] != EVIDENCE):
        _inside(folder, name, MANIFEST)
        for location in _locations(folder / name):
            _inside((folder / name).parent, location, name)
    return target


def graph_files(folder: Path) -> dict[str, Path]:
    """Role → the graph that has it, as the manifest says; without one, the names that `quantize` gives.

    Raises:
        BundleError: a manifest that gives a role twice, or to no graph; UnsafeError: to a file outside the folder.
    """
    path = folder / MANIFEST
    graphs = _read(path, OTHERWISE).get("graphs", {}) if path.exists() else {}
    found: dict[str, Path] = {}
    for name, facts in graphs.items() if isinstance(graphs, Mapping) else ():
        # A bundle from before roles had the role as its name.
        role = str(facts.get("role", PurePosixPath(name).stem)) if isinstance(facts, Mapping) else ""
        if role in found or not name.endswith(GRAPH) or name.startswith(f"{EVIDENCE}/"):
            raise BundleError(
                f"{path} does not say which graph is which",
                expected=f"graphs (*{GRAPH}), each with a role of its own",
                found=f"{name}: {role}",
                next=OTHERWISE,
            )
        _inside(folder, name, MANIFEST)
        found[role] = folder / name
    return {role: folder / f"{role}{GRAPH}" for role in ROLES} | found


def own_files(folder: Path) -> list[str]:
    """Names of all files but the evidence, relative, with `/`, sorted."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in found if name.parts[0] != EVIDENCE)


def data_files(folder: Path) -> set[Path]:
    """The external data that the graphs refer to."""
    graphs = graph_files(folder).values()
    return {(graph.parent / location).resolve() for graph in graphs for location in _locations(graph)}


def own_evidence(folder: Path, part: str = "") -> Path:
    """The bundle's folder for reports, or a part of it.

    Raises:
        UnsafeError: it is a link, which would lead what is written there to another place.
    """
    evidence = folder / EVIDENCE
    for one in (evidence, evidence / part):
        if one.is_symlink() or (one.exists() and not one.is_dir()):
            raise UnsafeError(
                f"{one} is not a folder of this bundle", expected="a folder", found="a link or a file", next=OTHERWISE
            )
    return evidence / part


def _read(path: Path, next: str | None) -> Mapping[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        what = f"{path.parent} is no bundle" if path.name == MANIFEST else f"the bundle's {path.name} cannot be read"
        raise BundleError(what, expected=error.expected, found=error.what, next=next) from error


def _check_sizes(folder: Path, files: Any) -> None:
    if not isinstance(files, Mapping):
        raise BundleError(
            f'{folder / MANIFEST}: "files" is no table',
            expected="names, each with its size",
            found=type(files).__name__,
            next=OTHERWISE,
        )
    for name, facts in files.items():
        _inside(folder, name, MANIFEST)
        size = facts.get("size") if isinstance(facts, Mapping) else None
        found = (folder / name).stat().st_size
        if found != size:
            raise BundleError(
                f"{name} is not the file that {folder / MANIFEST} names",
                expected=f"{size} bytes",
                found=f"{found} bytes",
                next=OTHERWISE,
            )


def _file_names(content: Mapping[str, Any]) -> Iterator[str]:
    """Every file that genai_config.json names: `filename`, `config_filename` and the like, wherever they stand."""
    waiting: list[Any] = [content]
    while waiting:
        value = waiting.pop()
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        for key, inner in pairs:
            if isinstance(inner, (dict, list)):
                waiting.append(inner)
            elif str(key).endswith("filename"):
                yield str(inner)


def _inside(folder: Path, name: str, where: str) -> None:
    """That `name` is a file of `folder` itself."""
    name = str(name)  # protobuf hands over bytes where a name is no UTF-8
    path = folder / name
    try:
        inside = not leaves_folder(name) and path.resolve().is_relative_to(folder.resolve())
        there = inside and path.is_file()
    except (OSError, RuntimeError, ValueError):  # a name that no system takes; links in a circle
        inside = there = False
    if not inside:
        raise UnsafeError(
            f"{where} names a file outside the bundle {folder}",
            expected="a file in it, and no link out of it",
            found=name,
            next=OTHERWISE,
        )
    if not there:
        raise BundleError(
            f"{where} names a file that is not in {folder}",
            expected="every file of the bundle",
            found=name,
            next=OTHERWISE,
        )


def load_graph(path: Path) -> ModelProto:
    """A graph without its external data.

    Raises:
        BundleError: larger than `MAX_GRAPH`, or no graph.
    """
    import onnx

    if path.stat().st_size > MAX_GRAPH:
        raise BundleError(f"{path} is too large", expected=f"at most {MAX_GRAPH} bytes", found=path.stat().st_size)
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf has errors of its own
        raise _unloadable(path, error) from error


def _locations(graph: Path) -> Iterator[str]:
    """Where a graph's external data lies, each place once."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = load_graph(graph)
    try:
        tensors = [tensor for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    except Exception as error:
        raise _unloadable(graph, error) from error
    yield from sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})


def _unloadable(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"{path} does not load, in any runtime",
        expected="an ONNX graph",
        found=f"{type(error).__name__}: {error}",
        next=OTHERWISE,
    )
