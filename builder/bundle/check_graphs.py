"""Compare a bundle's graphs with its manifest, without reading weights.

Guarantees: ports, operators and opsets are as declared; operators are in the target's domains and exist in a stock
runtime; there are no functions; external data is within the files of the manifest and as long as the tensor's shape
requires.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import PurePosixPath
from typing import Any

import onnx
import onnx_ir as ir
from onnx import GraphProto, ModelProto, TensorProto

from builder.bundle.inventory import Content
from builder.bundle.layout import GRAPH, MANIFEST, OTHERWISE, graph_files, load_graph
from builder.checkpoint.safetensors import leaves_folder
from builder.graph.introspection import ONNX, operators, opsets, ports, readable, tensors
from builder.graph.ports import CONTRIB
from builder.targets.graphs import GRAPHS
from builder.util.errors import BundleError, UnsafeError


def check_graphs(content: Content) -> dict[str, int]:
    """Check all graphs, and count their ports, operators and external tensors.

    Raises:
        BundleError: a graph differs from the manifest.
        UnsafeError: an operator is not in a stock runtime, or external data is outside the bundle.
    """
    runtime = GRAPHS.get(content.target)
    if runtime is None:
        raise BundleError(
            f"{content.folder} is for a runtime that this release does not support",
            expected=", ".join(GRAPHS),
            found=content.target,
            next="check it with the release that built it (`versions` in its manifest)",
        )
    declared = content.manifest.get("graphs")
    declared = declared if isinstance(declared, Mapping) else {}
    graphs = sorted(name for name in content.files if name.endswith(GRAPH))
    if differ := sorted({*graphs} ^ {*declared}) or ([] if graphs else [f"*{GRAPH}"]):
        raise BundleError(
            f"{differ[0]} is either a graph that {MANIFEST} does not describe, or is described and missing",
            expected=", ".join(sorted(declared)) or "graphs",
            found=", ".join(graphs) or "none",
            next=OTHERWISE,
        )
    graph_files(content.folder)  # refuses a role that is given twice
    counts = {"graphs": len(graphs), "ports": 0, "operators": 0, "external tensors": 0}
    for name in graphs:
        model = load_graph(content.folder / name)
        facts = declared[name] if isinstance(declared[name], Mapping) else {}
        with readable(name):
            counts["ports"] += _check_ports(name, model.graph, facts)
            counts["operators"] += _check_operators(name, model, facts, content, runtime.domains)
        counts["external tensors"] += check_external(content, name, model)
    return counts


def check_external(content: Content, name: str, model: ModelProto) -> int:
    """Check the external data of the graph in the file `name`, and count its external tensors.

    Raises:
        UnsafeError: external data is outside the bundle's files.
        BundleError: it exceeds its file, or its length does not fit the tensor's shape.
    """
    with readable(name):
        return sum(_check_tensor(name, tensor, content) for tensor in tensors(model.graph))


def _check_ports(name: str, graph: GraphProto, facts: Mapping[str, Any]) -> int:
    count = 0
    for side in ("inputs", "outputs"):
        found, expected = ports(graph, side), facts.get(side)
        if found != expected:
            pairs = zip(found, expected if isinstance(expected, list) else [], strict=False)
            here, there = next(((a, b) for a, b in pairs if a != b), (found, expected))
            raise BundleError(
                f"{name}: its {side} differ from those in {MANIFEST}", expected=there, found=here, next=OTHERWISE
            )
        count += len(found)
    return count


def _check_operators(
    name: str, model: ModelProto, facts: Mapping[str, Any], content: Content, domains: frozenset[str]
) -> int:
    imported, found = opsets(model), operators(model)
    opset = facts.get("opset", content.manifest.get("opset"))
    foreign = sorted(({kind.rpartition("::")[0] for kind in found} | {*imported}) - domains)
    if foreign or len(model.functions):
        raise UnsafeError(
            f"{name} needs operators that are not in a stock runtime",
            expected=f"operators of {' and '.join(domain or 'ONNX' for domain in sorted(domains))}, no functions",
            found=", ".join(foreign) or f"the function {model.functions[0].name}",
            next=OTHERWISE,
        )
    if imported.get("") != opset:
        raise BundleError(f"{name} has a different opset", expected=opset, found=imported.get(""), next=OTHERWISE)
    if found != facts.get("operators"):
        declared = facts.get("operators")
        listed = {str(kind) for kind in declared} if isinstance(declared, list) else set()
        raise BundleError(
            f"{name}: its operators differ from those in {MANIFEST}",
            expected=", ".join(sorted(listed)),
            found="extra: "
            + ", ".join(sorted({*found} - listed))
            + "; missing: "
            + ", ".join(sorted(listed - {*found})),
            next=OTHERWISE,
        )
    if unknown := sorted({*found} - _stock(CONTRIB in domains)):
        raise UnsafeError(
            f"{name}: the operator {unknown[0]} is not in a stock runtime", found=", ".join(unknown), next=OTHERWISE
        )
    return len(found)


@lru_cache(maxsize=2)
def _stock(contrib: bool) -> frozenset[str]:
    """Operators of ONNX and, with `contrib`, of ONNX Runtime, which adds some to ONNX's own domain."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain in ONNX}
    if contrib:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

        added = [schema for schema in get_all_operator_schema() if schema.domain in (*ONNX, CONTRIB)]
        known |= {f"{schema.domain}::{schema.name}" if schema.domain == CONTRIB else schema.name for schema in added}
    return frozenset(known)


def _check_tensor(name: str, tensor: TensorProto, content: Content) -> bool:
    """Return whether the tensor is external, after checking where its data is."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return False
    facts = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{name}: the external data of {tensor.name}"
    location = facts.get("location", "")
    file = (PurePosixPath(name).parent / location).as_posix()
    if leaves_folder(location) or file not in content.files:
        raise UnsafeError(
            f"{where} is outside the bundle", expected=f"a file of {MANIFEST}", found=location, next=OTHERWISE
        )
    length, size = _bytes(tensor, where), content.files[file].size
    try:
        begin, stored = int(facts.get("offset", "0")), int(facts.get("length", str(length)))
    except ValueError as error:
        raise BundleError(f"{where} has no valid offset in {file}", found=error, next=OTHERWISE) from error
    if stored != length or not 0 <= begin <= size - length:
        raise BundleError(
            f"{where} is not inside {file}",
            expected=f"{length} bytes for the shape {list(tensor.dims)}, within the file's {size}",
            found=f"{stored} bytes at {begin}",
            next=OTHERWISE,
        )
    return True


def _bytes(tensor: TensorProto, where: str) -> int:
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise BundleError(f"{where} has a type without a size", found=tensor.data_type, next=OTHERWISE) from error
    if any(axis < 0 for axis in tensor.dims):
        raise BundleError(f"{where} has a negative dimension", found=list(tensor.dims), next=OTHERWISE)
    return int(-(-math.prod(tensor.dims) * bits // 8))
