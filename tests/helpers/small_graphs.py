"""Build a `BoundGraph` from ONNX's text format and weights, and run it in ONNX Runtime.

As in a build, the weights are not part of the graph until it runs: their external file does not exist.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir
import onnxruntime

from builder.graph.binding import Binding, BoundGraph, bind
from builder.graph.naming import operator

Array = npt.NDArray[Any]
Weights = Mapping[str, Array]
CONTRIB = "com.microsoft"


def bound_graph(text: str, weights: Weights | None = None, domains: Sequence[str] = (CONTRIB,)) -> BoundGraph:
    """`text` at opset 18, with an initializer for each of `weights`, bound to a tensor called `checkpoint.<name>`.

    Args:
        text: `name (inputs) => (outputs) { nodes }`, as `onnx.parser` reads it; nodes may read `weights` by name.
        weights: what the initializers will be filled with; only the shapes are used here.
        domains: of operators, besides ONNX's own.
    """
    imports = ", ".join(['"": 18', *(f'"{domain}": 1' for domain in domains)])
    proto = onnx.parser.parse_model(f"<ir_version: 10, opset_import: [{imports}]> {text}")
    for node in proto.graph.node:  # the text format does not name nodes
        node.name = f"node_{node.output[0]}"
    weights = weights or {}
    blank = [onnx.numpy_helper.from_array(np.zeros_like(array), name) for name, array in weights.items()]
    proto.graph.initializer.extend(blank)
    model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
    bindings = [Binding(name, f"checkpoint.{name}", "float32", array.shape) for name, array in weights.items()]
    return bind(model, bindings)


def run(graph: BoundGraph, weights: Weights | None = None, /, **feed: Array) -> list[Array]:
    """Run the graph with initializers filled by their bindings; the graph is not changed."""
    outputs: list[Array] = session(graph, weights or {}).run(None, feed)
    return outputs


def session(graph: BoundGraph, weights: Weights, options: onnxruntime.SessionOptions | None = None) -> Any:
    """ONNX Runtime on the CPU without its own optimizations, which could hide a missing fusion."""
    model = ir.from_proto(ir.to_proto(graph.model))
    for name, binding in graph.bindings.items():
        array = weights[name].reshape(binding.shape)
        value = ir.tensor(np.ascontiguousarray(array.T if binding.transposed else array), name=name)
        model.graph.initializers[name].const_value = value
    options = options or onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    content = ir.to_proto(model).SerializeToString()
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def operators(graph: BoundGraph) -> Counter[str]:
    """Count operators, including subgraphs, without constants."""
    return Counter(operator(node) for node in graph.model.graph.all_nodes() if node.op_type != "Constant")


def drawn(*shape: int, seed: int = 0) -> Array:
    """Return standard normal float32 values."""
    return np.random.default_rng([seed, *shape]).standard_normal(shape, dtype=np.float32)


def bound_to(graph: BoundGraph, **tensors: str) -> BoundGraph:
    """The same graph, some of its initializers bound to checkpoint tensors of these names."""
    bindings = {
        name: replace(binding, tensor=tensors.get(name, binding.tensor)) for name, binding in graph.bindings.items()
    }
    return BoundGraph(graph.model, bindings)


def transposed_bound(text: str, weights: Weights, *names: str) -> BoundGraph:
    """The graph with these initializers bound transposed."""
    plain = {name: name.replace(".", "_") for name in weights}  # the text format takes no dots
    for name, short in plain.items():
        text = text.replace(name, short)
    shapes = {plain[name]: array.T if name in names else array for name, array in weights.items()}
    model = bound_graph(text, shapes).model
    for name, short in plain.items():
        value = model.graph.initializers.pop(short)
        value.name = name
        model.graph.initializers.add(value)
    shaped = {name: array.shape for name, array in weights.items()}
    return bind(model, [Binding(n, f"checkpoint.{n}", "float32", s, transposed=n in names) for n, s in shaped.items()])
