"""simplify: less graph, the same numbers, no weight read."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from builder.graph import binding
from builder.graph.binding import UNBOUND
from builder.graph.passes.simplify import simplify
from tests.helpers.small_graphs import bound_graph, drawn, operators, run

WEIGHTS = {"weight": drawn(5, 4), "gain": 1 + drawn(5) ** 2, "unused": drawn(2, 2)}
# What the exporter leaves: shape arithmetic, the same node twice, identities, results that nothing reads.
TRACED = """
traced (float[seq, 4] x) => (float[n, 5] y) {
    two = Constant <value = int64[1] {2}> ()
    three = Constant <value = int64[1] {3}> ()
    six = Mul(two, three)
    one = Sub(three, two)
    minus = Sub(two, three)
    columns = Shape <start = 0, end = 1> (weight)
    target = Concat <axis = 0> (minus, columns)
    turned = Transpose <perm = [1, 0]> (weight)
    linear = MatMul(x, turned)
    root = Sqrt(gain)
    first = Mul(linear, root)
    same = Mul(linear, root)
    copy = Identity(same)
    sum = Add(first, copy)
    forgotten = Exp(unused)
    y = Reshape(sum, target)
}
"""


def test_shape_arithmetic_is_folded_and_the_numbers_stay() -> None:
    traced, x = bound_graph(TRACED, WEIGHTS), drawn(7, 4)
    before, nodes = run(traced, WEIGHTS, x=x), len(traced.model.graph)
    outcome = simplify(traced)
    assert operators(outcome.graph) == {"Transpose": 1, "MatMul": 1, "Sqrt": 1, "Mul": 1, "Add": 1, "Reshape": 1}
    assert outcome.matches == nodes - len(outcome.graph.model.graph) > 0
    np.testing.assert_array_equal(run(outcome.graph, WEIGHTS, x=x), before)


def test_bound_weights_are_neither_read_nor_folded() -> None:
    """Transpose(weight) and Sqrt(gain) are constants to a folder that sees the weights."""
    outcome = simplify(bound_graph(TRACED, WEIGHTS))
    readers = {node.op_type: node.inputs[0] for node in outcome.graph.model.graph}
    for operator, name in (("Transpose", "weight"), ("Sqrt", "gain")):
        value = readers[operator]
        assert value is not None
        assert value.name == name
        assert isinstance(value.const_value, ir.ExternalTensor)
        assert value.const_value.location == UNBOUND
        with pytest.raises(FileNotFoundError):
            value.const_value.numpy()
    assert set(outcome.graph.model.graph.initializers) >= {"weight", "gain"}


def test_not_even_a_file_of_the_stand_ins_name_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / UNBOUND).write_bytes(bytes(4096))
    monkeypatch.chdir(tmp_path)
    outcome = simplify(bound_graph(TRACED, WEIGHTS))
    assert {"Transpose", "Sqrt"} <= set(operators(outcome.graph))


def test_a_weight_that_nothing_reads_leaves_graph_and_bindings() -> None:
    outcome = simplify(bound_graph(TRACED, WEIGHTS))
    assert set(outcome.graph.bindings) == {"weight", "gain"}
    assert "unused" not in outcome.graph.model.graph.initializers


def test_an_unbound_initializer_is_folded() -> None:
    text = "one (float[seq, 4] x) => (float[seq, 4] y) { root = Sqrt(gain) y = Mul(x, root) }"
    known = bound_graph(text)
    gain = ir.tensor(np.array([1, 4, 9, 16], np.float32), name="gain")
    known.model.graph.register_initializer(ir.Value(name="gain", const_value=gain))
    known.model.graph.node(0).replace_input_with(0, known.model.graph.initializers["gain"])
    x = drawn(3, 4)
    outcome = simplify(known)
    assert operators(outcome.graph) == {"Mul": 1}
    np.testing.assert_array_equal(run(outcome.graph, x=x)[0], x * np.array([1, 2, 3, 4], np.float32))


def test_nothing_to_simplify_is_no_match() -> None:
    outcome = simplify(bound_graph("one (float[n] x) => (float[n] y) { y = Neg(x) }"))
    assert (outcome.matches, operators(outcome.graph)) == (0, {"Neg": 1})


def test_two_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        binding.save(simplify(bound_graph(TRACED, WEIGHTS)).graph, tmp_path / f"{name}.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()
    one, two = (binding.bindings_file(tmp_path / f"{name}.onnx").read_text() for name in ("one", "two"))
    assert one == two


@pytest.mark.seconds
def test_another_hash_seed_gives_the_same_bytes(tmp_path: Path) -> None:
    binding.save(simplify(bound_graph(TRACED, WEIGHTS)).graph, tmp_path / "here.onnx")
    program = (
        "import sys, pathlib; from builder.graph import binding; from builder.graph.passes.simplify import simplify\n"
        "from tests.graph.passes.test_simplify import TRACED, WEIGHTS\n"
        "from tests.helpers.small_graphs import bound_graph\n"
        "binding.save(simplify(bound_graph(TRACED, WEIGHTS)).graph, pathlib.Path(sys.argv[1]))"
    )
    there = tmp_path / "there.onnx"
    environment = {**os.environ, "PYTHONHASHSEED": "4711"}
    root = Path(__file__).parents[3]
    subprocess.run([sys.executable, "-c", program, str(there)], check=True, env=environment, cwd=root)
    here = hashlib.sha256((tmp_path / "here.onnx").read_bytes()).hexdigest()
    assert hashlib.sha256(there.read_bytes()).hexdigest() == here
