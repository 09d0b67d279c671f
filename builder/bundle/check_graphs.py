"""In: the graphs of a bundle and what its manifest says of them. Out: how many were looked at, by kind.

Guaranteed: ports, operators and opsets are those declared; operators are of the domains that the target may contain,
and ones that a stock runtime has; no functions; all external data lies in a file of the manifest, inside its length,
and is as long as the tensor's shape says. No weight is read.
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
    """How many ports, operators and external tensors of `content`'s graphs are as declared.

    Raises:
        BundleError: a graph that is not what the manifest says.
        UnsafeError: an operator from elsewhere, or external data outside the bundle.
    """
    runtime = GRAPHS.get(content.target)
    if runtime is None:
        raise BundleError(
            f"{content.folder} is for a runtime that this release does not know",
            expected=", ".join(GRAPHS),
            found=content.target,
            next="check it with the release that built it: its manifest's `versions`",
        )
    declared = content.manifest.get("graphs")
    declared = declared if isinstance(declared, Mapping) else {}
    graphs = sorted(name for name in content.files if name.endswith(GRAPH))
    if differ := sorted({*graphs} ^ {*declared}) or ([] if graphs else [f"*{GRAPH}"]):
        raise BundleError(
            f"{differ[0]} is either a graph that {MANIFEST} does not describe, or described and not there",
            expected=", ".join(sorted(declared)) or "graphs",
            found=", ".join(graphs) or "none",
            next=OTHERWISE,
        )
    graph_files(content.folder)  # each of them has a role of its own
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
    """How many external tensors the graph in the file `name` has; all of them lie inside the bundle's files.

    Raises:
        UnsafeError: one lies elsewhere; BundleError: past a file's end, or not as long as its shape.
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
                f"{name}: its {side} are not those that {MANIFEST} declares", expected=there, found=here, next=OTHERWISE
            )
        count += len(found)
    return count


def _check_operators(
    name: str, model: ModelProto, facts: Mapping[str, Any], content: Content, domains: frozenset[str]
) -> int:
    imported, found = opsets(model), operators(model)
    opset = facts.get("opset", content.manifest.get("opset"))
    foreign = sorted(({one.rpartition("::")[0] for one in found} | {*imported}) - domains)
    if foreign or len(model.functions):
        raise UnsafeError(
            f"{name} needs operators that no stock runtime has",
            expected=f"those of {' and '.join(one or 'ONNX' for one in sorted(domains))}, and no functions",
            found=", ".join(foreign) or f"the function {model.functions[0].name}",
            next=OTHERWISE,
        )
    if imported.get("") != opset:
        raise BundleError(f"{name} is of another opset", expected=opset, found=imported.get(""), next=OTHERWISE)
    if found != facts.get("operators"):
        declared = facts.get("operators")
        listed = {str(one) for one in declared} if isinstance(declared, list) else set()
        raise BundleError(
            f"{name} does not hold the operators that {MANIFEST} declares",
            expected=", ".join(sorted(listed)),
            found="besides: " + ", ".join(sorted({*found} - listed)) + "; not: " + ", ".join(sorted(listed - {*found})),
            next=OTHERWISE,
        )
    if unknown := sorted({*found} - _stock(CONTRIB in domains)):
        raise UnsafeError(
            f"{name}: no stock runtime has the operator {unknown[0]}", found=", ".join(unknown), next=OTHERWISE
        )
    return len(found)


@lru_cache(maxsize=2)
def _stock(contrib: bool) -> frozenset[str]:
    """Operators of ONNX; with `contrib` also those that ONNX Runtime adds, some of them to ONNX's own domain."""
    known = {schema.name for schema in onnx.defs.get_all_schemas_with_history() if schema.domain in ONNX}
    if contrib:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema

        added = [one for one in get_all_operator_schema() if one.domain in (*ONNX, CONTRIB)]
        known |= {f"{one.domain}::{one.name}" if one.domain == CONTRIB else one.name for one in added}
    return frozenset(known)


def _check_tensor(name: str, tensor: TensorProto, content: Content) -> bool:
    """Whether the tensor is external, after having seen where it lies."""
    if tensor.data_location != TensorProto.EXTERNAL:
        return False
    facts = {entry.key: entry.value for entry in tensor.external_data}
    where = f"{name}: the external data of {tensor.name}"
    location = facts.get("location", "")
    file = (PurePosixPath(name).parent / location).as_posix()
    if leaves_folder(location) or file not in content.files:
        raise UnsafeError(
            f"{where} lies outside the bundle", expected=f"a file of {MANIFEST}", found=location, next=OTHERWISE
        )
    length, size = _bytes(tensor, where), content.files[file].size
    try:
        begin, told = int(facts.get("offset", "0")), int(facts.get("length", str(length)))
    except ValueError as error:
        raise BundleError(f"{where} has no place in {file}", found=error, next=OTHERWISE) from error
    if told != length or not 0 <= begin <= size - length:
        raise BundleError(
            f"{where} is not inside {file}",
            expected=f"{length} bytes for the shape {list(tensor.dims)}, of the {size} that there are",
            found=f"{told} bytes at {begin}",
            next=OTHERWISE,
        )
    return True


def _bytes(tensor: TensorProto, where: str) -> int:
    try:
        bits = ir.DataType(tensor.data_type).bitwidth
    except (ValueError, TypeError) as error:
        raise BundleError(f"{where} is of no type with a size", found=tensor.data_type, next=OTHERWISE) from error
    if any(axis < 0 for axis in tensor.dims):
        raise BundleError(f"{where} has no shape", found=list(tensor.dims), next=OTHERWISE)
    return int(-(-math.prod(tensor.dims) * bits // 8))
