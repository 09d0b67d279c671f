"""Each graph of a folder against live PyTorch, on the reference's own inputs.

Besides every case: several images and frames in one call, and a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from builder.reference.cases import CHECKS
from builder.reference.model import Prompt, Reference, Trace
from builder.util.errors import BundleError
from builder.verify.graphs.compare import ReferenceCase, TraceCase, embedding_gates, in_order, logit_error
from builder.verify.graphs.per_layer import SlicedGraphs, TraceComparison
from builder.verify.graphs.sessions import Graphs
from builder.verify.memory_budget import SLICE
from builder.verify.report.gates import Gate, compare_close, guarded, uncomputed
from builder.verify.tolerances import FP32

NO_LOGITS = np.zeros((0, 0), np.float32)


def layer_gates(
    folder: Path, target: str, reference: Reference, name: str, prompt: Prompt, limit: float
) -> Iterator[list[Gate]]:
    """The residual stream after every vision block, then after every decoder layer: the first that differs is named.

    The graphs are run once more, cut into slices that give what is inside them; those that ship are compared as they
    are by the other gates.
    """
    graphs = SlicedGraphs(folder, target, reference.checkpoint.text.hidden, SLICE, apart=False)
    comparison = TraceComparison(graphs, reference)
    cases = [ReferenceCase(name, prompt, reference.hidden_states(prompt), limit)]
    for place, compute in (("vision layers", comparison.vision_gates), ("decoder layers", comparison.decoder_gates)):
        try:
            gates = guarded(place, name, in_order, compute, cases)
        except BundleError as error:  # a graph that does not load is said by the session of the whole one
            gates = [uncomputed(place, name, error)]
        yield [gate for gate in gates if gate.place == place]


def graph_gates(
    name: str, graphs: Graphs, reference: Reference, prompt: Prompt, checks: Sequence[str] = CHECKS, limit: float = FP32
) -> tuple[list[Gate], float]:
    """Each graph on the reference's own inputs, so that an error of one is not an error of the next.

    Args:
        checks: what is compared, see `builder.reference.case_file.CHECKS`.
        limit: see `builder.reference.cases.Case`.

    Returns:
        the gates, and the largest absolute difference of a logit: see `logit_error`.
    """
    comparison, gates = TraceComparison(graphs, reference), []
    case = ReferenceCase(name, prompt, Trace((), (), (), NO_LOGITS), limit)
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        case = _with_features(case, reference)
        if "features" in checks:
            gates += guarded("image features", name, in_order, comparison.vision_gates, [case])
    if "embeddings" in checks:
        gates += guarded("embeddings", name, _embedding_gates, graphs, comparison, case)
    if "decoder" not in checks:
        return gates, 0.0
    logits = reference.logits(prompt, ())
    case = replace(case, expected=replace(case.expected, logits=logits))
    gates += guarded("decoder prefill", name, in_order, comparison.decoder_gates, [case])
    return gates, logit_error(gates, limit, float(logits.std()))


def _with_features(case: TraceCase, reference: Reference) -> TraceCase:
    assert case.prompt.pixel_values is not None
    assert case.prompt.image_grid_thw is not None
    main, levels = reference.vision(case.prompt.pixel_values, case.prompt.image_grid_thw)
    return replace(case, expected=replace(case.expected, features=(main, *levels)))


def _embedding_gates(graphs: Graphs, comparison: TraceComparison, case: TraceCase) -> list[Gate]:
    """What the decoder is fed, whether the graph or the client merges."""
    main, *levels = comparison.features(case)
    got, spread = graphs.embed(case.prompt.input_ids, main, levels, comparison.reference.image_token_id)
    return embedding_gates(case, [got, *spread], comparison.merged_embeddings(case))


def geometry_gates(graphs: Graphs, reference: Reference) -> list[Gate]:
    """Vision only: several frames, several images of different sizes in one call, one row of blocks."""
    vision, cases = reference.checkpoint.vision, []
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    none = np.zeros((1, 0), np.int64)
    for grids in ([[2, 4, 6], [1, 2, 2]], [[1, 2, 12]], [[3, 2, 2], [1, 4, 4], [2, 8, 2]]):
        grid = np.array(grids, np.int64) * [1, vision.merge_size, vision.merge_size]
        pixels = np.random.default_rng(len(grids)).standard_normal((int(grid.prod(1).sum()), width), np.float32)
        name = " ".join("×".join(map(str, row)) for row in grid.tolist())
        case = ReferenceCase(f"grid {name}", Prompt(none, pixels, grid, none), Trace((), (), (), NO_LOGITS))
        cases.append(_with_features(case, reference))
    return in_order(TraceComparison(graphs, reference).vision_gates, cases)


def batch_gates(graphs: Graphs, reference: Reference) -> list[Gate]:
    """Two rows of equal length with different positions on the three axes, prefill and one step."""
    text = reference.checkpoint.text
    ids = np.random.default_rng(0).integers(0, text.vocab, (2, 9), np.int64)
    embeds = reference.embed(ids)
    # None is beyond its token's index, as none of a prompt is.
    positions = np.stack([np.arange(9)[None] // [[1 + axis], [2 + axis]] for axis in range(3)]).astype(np.int64)
    want = reference.text_logits(embeds, positions)
    levels = [np.zeros_like(embeds)] * len(reference.checkpoint.vision.deepstack)
    gates, past = [], None
    for place, begin, end in (("decoder prefill", 0, 8), ("decoder step", 8, 9)):
        part = slice(begin, end)
        pieces = [level[:, part] for level in levels]
        mask = np.ones((2, end), np.int64)
        got, past = graphs.decode(embeds[:, part], pieces, positions[:, :, part], mask, past)
        expected = want[:, end - 1 : end] if graphs.packed else want[:, part]
        gates.append(compare_close(place, "batch of two", got, expected, FP32))
    return gates
