"""lower_segment_attention: both lowerings against softmax(q·kᵀ)·v per segment in numpy, and their memory."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from builder.graph.passes.lower_segment_attention import BLOCK, lower_segment_attention
from builder.graph.passes.result import PassResult
from tests.helpers.small_graphs import Array, bound_graph, drawn, operators, run, session

HEADS, HIDDEN, SCALE = 2, 8, 0.3
PORTS = f"""
attention (float[patches, {HIDDEN}] q, float[patches, {HIDDEN}] k, float[patches, {HIDDEN}] v,
           int64[patches] begin, int64[patches] end) => (float[patches, {HIDDEN}] out)
"""
ATTEND = f"qwen3vl.SegmentAttention <num_heads = {HEADS}, scale = {SCALE}>"
TEXT = f"{PORTS} {{ doubled = Add(q, q) attended = {ATTEND} (doubled, k, v, begin, end) out = Neg(attended) }}"
RAGGED = (4, 12, 1, 7)
KINDS = pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])


def lowered(fused: bool, block: int = BLOCK, text: str = TEXT) -> PassResult:
    return lower_segment_attention(bound_graph(text, None, ["qwen3vl"]), fused=fused, block=block)


def inputs(lengths: Sequence[int]) -> dict[str, Array]:
    """Query, key and value, and of each patch where its segment begins and ends."""
    patches = sum(lengths)
    query, key, value = (3 * drawn(patches, HIDDEN, seed=seed) for seed in range(3))
    ends = np.cumsum(lengths, dtype=np.int64)
    begins = ends - np.asarray(lengths, np.int64)
    ranges = {"begin": np.repeat(begins, lengths), "end": np.repeat(ends, lengths)}
    return {"q": query, "k": key, "v": value, **ranges}


def attention(query: Array, key: Array, value: Array, lengths: Sequence[int], scale: float = SCALE) -> Array:
    """Attention in float64, a segment and a head at a time."""
    out = np.zeros(query.shape)
    start, width = 0, HIDDEN // HEADS
    for length in lengths:
        rows = slice(start, start + length)
        for head in range(HEADS):
            part = rows, slice(head * width, (head + 1) * width)
            scores = scale * query[part].astype(np.float64) @ key[part].T
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[part] = weights / weights.sum(-1, keepdims=True) @ value[part]
        start += length
    return out


def assert_attends(outcome: PassResult, lengths: Sequence[int]) -> None:
    feed = inputs(lengths)
    (got,) = run(outcome.graph, **feed)
    want = -attention(2 * feed["q"], feed["k"], feed["v"], lengths)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


@KINDS
@pytest.mark.parametrize("block", [1, 3, 256])
@pytest.mark.parametrize(
    "lengths", [(6,), (1,), (3,), (16, 16), RAGGED, (1, 1, 1), (300, 4, 256, 257)], ids=lambda x: "+".join(map(str, x))
)
def test_each_patch_attends_to_its_own_segment(fused: bool, block: int, lengths: Sequence[int]) -> None:
    outcome = lowered(fused, block)
    assert (outcome.matches, outcome.misses) == (1, ())
    assert_attends(outcome, lengths)


@KINDS
def test_one_graph_takes_any_number_of_segments(fused: bool) -> None:
    outcome = lowered(fused, 3)
    for lengths in ((5,), RAGGED, (2, 2)):
        assert_attends(outcome, lengths)


@KINDS
@pytest.mark.parametrize("block", [1, 256])
def test_no_patches_at_all(fused: bool, block: int) -> None:
    (got,) = run(lowered(fused, block).graph, **inputs(()))
    assert got.shape == (0, HIDDEN)


@KINDS
def test_a_segment_sees_nothing_of_another(fused: bool) -> None:
    """Not even a value that would dominate all others."""
    outcome, feed = lowered(fused, 3), inputs(RAGGED)
    (before,) = run(outcome.graph, **feed)
    feed["k"][4:16], feed["v"][4:16] = 1e4, np.nan
    (after,) = run(outcome.graph, **feed)
    kept = np.r_[0:4, 16:24]
    np.testing.assert_array_equal(after[kept], before[kept])
    assert np.isnan(after[4:16]).all()


def test_eager_has_standard_operators_only() -> None:
    graph = lowered(fused=False).graph
    assert {node.domain for node in graph.model.graph.all_nodes()} == {""}
    assert graph.model.graph.opset_imports == {"": 18}


def test_fused_adds_a_single_attention_operator() -> None:
    graph = lowered(fused=True).graph
    contrib = [name for name in operators(graph).elements() if "::" in name]
    assert contrib == ["com.microsoft::MultiHeadAttention"]
    assert graph.model.graph.opset_imports == {"": 18, "com.microsoft": 1}


@KINDS
def test_layers_in_a_row_do_not_meet(fused: bool) -> None:
    """A graph and its loops share a namespace; the last output is that of the graph."""
    text = f"""{PORTS} <float[patches, {HIDDEN}] mixed> {{
        doubled = Add(q, q)
        attended = {ATTEND} (doubled, k, v, begin, end)
        mixed = Sub(attended, q)
        out = {ATTEND.replace(str(SCALE), "0.7")} (mixed, k, v, begin, end)
    }}"""
    outcome = lowered(fused, 3, text)
    assert outcome.matches == 2
    feed = inputs(RAGGED)
    first = attention(2 * feed["q"], feed["k"], feed["v"], RAGGED)
    want = attention(first - feed["q"], feed["k"], feed["v"], RAGGED, 0.7)
    np.testing.assert_allclose(run(outcome.graph, **feed)[0], want, rtol=1e-5, atol=1e-5)


@KINDS
def test_a_graph_without_the_operator_does_not_match(fused: bool) -> None:
    text = "none (float[n, 8] x) => (float[n, 8] y) { y = Neg(x) }"
    outcome = lowered(fused, text=text)
    assert outcome.matches == 0
    assert outcome.graph.model.graph.opset_imports == {"": 18}


def largest_results(outcome: PassResult, lengths: Sequence[int], folder: Path) -> dict[str, int]:
    """Operator → most elements of any of its outputs, subgraphs included, from ONNX Runtime's profile."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(folder / "profile")
    profiled = session(outcome.graph, {}, options)
    profiled.run(None, inputs(lengths))
    largest: dict[str, int] = {}
    for event in json.loads(Path(profiled.end_profiling()).read_text()):
        for result in event.get("args", {}).get("output_type_shape", []):
            for shape in result.values():
                name = event["args"]["op_name"]
                largest[name] = max(largest.get(name, 0), math.prod(shape))
    return largest


@pytest.mark.parametrize(("lengths", "block"), [((40, 100, 60), 4), ((300, 700), BLOCK)])
def test_eager_holds_a_block_of_rows_against_one_segment(lengths: Sequence[int], block: int, tmp_path: Path) -> None:
    largest = largest_results(lowered(fused=False, block=block), lengths, tmp_path)
    scores, patches = HEADS * block * max(lengths), sum(lengths)
    assert largest["Softmax"] == scores
    assert max(largest.values()) == max(scores, patches * HIDDEN) < HEADS * patches**2 / 5


def test_fused_holds_no_scores(tmp_path: Path) -> None:
    lengths = (40, 100, 60)
    largest = largest_results(lowered(fused=True), lengths, tmp_path)
    assert largest["MultiHeadAttention"] == max(lengths) * HIDDEN
    assert max(largest.values()) == sum(lengths) * HIDDEN


LARGE = """
import sys
import numpy as np
from builder.util.peak_memory import peak_rss
from builder.graph.passes.lower_segment_attention import lower_segment_attention
from tests.helpers.small_graphs import bound_graph, session
patches, hidden, heads, fused = 16384, 1024, 16, sys.argv[1] == "fused"
text = f'''large (float[p, {hidden}] q, float[p, {hidden}] k, float[p, {hidden}] v, int64[p] begin, int64[p] end)
    => (float[p, {hidden}] out)
    {{ out = qwen3vl.SegmentAttention <num_heads = {heads}, scale = 0.125> (q, k, v, begin, end) }}'''
graph = lower_segment_attention(bound_graph(text, None, ["qwen3vl", "com.microsoft"]), fused=fused).graph
feed = {name: np.random.default_rng(0).standard_normal((patches, hidden), np.float32) for name in "qkv"}
feed |= {"begin": np.zeros(patches, np.int64), "end": np.full(patches, patches, np.int64)}
assert np.isfinite(session(graph, {}).run(None, feed)[0]).all()
print(peak_rss())
"""


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["eager", "fused"])
def test_a_layer_over_16384_patches_stays_within_2_gigabytes(attention: str) -> None:
    """16 heads: the scores alone would take 17 GB at once. Peak memory of the process."""
    root = Path(__file__).parents[3]
    command = [sys.executable, "-c", LARGE, attention]
    result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root)
    assert int(result.stdout) < 2 * 10**9
