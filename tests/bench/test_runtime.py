"""Test the runtime bench: figures, missing contestants, ratios and tables; nothing of a real size runs."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from bench.measure import Run
from bench.runtime import claims, document, figures, folders, llama, profile
from bench.runtime.__main__ import Options, artifacts, field
from bench.runtime.claims import CLAIMS, LLAMA, SDPA, THEIRS, named, shown
from bench.runtime.contest import Rules, contest
from bench.runtime.contestants import Contestant, genai
from bench.runtime.document import Result, bandwidth, section
from bench.runtime.figures import COLD, DECODE, IMAGES, LOAD, TEXT_PEAK, Measured, Outcome, answer, prefill, vision
from bench.runtime.llama import AbsentError, Llama
from bench.synthetic import SIZES, write_synthetic
from builder.targets.clients.pipeline import read_image_settings, target_size
from builder.targets.config_files import vision_processor
from builder.util.cost import Cost

OURS = "ours, int4"
# What llama-bench prints with `-o json`, shortened.
PREFILLS = json.dumps(
    [
        {"n_prompt": 128, "n_gen": 0, "n_depth": 0, "avg_ns": 1_600_000_000, "avg_ts": 80.0},
        {"n_prompt": 1024, "n_gen": 0, "n_depth": 0, "avg_ns": 16_000_000_000, "avg_ts": 64.0},
    ]
)
DECODED = json.dumps([{"n_prompt": 0, "n_gen": 64, "n_depth": 128, "avg_ns": 3_200_000_000, "avg_ts": 20.0}])


@pytest.fixture
def log() -> list[str]:
    return []


@pytest.fixture
def quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait for an idle machine."""
    monkeypatch.setattr(figures, "wait_for_quiet", lambda patience: None)


def giving(values: Iterator[Measured]) -> Callable[[], Measured]:
    return lambda: next(values)


def printing(text: str) -> list[object]:
    return [sys.executable, "-c", f"print({text!r})"]


def test_a_process_gives_its_last_line_and_its_peak() -> None:
    found = figures.process(printing('warning\n{"load_s": 1.5}'), TEXT_PEAK)
    assert found.failure is None
    assert found.figures[LOAD] == 1.5
    assert found.figures[TEXT_PEAK] > 1e6


def test_a_failed_process_reports_why() -> None:
    found = figures.process([sys.executable, "-c", "raise MemoryError('no room')"], TEXT_PEAK)
    assert found.figures == {}
    assert found.failure == "exit 1: MemoryError: no room"


def test_several_processes_combine_to_one_figure_each_and_the_highest_peak() -> None:
    first = Measured({LOAD: 1.0, TEXT_PEAK: 5.0}, None, 0.1)
    found = figures.together([first, Measured({DECODE: 9.0, TEXT_PEAK: 4.0}, "killed", 0.3)])
    assert found == Measured({LOAD: 1.0, DECODE: 9.0, TEXT_PEAK: 5.0}, "killed", 0.3)


def test_a_disturbed_run_is_repeated_and_the_quietest_counts(quiet: None) -> None:
    runs = [Measured({LOAD: 3.0}, None, 0.9), Measured({LOAD: 2.0}, None, 0.4), Measured({LOAD: 2.5}, None, 0.6)]
    assert figures.undisturbed(giving(iter(runs)), 1).figures == {LOAD: 2.0}
    assert figures.undisturbed(giving(iter([replace(runs[0], others=0.05)])), 1)
    # Without patience the first run counts.
    assert figures.undisturbed(giving(iter(runs)), 0).figures == {LOAD: 3.0}


def test_figures_are_medians_and_peaks_are_maxima() -> None:
    outcome = Outcome({LOAD: [1.0, 9.0, 2.0], TEXT_PEAK: [1.0, 9.0, 2.0]})
    assert outcome.typical(LOAD) == 2.0
    assert outcome.typical(TEXT_PEAK) == 9.0
    assert outcome.typical(DECODE) is None


def test_contestants_run_in_turn_and_failed_tasks_are_not_repeated(quiet: None, log: list[str]) -> None:
    def bad() -> Measured:
        return Measured({}, "killed by SIGKILL")

    def good() -> Measured:
        return Measured({LOAD: 1.0})

    field = [Contestant("a", {"short": good}), Contestant("b", {"short": bad}), Contestant("c", {"t": good}, once=True)]
    outcomes = contest(field, Rules(2, 0, log.append))
    assert [line.partition(": ")[2] for line in log] == ["a, short", "b, short", "c, t", "a, short"]
    assert outcomes["a"].runs == {LOAD: [1.0, 1.0]}
    assert outcomes["b"].failures == ("short: killed by SIGKILL",)
    assert outcomes["c"].runs == {LOAD: [1.0]}


def test_llama_bench_output_is_parsed() -> None:
    assert llama.figures(PREFILLS, 20.0) == {prefill(128): 1.6, prefill(1024): 16.0}
    assert llama.figures(DECODED, 5.0) == {DECODE: 20.0}
    cold = json.dumps(json.loads(PREFILLS)[:1])
    assert llama.figures(cold, 2.5, {(128, 0): COLD}) == {COLD: 1.6, LOAD: pytest.approx(0.9)}


def test_missing_llama_is_reported(tmp_path: Path) -> None:
    with pytest.raises(AbsentError, match="neither --llama nor LLAMA_CPP"):
        llama.somewhere(None, {})
    with pytest.raises(AbsentError, match="names an existing folder"):
        llama.somewhere(tmp_path / "none", {})
    build = llama.somewhere(None, {llama.VARIABLE: str(tmp_path)})
    with pytest.raises(AbsentError, match="build/bin/llama-bench is not in the folder") as error:
        llama.gguf(build, tmp_path, tmp_path / "model.gguf")
    assert str(tmp_path) not in str(error.value)


def test_a_failed_conversion_is_a_reason_and_leaves_no_files(tmp_path: Path) -> None:
    for name in (llama.BENCH, llama.QUANTIZE):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "source").mkdir()
    (tmp_path / llama.CONVERTER).write_text("raise ValueError('unknown model')")
    with pytest.raises(AbsentError, match="exit 1: ValueError: unknown model"):
        llama.gguf(Llama(tmp_path), tmp_path, tmp_path / "model.gguf")
    assert not list(tmp_path.glob("*.gguf"))


def options(tmp_path: Path, *skip: str, recipes: tuple[str, ...] = ()) -> Options:
    return Options(tmp_path, tmp_path / "checkpoint", 2, recipes, (), frozenset(skip), None)


def test_missing_contestants_are_listed_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(llama.VARIABLE, raising=False)
    monkeypatch.setattr(folders, "run", lambda *_, **__: Run(Cost(1.0, 1.0, 1, None, None), "exit 13: no recipe", ""))
    found = {each.name: each.absent for each in field(options(tmp_path, "torch", recipes=("int4",)))}
    assert found.pop("this machine") is None
    assert found == {
        named(OURS, 2): "the build failed: exit 13: no recipe",
        named(OURS, None): "the build failed: exit 13: no recipe",
        named(THEIRS, 2): "the build failed: exit 13: no recipe",
        named(THEIRS, None): "the build failed: exit 13: no recipe",
        LLAMA: "not installed: neither --llama nor LLAMA_CPP names an existing folder",
    }


def test_names_in_claims_are_names_of_contestants(tmp_path: Path) -> None:
    names = {each.name for each in field(options(tmp_path, "genai", "llama"))}
    assert SDPA in names
    assert [each.name for each in artifacts(options(tmp_path, recipes=("int4", "my/int4-small.toml")))] == [
        OURS,
        "ours, int4-small",
        THEIRS,
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A decoder with a matrix of 4-bit blocks that is also the embedding, and a cache that no step multiplies with."""
    packed = numpy_helper.from_array(np.zeros((32, 2, 16), np.uint8), "packed")
    scales = numpy_helper.from_array(np.zeros((32, 2), np.float32), "scales")
    cache = numpy_helper.from_array(np.zeros((1000, 4), np.float32), "cache")
    nodes = [
        helper.make_node("Gather", ["cache", "ids"], ["row"]),
        helper.make_node("MatMulNBits", ["x", "packed", "scales"], ["y"], domain="com.microsoft", K=64, N=32),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 64])
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, 32])
    graph = helper.make_graph(nodes, "decoder", [x, ids], [y], [packed, scales, cache])
    out = tmp_path / "folder"
    out.mkdir()
    onnx.save(helper.make_model(graph), out / "model.onnx")
    session = {"log_id": "x", "intra_op_num_threads": 7}
    model = {
        "type": "t",
        "decoder": {"filename": "model.onnx", "session_options": session},
        "vision": {"filename": "v"},
    }
    (out / folders.CONFIG).write_text(json.dumps({"model": model, "search": {}}))
    return out


def test_a_step_reads_what_it_multiplies_with(folder: Path) -> None:
    assert folders.read_by_a_step(folder) == 32 * 2 * 16 + 32 * 2 * 4
    contestant = genai("a", folder)
    assert contestant.nbytes == sum(file.stat().st_size for file in folder.iterdir())
    assert set(contestant.tasks) == {"short", "long"}


def test_threads_are_set_in_every_session_of_a_linked_copy(folder: Path, tmp_path: Path) -> None:
    before = (folder / folders.CONFIG).read_bytes()
    copy = folders.with_threads(folder, tmp_path / "copy", 2)
    config = json.loads((copy / folders.CONFIG).read_bytes())["model"]
    assert config["decoder"]["session_options"] == {"log_id": "x", "intra_op_num_threads": 2}
    assert config["vision"]["session_options"] == {"intra_op_num_threads": 2}
    assert (copy / "model.onnx").samefile(folder / "model.onnx")
    assert (folder / folders.CONFIG).read_bytes() == before


def test_images_have_the_patches_of_the_real_model(tmp_path: Path) -> None:
    from builder.checkpoint.load import open_checkpoint

    checkpoint = open_checkpoint(write_synthetic(tmp_path / "tiny", "tiny"))
    (tmp_path / "vision_processor.json").write_text(vision_processor(checkpoint))
    settings = read_image_settings(tmp_path / "vision_processor.json")
    for name, patches in IMAGES.items():
        width, height = map(int, name.split("×"))
        assert target_size(height, width, settings) == tuple(16 * side for side in patches)
    assert "2b" in SIZES


def outcomes() -> dict[str, Outcome]:
    def outcome(**values: float) -> Outcome:
        return Outcome({name: [value] for name, value in values.items()})

    small = vision("640×480")
    return {
        "this machine": Outcome({"read numpy or": [2e10, 4e10], "read C": [3.5e10, 3.6e10]}),
        named(OURS, 2): outcome(**{DECODE: 30.0, LOAD: 2.0, TEXT_PEAK: 3e9, prefill(128): 1.0, small: 1.5}),
        named(OURS, None): outcome(**{DECODE: 28.0}),
        named(THEIRS, 2): outcome(**{DECODE: 20.0, LOAD: 4.0, TEXT_PEAK: 2e9, prefill(128): 2.0}),
        named(THEIRS, None): outcome(**{DECODE: 14.0}),
        SDPA: outcome(**{small: 6.0}),
    }


def test_ratios_are_how_many_times_as_fast_or_as_large() -> None:
    rows = claims.rows(OURS, outcomes(), 2)
    found = {(row.what, row.note): (row.ours, row.other, row.ratio, row.wanted) for row in rows}
    theirs = named(THEIRS, 2)
    assert found["decode", theirs] == ("30.0 tok/s", "20.0 tok/s", "1.50", "≥ 1.20")
    assert found["decode, out of the box", named(THEIRS, None)] == ("28.0 tok/s", "14.0 tok/s", "2.00", "≥ 1.70")
    assert found["prefill of 128 tokens", theirs] == ("128.0 tok/s", "64.0 tok/s", "2.00", "≥ 1.10")
    assert found["vision encoder, 640×480", SDPA] == ("1.50 s", "6.00 s", "4.00", "≥ 2.00")
    assert found["load", theirs] == ("2.00 s", "4.00 s", "0.50", "≤ 1.00")
    assert found["peak RSS, text", theirs] == ("3,000 MB", "2,000 MB", "1.50", "≤ 1.00")
    # Who was not measured has no ratio.
    assert found["decode", LLAMA] == ("30.0 tok/s", "–", "–", "≥ 0.90")
    assert found["prefill of 1,024 tokens", theirs] == ("–", "–", "–", "≥ 1.30")
    assert len(rows) == len(CLAIMS)


def test_figures_are_shown_with_their_unit() -> None:
    assert shown(answer("640×480"), 1.234) == "1.23 s"
    assert shown(LOAD, None) == "–"


def test_the_limit_is_the_kernel_whose_median_is_highest() -> None:
    name, rate = bandwidth(outcomes().values()) or ("", 0.0)
    assert name == "C"
    assert rate == pytest.approx(3.55e10)
    assert bandwidth([]) is None


def result(**others: float) -> Result:
    found = outcomes()
    for name, cores in others.items():
        found[name] = replace(found.get(name, Outcome()), others=cores)
    everyone = [Contestant(name, nbytes=10**9, step=10**9) for name in found]
    everyone.append(Contestant(LLAMA, absent="not installed: no folder"))
    everyone[-2] = replace(everyone[-2], once=True)
    return Result("2b", 2, 3, (OURS,), tuple(everyone), found)


def test_a_section_has_a_line_per_contestant_and_names_missing_ones() -> None:
    text = section(result())
    assert text.startswith("## 2b\n\nAll on 2 threads; 3 rounds. Memory bandwidth: 35.5 GB/s (C).")
    assert "Disturbed" not in text
    assert f"| {named(OURS, 2)} | 2.00 s | – | 128.0 tok/s | – | 30.0 tok/s | 85% | 3,000 MB | 1,000 MB |" in text
    assert f"| {LLAMA} | – | – | – | – | – | – | – | – |" in text
    assert f"- {LLAMA}: not installed: no folder" in text
    assert f"- {SDPA}: one round" in text
    assert "| this machine |" not in text
    assert f"| measured | {OURS} | other |" in text
    assert "| decode | 30.0 tok/s | 20.0 tok/s | 1.50 | ≥ 1.20 |" in text


def test_a_disturbed_run_is_marked() -> None:
    assert "**Disturbed**: other processes used up to 0.8 cores" in section(result(noise=0.8))


def test_a_document_keeps_sections_of_the_same_machine_only(tmp_path: Path) -> None:
    file = tmp_path / "bench-runtime.md"
    file.write_text(
        document.document({"2b": "## 2b\n\nearlier figures", "4b": "## 4b\n\nkept"}, file), encoding="utf-8"
    )
    text = document.document({"2b": "## 2b\n\nnew"}, file)
    assert "earlier figures" not in text
    assert text.index("## llama.cpp") < text.index("## 2b\n\nnew") < text.index("## 4b\n\nkept")
    file.write_text(text.replace("CPUs", "other CPUs"), encoding="utf-8")
    assert "kept" not in document.document({"2b": "## 2b\n\nnew"}, file)


def event(name: str, at: float, duration: float, operator: str = "") -> dict[str, object]:
    kind = "Node" if operator else "Session"
    return {"cat": kind, "name": name, "ts": at, "dur": duration, "args": {"op_name": operator}}


def test_a_profile_is_split_into_runs_with_the_time_between_operators() -> None:
    events = [
        event("session_initialization", 0, 500),
        event("model_run", 1000, 900),
        event("a_kernel_time", 1100, 300, "MatMulNBits"),
        event("b_kernel_time", 1500, 200, "Add"),
        event("model_run", 3000, 500),
        event("a_kernel_time", 3000, 400, "MatMulNBits"),
    ]
    first, second = profile.runs(events)
    assert first.operators == pytest.approx({"MatMulNBits": 0.3, "Add": 0.2, profile.BETWEEN: 0.4})
    assert second.operators == pytest.approx({"MatMulNBits": 0.4, profile.BETWEEN: 0.1})
    both = profile.mean([first, second], 0.8)
    assert both.operators[profile.OUTSIDE] == pytest.approx(0.1)
    lines = profile.table({"a step": both, "prefill": second}).splitlines()
    assert lines[0] == "| ms | a step |  | prefill |  |"
    assert lines[2] == "| MatMulNBits | 0.35 | 44% | 0.40 | 80% |"
    assert lines[-1] == "| **all** | 0.80 |  | 0.50 |  |"


@pytest.mark.seconds
def test_unknown_sizes_and_names_are_refused() -> None:
    run = partial(figures.process)
    for arguments in (["--size", "3b"], ["--skip", "nobody"]):
        found = run([sys.executable, "-m", "bench.runtime", *arguments])
        assert (found.failure or "").startswith("exit 2: ")
