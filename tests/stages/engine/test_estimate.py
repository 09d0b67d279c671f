"""Estimates, against written files and against formulas by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from builder.checkpoint.load import open_checkpoint
from builder.graph.external_data import STRIP
from builder.stages.engine.dry_run import described
from builder.stages.engine.estimate import Facts, GraphBytes, graph_bytes, stage_cost
from builder.stages.engine.measured import HASH_RATE, TRACE_SECONDS, WRITE_RATE
from builder.targets.recipe_file import load_recipe
from builder.verify.memory_budget import LARGEST_PATCHES, LARGEST_PIXELS, VERIFY_MEMORY, verify_memory, verify_mode
from tests.conftest import Built

RUNTIMES = ("genai", "onnxruntime")
TIED, UNTIED = "biased", "untied"


def of(folder: Path) -> Facts:
    return described(open_checkpoint(folder))


def data(rows: tuple[GraphBytes, ...]) -> dict[str, int]:
    """Bytes per data file of the first target."""
    return {row.data: row.data_bytes for row in rows if row.data_bytes}


def pages(elements: int) -> int:
    return math.ceil(elements * 4 / 4096) * 4096


def check_written(facts: Facts, configured: Path) -> None:
    """Each data file has the estimated size, and there are no others."""
    rows = graph_bytes(facts, RUNTIMES)
    for runtime in RUNTIMES:
        written = {file.name: file.stat().st_size for file in (configured / runtime).glob("*.data")}
        assert written == data(rows)
    first, second = (configured / runtime / "model.onnx.data" for runtime in RUNTIMES)
    assert first.samefile(second)
    estimated = {f"{row.target}/{row.graph}": row.graph_bytes for row in rows if row.graph != "embeddings.onnx"}
    for name, size in estimated.items():
        assert size / 3 < (configured / name).stat().st_size <= size


@pytest.mark.torch
def test_data_files_have_exactly_the_estimated_size(miniature: Path, miniature_built: Path) -> None:
    check_written(of(miniature), miniature_built)


@pytest.mark.torch
@pytest.mark.slow
@pytest.mark.parametrize("shape", [TIED, UNTIED])
def test_other_shapes_do_too(checkpoint: Callable[[str], Path], built: Built, shape: str) -> None:
    folder = checkpoint(shape)
    check_written(of(folder), built(folder, load_recipe("fp32")))


@pytest.mark.parametrize(("shape", "files"), [(TIED, {"vision_encoder", "model"}), (UNTIED, None)])
def test_every_tensor_is_in_one_file_on_pages_of_its_own(
    checkpoint: Callable[[str], Path], shape: str, files: set[str] | None
) -> None:
    facts = of(checkpoint(shape))
    sizes = data(graph_bytes(facts, RUNTIMES))
    wanted = files or {"vision_encoder", "model", "embeddings"}
    assert set(sizes) == {f"{name}.onnx.data" for name in wanted}
    assert sum(sizes.values()) == sum(pages(math.prod(tensor.shape)) for tensor in facts.tensors.values())
    embeddings = pages(facts.text.vocab * facts.text.hidden)
    assert sizes.get("embeddings.onnx.data", embeddings) == embeddings


def test_the_head_of_a_tied_checkpoint_is_the_embedding_matrix(checkpoint: Callable[[str], Path]) -> None:
    rows = {row.graph: row for row in graph_bytes(of(checkpoint(TIED)), ["genai"])}
    assert (rows["embeddings.onnx"].data, rows["embeddings.onnx"].data_bytes) == ("model.onnx.data", 0)
    rows = {row.graph: row for row in graph_bytes(of(checkpoint(UNTIED)), ["genai"])}
    assert rows["embeddings.onnx"].data == "embeddings.onnx.data"


def test_a_second_target_adds_no_weights(miniature: Path) -> None:
    facts = of(miniature)
    both, one = graph_bytes(facts, RUNTIMES), graph_bytes(facts, ["onnxruntime"])
    assert [row.data_bytes for row in both[3:]] == [0, 0, 0]
    assert [row.data for row in both[3:]] == [row.data for row in one]
    assert sum(row.data_bytes for row in both) == sum(row.data_bytes for row in one)


def test_the_memory_of_verify_by_hand(checkpoint: Callable[[str], Path]) -> None:
    untied = open_checkpoint(checkpoint(UNTIED))
    elements = sum(math.prod(tensor.shape) for tensor in untied.tensors.values())
    # The head, 4096 rows of 64, is larger than a layer here.
    image = LARGEST_PIXELS + 16 * LARGEST_PATCHES * untied.vision.intermediate
    assert verify_memory(untied) == (VERIFY_MEMORY + image + 12 * elements, VERIFY_MEMORY + 8 * 4096 * 64)
    layer = {name: tensor for name, tensor in untied.tensors.items() if ".layers.0." in name}
    wide = {name: replace(tensor, shape=(*tensor.shape, 100)) for name, tensor in layer.items()}
    largest = 100 * sum(math.prod(tensor.shape) for tensor in layer.values())
    facts = replace(described(untied), tensors={**untied.tensors, **wide})
    assert verify_memory(facts)[1] == VERIFY_MEMORY + 8 * largest


def test_verify_keeps_the_complete_model_where_it_fits(miniature: Path) -> None:
    facts = of(miniature)
    whole, sliced = verify_memory(facts)
    assert sliced < whole
    assert (verify_mode(facts, whole), verify_mode(facts, whole - 1)) == ("whole", "layerwise")
    assert stage_cost("verify", facts, RUNTIMES, "whole").memory == whole
    assert stage_cost("verify", facts, RUNTIMES, "layerwise").memory == sliced


def test_only_quantize_and_verify_depend_on_the_weights(miniature: Path) -> None:
    small = of(miniature)
    tensors = {
        name: replace(tensor, nbytes=tensor.nbytes * 4, shape=(*tensor.shape, 4))
        for name, tensor in small.tensors.items()
    }
    large = replace(small, tensors=tensors)
    for stage in ("fetch", "patch", "export", "optimize", "configure", "bundle"):
        assert stage_cost(stage, small, RUNTIMES, "whole") == stage_cost(stage, large, RUNTIMES, "whole")
    for stage in ("quantize", "verify"):
        assert stage_cost(stage, small, RUNTIMES, "whole").seconds < stage_cost(stage, large, RUNTIMES, "whole").seconds


def test_quantize_keeps_the_largest_transposed_matrix_but_at_most_a_strip(miniature: Path) -> None:
    facts = of(miniature)
    name = "model.language_model.layers.0.mlp.gate_proj.weight"

    def memory(nbytes: int) -> int:
        tensors = {**facts.tensors, name: replace(facts.tensors[name], nbytes=nbytes)}
        return stage_cost("quantize", replace(facts, tensors=tensors), RUNTIMES, "whole").memory

    assert memory(50_000_000) - memory(20_000_000) == 30_000_000
    assert memory(100 * STRIP) == memory(STRIP) == memory(20_000_000) + STRIP - 20_000_000


def test_what_is_written_and_read_takes_its_time(miniature: Path) -> None:
    facts = of(miniature)
    written = sum(row.data_bytes for row in graph_bytes(facts, RUNTIMES))
    cost = stage_cost("quantize", facts, RUNTIMES, "whole")
    assert cost.seconds == pytest.approx(1 + written / WRITE_RATE)
    assert written < cost.written < written + 2_000_000
    downloaded = replace(facts, missing={"model.safetensors": 10**10})
    more = stage_cost("fetch", downloaded, RUNTIMES, "whole").seconds - stage_cost("fetch", facts, (), "whole").seconds
    assert more == pytest.approx(10**10 / HASH_RATE)
    assert stage_cost("export", facts, RUNTIMES, "whole").seconds == len(RUNTIMES) * TRACE_SECONDS
