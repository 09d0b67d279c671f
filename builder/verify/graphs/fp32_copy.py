"""Copy a bundle's graphs for verification: computing in fp32, or with logits at every token.

Guarantees: no weight is copied; the copies read the bundle's own data files and cast lower precisions to fp32. An fp32
copy differs from the artifact only in its arithmetic, so an error in a graph is in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from builder.bundle.layout import own_files
from builder.graph.ports import RESIDUAL
from builder.targets.config_files import as_json
from builder.targets.providers import session_options
from builder.util.files import link, write_text
from builder.util.json_files import read_json

HALF = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
FULL_ACCURACY = 1  # accuracy_level of MatMulNBits: activations in fp32
STORED = ".stored"
GENAI_CONFIG = "genai_config.json"


def write_fp32_copy(folder: Path, out: Path) -> None:
    """Write a copy of a bundle for the CPU with its graphs `in_fp32` and all other files linked."""
    write_for_cpu(folder, out, widened=True)


def write_for_cpu(folder: Path, out: Path, *, widened: bool = False) -> None:
    """Write a copy of a bundle with its files linked and the settings of the CPU provider."""
    out.mkdir(parents=True, exist_ok=True)
    for name in own_files(folder):
        file, copy = folder / name, out / name
        if widened and file.suffix == ".onnx":
            copy.parent.mkdir(parents=True, exist_ok=True)
            onnx.save(in_fp32(onnx.load(file, load_external_data=False)), copy)
        elif name == GENAI_CONFIG:
            write_text(copy, as_json(_on_cpu(dict(read_json(file)))))
        else:
            link(file, copy)


def in_fp32(model: ModelProto) -> ModelProto:
    """Change a graph in place to compute every matmul, norm and attention in fp32, with fp32 ports."""
    graph = model.graph
    multiplied_in_fp32(graph)
    casts: list[NodeProto] = []
    for tensor in graph.initializer:
        if tensor.data_type in HALF:
            casts.append(helper.make_node("Cast", [tensor.name + STORED], [tensor.name], to=TensorProto.FLOAT))
            tensor.name += STORED
    for inner in _graphs(graph):
        for node in inner.node:
            _widen(node)
        for value in (*inner.input, *inner.output, *inner.value_info):
            if value.type.tensor_type.elem_type in HALF:
                value.type.tensor_type.elem_type = TensorProto.FLOAT
    nodes = [*casts, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
    return model


def multiplied_in_fp32(graph: GraphProto) -> None:
    """Replace each DynamicQuantizeMatMul by DequantizeLinear, MatMul and Add, without rounding activations."""
    constants = {node.output[0]: node.attribute[0].t for node in graph.node if node.op_type == "Constant"}
    columns = {tensor.name: tensor.dims[-1] for tensor in graph.initializer if tensor.dims}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "DynamicQuantizeMatMul":
            nodes.append(node)
            continue
        x, codes, scale, zero, *bias = node.input
        out, matrix, zeros = node.output[0], f"{codes}.matrix", f"{codes}.zeros"
        # DequantizeLinear needs a zero point per column, like its scales.
        each = np.full(columns[codes], numpy_helper.to_array(constants[zero]))
        graph.initializer.append(numpy_helper.from_array(each, zeros))
        product = f"{out}.product" if bias else out
        nodes += [
            helper.make_node("DequantizeLinear", [codes, scale, zeros], [f"{matrix}.own"], axis=1),
            # A Max of one input keeps ONNX Runtime from fusing both into a matmul that rounds activations.
            helper.make_node("Max", [f"{matrix}.own"], [matrix]),
            helper.make_node("MatMul", [x, matrix], [product]),
            *([helper.make_node("Add", [product, *bias], [out])] if bias else []),
        ]
    read = {name for node in nodes for name in node.input}
    del graph.node[:]
    graph.node.extend(node for node in nodes if node.op_type != "Constant" or node.output[0] in read)


def with_all_logits(model: ModelProto) -> ModelProto:
    """Change a decoder in place to output the logits of every token, and the residual stream after each layer."""
    graph = model.graph
    streams = [name for node in graph.node for name in node.output if name.startswith(f"{RESIDUAL}.")]
    last = next(at for at, node in enumerate(graph.node) if streams[-1] in node.output)
    for node in graph.node[last + 1 :]:
        if node.op_type == "Slice":  # after the last layer, only the last token is kept
            node.op_type = "Identity"
            del node.input[1:], node.attribute[:]
    graph.output[0].type.tensor_type.shape.dim[1].dim_param = "seq"
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in streams)
    return model


def decoder_with_all_logits(path: Path) -> bytes:
    """Return the decoder at `path` with `with_all_logits`, serialized."""
    model: bytes = with_all_logits(onnx.load(path, load_external_data=False)).SerializeToString()
    return model


def _graphs(graph: GraphProto) -> Iterator[GraphProto]:
    """Yield the graph and its subgraphs."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)


def _widen(node: NodeProto) -> None:
    for attribute in node.attribute:
        if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
            attribute.i = FULL_ACCURACY
        elif node.op_type == "Cast" and attribute.name == "to" and attribute.i in HALF:
            attribute.i = TensorProto.FLOAT
        elif attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type in HALF:
            wide = numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(np.float32), attribute.t.name)
            attribute.t.CopyFrom(wide)


def _on_cpu(config: dict[str, object]) -> dict[str, object]:
    model = config["model"]
    assert isinstance(model, dict)
    for part in model.values():
        if isinstance(part, dict) and "session_options" in part:
            part["session_options"] = session_options("cpu")
    return config
