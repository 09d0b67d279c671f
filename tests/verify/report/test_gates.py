"""Test gates, reports and the comparison of tokens: what passes, what fails, and what a failure reports."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from builder.reference.model import Answer
from builder.targets.clients.pipeline import Inputs
from builder.verify.report.gates import PLACES, Gate, Report, compare_close, compare_exact, relative_error
from builder.verify.tokens import TIE, TIES_EVERY, NearTies, compare_tokens, extended
from tests.helpers.shown import shown
from tests.helpers.small_graphs import Array, drawn

GOOD = Gate("embeddings", "text", 1e-6, 1e-4)
WANT = drawn(3, 40)
PEAK = WANT.max()


def report(*gates: Gate) -> Report:
    return Report("genai", "miniature", gates, {"versions": {"onnxruntime": "1.32.0"}, "answers": [1, 2.5, None]})


def test_relative_error_is_in_standard_deviations_of_the_expected_values() -> None:
    want = np.array([0, 10, 0, 10], np.float32)  # standard deviation 5
    assert relative_error(want, want) == 0
    assert relative_error(want + np.array([0, 0, 1, 0], np.float32), want) == pytest.approx(0.2)
    assert relative_error(want * 0, want) == 2
    assert relative_error(100 * want, 100 * want + 1) == pytest.approx(0.002)


def test_relative_error_does_not_depend_on_the_units() -> None:
    got = WANT + np.float32(1e-3)
    assert relative_error(1000 * got, 1000 * WANT) == pytest.approx(relative_error(got, WANT), rel=1e-3)


def test_without_a_spread_the_error_is_absolute() -> None:
    assert relative_error(np.full(4, 7.5), np.full(4, 7.0)) == 0.5


def test_half_precision_does_not_overflow_in_the_comparison() -> None:
    got, want = np.array([60000, -60000], np.float16), np.array([-60000, 60000], np.float16)
    assert relative_error(got, want) == 2


@pytest.mark.parametrize(
    ("got", "want"),
    [
        pytest.param(WANT[:2], WANT, id="a row missing"),
        pytest.param(WANT[None], WANT, id="an axis more"),
        pytest.param(WANT[:1], WANT, id="what would broadcast"),
        pytest.param(np.zeros((0, 40)), WANT, id="nothing"),
        pytest.param(WANT, np.zeros((0, 40)), id="nothing wanted"),
        pytest.param(np.full_like(WANT, np.nan), WANT, id="all NaN"),
        pytest.param(np.where(WANT < PEAK, WANT, np.nan), WANT, id="one NaN"),
        pytest.param(np.where(WANT < PEAK, WANT, np.inf), WANT, id="one infinity"),
        pytest.param(WANT, np.where(WANT < PEAK, WANT, np.nan), id="NaN wanted"),
    ],
)
def test_incomparable_arrays_fail(got: Array, want: Array) -> None:
    gate = compare_close("embeddings", "text", got, want, 1e-4)
    assert not gate.ok
    assert not math.isfinite(gate.measured)
    if got.shape != want.shape:
        assert gate.detail == f"shape {got.shape}, expected {want.shape}"


def test_nothing_equals_nothing() -> None:
    empty = np.zeros((0, 8), np.float32)
    assert compare_close("image features", "text", empty, empty, 1e-4).ok
    assert compare_exact("token ids", "text", empty, empty).ok


def test_compare_close_reports_where_and_by_how_much() -> None:
    got = WANT.copy()
    got[1, 7] += 0.5
    gate = compare_close("decoder prefill", "text", got, WANT, 1e-4)
    assert not gate.ok
    assert gate.measured == pytest.approx(0.5 / WANT.std(), rel=1e-4)
    assert "at [1, 7]" in gate.detail
    assert f"PyTorch {WANT[1, 7]:.6g}" in gate.detail
    assert compare_close("decoder prefill", "text", got, WANT, 1.0) == Gate(
        "decoder prefill", "text", gate.measured, 1.0
    )


def test_the_limit_itself_passes() -> None:
    assert Gate("tokens", "text", 1e-4, 1e-4).ok
    assert not Gate("tokens", "text", np.nextafter(1e-4, 1), 1e-4).ok


@pytest.mark.parametrize("measured", [math.nan, math.inf, -math.inf])
def test_a_figure_that_is_not_finite_fails_at_any_limit(measured: float) -> None:
    assert not Gate("tokens", "text", measured, math.inf).ok


def test_compare_exact_counts_and_names_the_first_difference() -> None:
    want = np.arange(12).reshape(3, 4)
    assert compare_exact("token ids", "text", want, want) == Gate("token ids", "text", 0.0, 0.0)
    got = want.copy()
    got[1, 2] = got[2, 3] = -1
    gate = compare_exact("token ids", "text", got, want)
    assert (gate.measured, gate.ok, gate.detail) == (2, False, "first at [1, 2]: -1, expected 6")


def test_compare_exact_fails_on_the_last_bit_and_on_nan() -> None:
    want = np.array([1, 2, 3], np.float32)
    assert not compare_exact("pixel values", "text", np.nextafter(want, np.float32(9)), want).ok
    unknown = np.array([1, 2, np.nan], np.float32)
    assert not compare_exact("pixel values", "text", unknown, unknown).ok


@pytest.mark.parametrize(
    ("got", "want", "count"), [([], [1, 2], 2), ([1, 2, 3], [1, 2], 3), ([[1], [2]], [1, 2], 2), (7, [7], 1)]
)
def test_compare_exact_fails_on_another_shape(got: Sequence[int], want: Sequence[int], count: int) -> None:
    gate = compare_exact("token ids", "text", got, want)
    assert (gate.ok, gate.measured) == (False, count)
    assert gate.detail.startswith("shape ")


def test_the_first_failure_is_the_earliest_place_whatever_the_order() -> None:
    gates = [Gate(place, "text", 1.0, 0.0) for place in PLACES]
    shuffled = [gates[i] for i in np.random.default_rng(3).permutation(len(gates))]
    assert report(GOOD, *shuffled).first_failure == gates[0]
    late = [Gate("tokens", "a", 1, 0), Gate("image features", "b", math.nan, 1), Gate("image features", "c", 2, 1)]
    found = report(GOOD, *late).first_failure
    assert found is not None
    assert (found.place, found.case) == ("image features", "b")


def test_a_report_passes_when_every_gate_does() -> None:
    assert report(GOOD, GOOD).ok
    assert report(GOOD, GOOD).first_failure is None
    assert not report(GOOD, Gate("tokens", "text", 1, 0), GOOD).ok


def test_a_report_without_gates_fails() -> None:
    empty = report()
    assert not empty.ok
    assert empty.first_failure is None
    assert empty.as_dict()["verdict"] == "failed"


def test_the_table_has_one_row_per_place_in_the_order_of_the_computation() -> None:
    gates = [
        Gate("tokens", "text, 64 tokens", 0, 0),
        Gate("embeddings", "one image", 3e-7, 1e-4),
        Gate("embeddings", "two images", 2e-3, 1e-4, "2.0e-03 of a standard deviation at [0, 1]"),
        Gate("image features", "wide, tall", math.inf, 1e-4, "shape (3, 4), expected (4, 4)"),
    ]
    text = shown(report(*gates))
    lines = text.splitlines()
    assert lines[0].split() == ["genai", "against", "PyTorch", "·", "miniature"]
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines if re.search(r"\d/\d", line)]
    assert rows == [
        ["image features", "FAIL", "0/1", "inf", "1.0e-04", "wide, tall"],
        ["embeddings", "FAIL", "1/2", "2.0e-03", "1.0e-04", "two images"],
        ["tokens", "pass", "1/1", "0", "0", "text, 64 tokens"],
    ]
    assert lines[-2:] == [
        "image features: wide, tall: shape (3, 4), expected (4, 4)",
        "embeddings: two images: 2.0e-03 of a standard deviation at [0, 1]",
    ]


def test_the_table_shows_names_as_they_are() -> None:
    """Brackets and colons are not markup."""
    text = shown(Report("genai", "mine[bold]", (Gate("tokens", "case [red] :x:", 1, 0, "[0] differs"),), {}))
    assert "mine[bold]" in text
    assert text.count("case [red] :x:") == 2
    assert "tokens: case [red] :x:: [0] differs" in text


def test_a_report_is_json_and_comes_back_the_same() -> None:
    document = report(
        GOOD, Gate("tokens", "text", math.nan, 0.0, "threw"), Gate("tokens", "more", math.inf, 0.0)
    ).as_dict()
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert (document["verdict"], document["first difference"]) == ("failed", "tokens: text")
    assert [gate["measured"] for gate in document["gates"]] == [1e-6, "nan", "inf"]
    assert [gate["ok"] for gate in document["gates"]] == [True, False, False]
    assert report(GOOD).as_dict()["first difference"] is None


ANSWER = Answer(tokens=(5, 6, 7, 8, 9, 10), margins=(3.0, 2.0, 0.004, 2.5, 0.001, 4.0))


def answering(*runs: Sequence[int]) -> tuple[Callable[[int], list[int]], list[int]]:
    """Return a runtime that gives each of `runs` in turn, and a list of how many tokens it was given each time."""
    left, given = list(runs), []

    def run(count: int) -> list[int]:
        given.append(count)
        return list(left.pop(0))

    return run, given


def test_equal_tokens_pass_in_one_run() -> None:
    run, given = answering(ANSWER.tokens)
    assert compare_tokens("text", run, ANSWER, 1e-3) == (Gate("tokens", "text", 0.0, 0.0), [])
    assert given == [0]


def test_a_difference_against_a_large_lead_fails_at_once() -> None:
    run, given = answering((5, 99, 7, 8, 9, 10))
    gate, ties = compare_tokens("text", run, ANSWER, 1e-3)
    assert (gate.ok, gate.measured, ties, given) == (False, 5.0, [], [0])
    assert gate.detail == "text: token 1 is 99, PyTorch 6 with a lead of 2.00e+00"


def test_near_ties_are_listed_and_the_comparison_goes_on_from_the_references_tokens() -> None:
    """Leads of 0.004 and 0.001 at an error of 0.0011: both are below 4 times the error."""
    run, given = answering((5, 6, 99, 1, 2, 3), (8, 98, 1), (10,))
    gate, ties = compare_tokens("text", run, ANSWER, 0.0011)
    assert (gate.ok, given) == (True, [0, 3, 5])
    assert [tie.split(" with")[0] for tie in ties] == [
        "text: token 2 is 99, PyTorch 7",
        "text: token 4 is 98, PyTorch 9",
    ]


def test_a_difference_after_a_near_tie_fails() -> None:
    run, given = answering((5, 6, 99, 1, 2, 3), (97, 9, 10))
    gate, ties = compare_tokens("text", run, ANSWER, 0.0011)
    assert (gate.ok, gate.measured, len(ties), given) == (False, 3.0, 1, [0, 3])
    assert "token 3 is 97, PyTorch 8" in gate.detail


def test_the_last_token_can_be_a_near_tie() -> None:
    run, given = answering((5, 99))
    gate, ties = compare_tokens("text", run, Answer((5, 6), (1.0, 1e-6)), 1e-3)
    assert (gate.ok, len(ties), given) == (True, 1, [0])


@pytest.mark.parametrize(
    ("lead", "error"), [(0.004, 0.001), (0.0041, 0.001), (1e-9, 0.0), (1e-9, math.nan), (math.nan, 0.001)]
)
def test_the_lead_must_be_below_the_measured_error_times_four(lead: float, error: float) -> None:
    assert TIE == 4
    run, _ = answering((99,))
    gate, ties = compare_tokens("text", run, Answer((5,), (lead,)), error)
    assert (gate.ok, ties) == (False, [])


@pytest.mark.parametrize(("got", "count"), [((5, 6, 7), 3), ((), 6), ((*ANSWER.tokens, 11, 12), 2)])
def test_another_number_of_tokens_fails(got: Sequence[int], count: int) -> None:
    gate, ties = compare_tokens("text", answering(got)[0], ANSWER, 1e-3)
    assert (gate.ok, gate.measured, ties) == (False, count, [])
    assert gate.detail == f"{len(got)} tokens, expected 6"


def test_tokens_missing_after_a_near_tie_fail() -> None:
    gate, ties = compare_tokens("text", answering((5, 6, 99), (8, 9))[0], ANSWER, 0.0011)
    assert (gate.ok, gate.measured, len(ties)) == (False, 1.0, 1)
    assert gate.detail == "5 tokens, expected 6"


@pytest.mark.parametrize(
    ("compared", "found", "ok"),
    [(64, 0, True), (64, 1, True), (64, 2, False), (TIES_EVERY, 1, True), (TIES_EVERY, 2, False), (1001, 2, True)],
)
def test_one_token_in_a_thousand_may_be_a_near_tie(compared: int, found: int, ok: bool) -> None:
    gate = NearTies(compared, ("a tie",) * found).gate(allowed=True)
    assert (gate.place, gate.case, gate.measured, gate.ok) == ("tokens", "near ties", found, ok)


def test_where_none_are_allowed_the_first_near_tie_fails_and_is_reported() -> None:
    assert NearTies(5000, ()).gate(allowed=False).ok
    gate = NearTies(5000, ("text: token 2", "text: token 9")).gate(allowed=False)
    assert (gate.ok, gate.limit, gate.detail) == (False, 0.0, "text: token 2; text: token 9")


def test_the_rest_is_generated_after_the_references_tokens_at_their_positions() -> None:
    ids, places = np.array([[11, 12, 13]]), np.broadcast_to(np.array([0, 1, 1]), (3, 1, 3))
    inputs = extended(Inputs(ids, None, None, places, rope_delta=-1), (5, 6))
    np.testing.assert_array_equal(inputs.input_ids, [[11, 12, 13, 5, 6]])
    np.testing.assert_array_equal(inputs.position_ids, np.broadcast_to(np.array([0, 1, 1, 2, 3]), (3, 1, 5)))
