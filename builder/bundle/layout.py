"""Find and check the files of a bundle before a runtime written in C reads them.

Guarantees of `check_bundle`: the files of the manifest exist and have its sizes; no name in the manifest, the settings
or a graph's external data leads out of the folder, directly or by a link; files that the runtime parses as JSON are
JSON of moderate size and depth.
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
MAX_GRAPH = 512 * 2**20  # bytes of a graph file without its external data
GRAPH = ".onnx"
GENAI = "genai_config.json"
READ_BY_RUNTIMES = (GENAI, "vision_processor.json", "pipeline.json", "tokenizer.json")
OTHERWISE = "copy the bundle again from where it was built; do not run a bundle that was changed"


def check_bundle(folder: Path) -> str:
    """Check the bundle in `folder`, and return the target that its manifest names.

    Raises:
        BundleError: `folder` is not a bundle, or its files differ from the manifest.
        UnsafeError: a file is outside the folder.
    """
    manifest = _read(folder / MANIFEST, "`qwen3vl-onnx build` prints the path of a bundle on its last line")
    target = manifest.get("target")
    if not isinstance(target, str):
        raise BundleError(f"{folder} is not a bundle", expected=f"a {MANIFEST} that names its target", found=target)
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
    """Map each role to its graph file, as the manifest declares or else by the names that `quantize` gives.

    Raises:
        BundleError: the manifest gives a role twice, or to a file that is not a graph.
        UnsafeError: a graph is outside the folder.
    """
    path = folder / MANIFEST
    graphs = _read(path, OTHERWISE).get("graphs", {}) if path.exists() else {}
    found: dict[str, Path] = {}
    for name, facts in graphs.items() if isinstance(graphs, Mapping) else ():
        # Bundles without roles have graphs named after them.
        role = str(facts.get("role", PurePosixPath(name).stem)) if isinstance(facts, Mapping) else ""
        if role in found or not name.endswith(GRAPH) or name.startswith(f"{EVIDENCE}/"):
            raise BundleError(
                f"{path} does not give each graph one role",
                expected=f"graphs (*{GRAPH}), each with a role of its own",
                found=f"{name}: {role}",
                next=OTHERWISE,
            )
        _inside(folder, name, MANIFEST)
        found[role] = folder / name
    return {role: folder / f"{role}{GRAPH}" for role in ROLES} | found


def own_files(folder: Path) -> list[str]:
    """Paths of all files but the evidence, relative to `folder`, with `/`, sorted."""
    found = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(name.as_posix() for name in found if name.parts[0] != EVIDENCE)


def data_files(folder: Path) -> set[Path]:
    """Paths of the external data that the graphs refer to."""
    graphs = graph_files(folder).values()
    return {(graph.parent / location).resolve() for graph in graphs for location in _locations(graph)}


def own_evidence(folder: Path, part: str = "") -> Path:
    """Return the bundle's folder for evidence, or a subfolder of it.

    Raises:
        UnsafeError: it is a link, through which reports would be written elsewhere.
    """
    evidence = folder / EVIDENCE
    for path in (evidence, evidence / part):
        if path.is_symlink() or (path.exists() and not path.is_dir()):
            raise UnsafeError(
                f"{path} is not a folder of this bundle", expected="a folder", found="a link or a file", next=OTHERWISE
            )
    return evidence / part


def _read(path: Path, next: str | None) -> Mapping[str, Any]:
    try:
        return read_json(path)
    except CheckpointError as error:
        what = f"{path.parent} is not a bundle" if path.name == MANIFEST else f"the bundle's {path.name} cannot be read"
        raise BundleError(what, expected=error.expected, found=error.what, next=next) from error


def _check_sizes(folder: Path, files: Any) -> None:
    if not isinstance(files, Mapping):
        raise BundleError(
            f'{folder / MANIFEST}: "files" is not an object',
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
                f"{name} does not match {folder / MANIFEST}",
                expected=f"{size} bytes",
                found=f"{found} bytes",
                next=OTHERWISE,
            )


def _file_names(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield every file that genai_config.json names, in keys such as `filename`, at any depth."""
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
    """Check that `name` is a file inside `folder`."""
    name = str(name)  # protobuf returns bytes for names that are not UTF-8
    path = folder / name
    try:
        inside = not leaves_folder(name) and path.resolve().is_relative_to(folder.resolve())
        exists = inside and path.is_file()
    except (OSError, RuntimeError, ValueError):  # an invalid name, or a loop of links
        inside = exists = False
    if not inside:
        raise UnsafeError(
            f"{where} names a file outside the bundle {folder}",
            expected="a file inside it, not a link out of it",
            found=name,
            next=OTHERWISE,
        )
    if not exists:
        raise BundleError(
            f"{where} names a file that is not in {folder}",
            expected="every file of the bundle",
            found=name,
            next=OTHERWISE,
        )


def load_graph(path: Path) -> ModelProto:
    """Load a graph without its external data.

    Raises:
        BundleError: the file is larger than `MAX_GRAPH`, or not a graph.
    """
    import onnx

    if path.stat().st_size > MAX_GRAPH:
        raise BundleError(f"{path} is too large", expected=f"at most {MAX_GRAPH} bytes", found=path.stat().st_size)
    try:
        return onnx.load(path, load_external_data=False)
    except Exception as error:  # protobuf raises its own types
        raise _unloadable(path, error) from error


def _locations(graph: Path) -> Iterator[str]:
    """Yield each location of a graph's external data once."""
    from onnx.external_data_helper import _get_all_tensors, uses_external_data

    model = load_graph(graph)
    try:
        tensors = [tensor for tensor in _get_all_tensors(model) if uses_external_data(tensor)]
    except Exception as error:
        raise _unloadable(graph, error) from error
    yield from sorted({entry.value for tensor in tensors for entry in tensor.external_data if entry.key == "location"})


def _unloadable(path: Path, error: Exception) -> BundleError:
    return BundleError(
        f"{path} cannot be loaded by any runtime",
        expected="an ONNX graph",
        found=f"{type(error).__name__}: {error}",
        next=OTHERWISE,
    )
