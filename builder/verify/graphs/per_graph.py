"""Each graph of a folder against PyTorch, on the reference's own inputs.

In: the three graphs and a reference. Out: gates on features, embeddings and logits, and on the residual stream behind
each layer. Guaranteed: an error of one graph is not one of the next; several images and frames in one call, a chunk on
a past, single steps and a batch are among what is compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from builder.reference.case_file import FP32
from builder.reference.cases import CHECKS
from builder.reference.model import Prompt, Reference
from builder.util.errors import BundleError
from builder.verify.graphs.per_layer import ReferenceCase, SlicedGraphs
from builder.verify.graphs.sessions import Graphs, merged
from builder.verify.memory_budget import SLICE
from builder.verify.report.exhibits import show_logits
from builder.verify.report.gates import Gate, compare_close, guarded, uncomputed


def layer_gates(
    folder: Path, target: str, reference: Reference, name: str, prompt: Prompt, limit: float
) -> Iterator[list[Gate]]:
    """The residual stream behind every vision block, then behind every decoder layer: the first that differs is named.

    The graphs are run once more, cut into slices that give what is inside them; those that ship are compared as they
    are by the other gates.
    """
    trace = reference.hidden_states(prompt)
    graphs = SlicedGraphs(folder, target, reference, SLICE, apart=False)
    asked = [ReferenceCase(name, prompt, trace, limit)]
    for place, compute in (("vision layers", graphs.vision_gates), ("decoder layers", graphs.decoder_gates)):
        try:
            gates = guarded(place, name, compute, asked)
        except BundleError as error:  # a graph that does not load is said by the session of the whole one
            gates = [uncomputed(place, name, error)]
        yield [gate for gate in gates if gate.place == place]


def graph_gates(
    name: str, graphs: Graphs, reference: Reference, prompt: Prompt, checks: Sequence[str] = CHECKS, limit: float = FP32
) -> tuple[list[Gate], float]:
    """Each graph on the reference's own inputs, so that an error of one is not one of the next.

    Args:
        checks: what is compared, see `builder.reference.case_file.CHECKS`.
        limit: see `builder.reference.cases.Case`.

    Returns the gates, and the largest absolute difference of a logit, which no more than `limit` allows: what is wrong
    beyond that may not excuse a token.
    """
    gates: list[Gate] = []
    hidden = reference.checkpoint.text.hidden
    main = np.zeros((0, hidden), np.float32)
    levels = [main] * len(reference.checkpoint.vision.deepstack)
    if prompt.pixel_values is not None and prompt.image_grid_thw is not None:
        main, levels = reference.vision(prompt.pixel_values, prompt.image_grid_thw)
        inputs = (prompt.pixel_values, prompt.image_grid_thw)
        if "features" in checks:
            gates += guarded("image features", name, feature_gates, name, graphs, *inputs, main, levels, limit)
    mask = prompt.input_ids == reference.image_token_id
    want = merged(reference.embed(prompt.input_ids), mask, main, levels)
    arguments = (prompt.input_ids, main, levels, reference.image_token_id)
    if "embeddings" in checks:
        gates += guarded("embeddings", name, embedding_gates, name, graphs, arguments, want, limit)
    if "decoder" not in checks:
        return gates, 0.0
    logits = reference.logits(prompt, ())[None]
    decoded = guarded("decoder prefill", name, decoder_gates, name, graphs, prompt, want, logits, limit)
    return gates + decoded, min(max(gate.measured for gate in decoded), limit) * float(logits.std())


def embedding_gates(
    name: str,
    graphs: Graphs,
    arguments: tuple[np.ndarray, np.ndarray, list[np.ndarray], int],
    want: tuple[np.ndarray, list[np.ndarray]],
    limit: float,
) -> list[Gate]:
    """The merged embeddings and each DeepStack input, from `Graphs.embed(*arguments)`."""
    got = graphs.embed(*arguments)
    return [
        compare_close("embeddings", f"{name}, {f'level {level - 1}' if level else 'main'}", a, b, limit)
        for level, (a, b) in enumerate(zip((got[0], *got[1]), (want[0], *want[1]), strict=True))
    ]


def feature_gates(
    name: str,
    graphs: Graphs,
    pixels: np.ndarray,
    grid: np.ndarray,
    main: np.ndarray,
    levels: Sequence[np.ndarray],
    limit: float = FP32,
) -> list[Gate]:
    """The vision encoder's main features and each DeepStack level."""
    got, got_levels = graphs.vision(pixels, grid)
    gates = [compare_close("image features", name, got, main, limit)]
    if len(got_levels) != len(levels):
        detail = f"{len(got_levels)} levels, expected {len(levels)}"
        return [*gates, Gate("deepstack features", name, float(len(levels)), 0.0, detail)]
    return gates + [
        compare_close("deepstack features", f"{name}, level {level}", a, b, limit)
        for level, (a, b) in enumerate(zip(got_levels, levels, strict=True))
    ]


def decoder_gates(
    name: str,
    graphs: Graphs,
    prompt: Prompt,
    inputs: tuple[np.ndarray, list[np.ndarray]],
    want: np.ndarray,
    limit: float,
) -> list[Gate]:
    """Prefill of all but six tokens, a chunk of four on that past, then two single steps, against one forward pass."""
    embeds, levels = inputs
    seq = embeds.shape[1]
    cuts = [0, seq - 6, seq - 2, seq - 1, seq]
    places = ("decoder prefill", "decoder chunk", "decoder step", "decoder step")
    gates, past = [], None
    for place, begin, end in zip(places, cuts, cuts[1:], strict=False):
        part = slice(begin, end)
        mask = np.ones((1, end), np.int64)
        pieces = [level[:, part] for level in levels]
        got, past = graphs.decode(embeds[:, part], pieces, prompt.position_ids[:, :, part], mask, past)
        expected = want[:, end - 1 : end] if graphs.packed else want[:, part]
        gates.append(compare_close(place, f"{name}, tokens {begin}–{end}", got, expected, limit))
        show_logits(name, (begin, end), got, expected)
    return gates


def geometry_gates(graphs: Graphs, reference: Reference) -> list[Gate]:
    """Vision only: several frames, several images of different sizes in one call, one row of blocks."""
    vision, gates = reference.checkpoint.vision, []
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    for grids in ([[2, 4, 6], [1, 2, 2]], [[1, 2, 12]], [[3, 2, 2], [1, 4, 4], [2, 8, 2]]):
        grid = np.array(grids, np.int64) * [1, vision.merge_size, vision.merge_size]
        pixels = np.random.default_rng(len(grids)).standard_normal((int(grid.prod(1).sum()), width), np.float32)
        name = " ".join("×".join(map(str, one)) for one in grid.tolist())
        gates += feature_gates(f"grid {name}", graphs, pixels, grid, *reference.vision(pixels, grid))
    return gates


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
