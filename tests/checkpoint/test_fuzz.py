"""Hostile checkpoints: each is accepted, or refused with a `BuildError`, in bounded time and memory.

A sample of the named checkpoints always runs; all of them, and thousands of random mutations, run with `-m slow`.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from builder.checkpoint.chat_template import split_template
from builder.checkpoint.load import open_checkpoint
from builder.cli.app import app
from builder.stages.engine.dry_run import described
from builder.stages.engine.estimate import graph_bytes
from builder.targets.config_files import pipeline_settings, vision_processor
from builder.targets.genai import genai_config
from builder.targets.recipe_file import load_recipe
from builder.util.errors import BuildError, PromptError
from builder.verify.memory_budget import verify_memory
from tests.helpers import hostile
from tests.helpers.checkpoints import write_checkpoint
from tests.helpers.edits import Change, both, remove, write
from tests.helpers.hostile import CHECKPOINTS, mutated, outcome, record_counts, snapshot

MUTATIONS = 3000  # of a slow run
MOST_MEMORY = 500 * 2**20
NAMED = [(kind, name) for kind, table in CHECKPOINTS.items() for name in table]
SAMPLE = random.Random(20).sample(NAMED, 60)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A minimal checkpoint of two shards."""
    folder = tmp_path_factory.mktemp("good") / "checkpoint"
    text = {"num_hidden_layers": 1, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 1}
    vision = {"depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "num_position_embeddings": 4}
    return write_checkpoint(
        folder, text=text | {"num_key_value_heads": 1, "head_dim": 16}, vision=vision, deepstack=(0,), shards=2
    )


@pytest.fixture
def memory() -> Iterator[None]:
    """Check how far the test raises the peak memory."""
    before = _peak()
    yield
    assert _peak() - before < MOST_MEMORY


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def read_all(folder: Path) -> None:
    """Read everything that a build reads of a checkpoint before tracing, and write everything it writes of that."""
    checkpoint = open_checkpoint(folder)
    graph_bytes(described(checkpoint), ("genai", "onnxruntime"))
    verify_memory(checkpoint)
    genai_config(checkpoint, load_recipe(), True)
    text = vision_processor(checkpoint) + pipeline_settings(checkpoint, 4096) + checkpoint.config_digest
    text.encode()


def changed_copy(good: Path, folder: Path, change: Change) -> Path:
    """Copy the checkpoint and change the copy."""
    shutil.copytree(good, folder)
    change(folder)
    return folder


@pytest.fixture
def directly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Render templates in this process, for tests that do not change them."""

    def call(function: Callable[..., Any], *arguments: Any, **_bounds: int) -> Any:
        return function(*arguments)

    monkeypatch.setattr("builder.checkpoint.chat_template.run_limited", call)


def refusals(good: Path, folder: Path, cases: list[tuple[str, str]]) -> Counter[str]:
    """Count the outcomes of each kind of hostile checkpoint."""
    counts: Counter[str] = Counter()
    for number, (kind, name) in enumerate(cases):
        copy = changed_copy(good, folder / str(number), CHECKPOINTS[kind][name])
        try:
            counts[f"{kind}: {outcome(lambda folder=copy: read_all(folder))}"] += 1  # type: ignore[misc]
        except BaseException as error:
            error.add_note(f"the hostile checkpoint: {kind}, {name}")
            raise
        shutil.rmtree(copy)
    return counts


def test_a_good_checkpoint_is_accepted(good: Path) -> None:
    assert outcome(lambda: read_all(good)) == "accepted"


@pytest.mark.usefixtures("memory", "directly")
@pytest.mark.seconds
def test_a_sample_is_refused(good: Path, tmp_path: Path) -> None:
    counts = refusals(good, tmp_path, SAMPLE)
    assert sum(count for what, count in counts.items() if not what.endswith("accepted")) > len(SAMPLE) * 0.7


@pytest.mark.slow
@pytest.mark.usefixtures("memory", "directly")
def test_all_named_checkpoints_are_refused(
    good: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_counts(refusals(good, tmp_path, NAMED), record_property)


@pytest.mark.parametrize("name", ["empty file", "length 2^63", "shape of huge numbers", "a pipe", "long name"])
def test_the_command_line_refuses_and_writes_nothing(good: Path, tmp_path: Path, name: str) -> None:
    copy = changed_copy(good, tmp_path / "checkpoint", hostile.HEADERS[name])
    before = snapshot(tmp_path)
    for command in (["build", "--dry-run"], ["explain"], ["build"]):
        result = CliRunner().invoke(app, [*command, str(copy), "--output", str(tmp_path / "output")])
        assert 10 <= result.exit_code < 20, result.output
        assert "Traceback" not in result.output
    assert snapshot(tmp_path) == before


TEMPLATE = "chat_template.jinja"
BOMB = "{% set n = namespace(x='xxxxxxxx') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
LOOP = "{% for a in range(99999) %}" * 3 + "{% endfor %}" * 3
TEMPLATES: Mapping[str, bytes] = {
    "no end": LOOP.encode(),
    "doubled for ever": BOMB.encode(),
    "a text of 10^12": b"{{ 'x' * 10**12 }}",
    "a padded text of 10^12": b"{{ 'x'.ljust(10**12) }}",
    "a power of a power": b"{{ 10**10**10 }}",
    "itself for ever": b"{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "includes a file": b"{% include '/etc/passwd' %}",
    "leaves the sandbox": b"{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "changes its input": b"{{ messages.append(1) }}",
    "no UTF-8": b"\xff\xfe{{ messages }}",
    "too large": b"x" * (2**20 + 1),
    "deep brackets": b"{{ " + b"(" * 5000 + b"1" + b")" * 5000 + b" }}",
    "deep blocks": b"{% if 1 %}" * 500 + b"{% endif %}" * 500,
    "unknown tag": b"{% exec 'x' %}",
    "empty": b"",
    "raises": b"{{ raise_exception('no') }}",
    "today": b"{{ strftime_now('%d') }}",
}
CHAT_TEMPLATES: Mapping[str, Change] = {f"{name}": write(TEMPLATE, text) for name, text in TEMPLATES.items()} | {
    "a folder": both(remove(TEMPLATE), lambda f: (f / TEMPLATE).mkdir()),
    "a pipe": both(remove(TEMPLATE), lambda f: os.mkfifo(f / TEMPLATE)),
}
FAST = ("no end", "doubled for ever", "deep brackets", "no UTF-8", "a folder")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in FAST[2:] else pytest.mark.slow) for name in CHAT_TEMPLATES]
)
def test_a_hostile_template_is_refused(good: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.checkpoint.chat_template.SECONDS", 5)
    checkpoint = open_checkpoint(changed_copy(good, tmp_path / "checkpoint", CHAT_TEMPLATES[name]))
    with pytest.raises(BuildError):
        split_template(checkpoint)


@pytest.mark.seconds
def test_a_template_that_never_ends_is_stopped(good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.checkpoint.chat_template.SECONDS", 5)
    change = write(TEMPLATE, TEMPLATES["no end"])
    checkpoint = open_checkpoint(changed_copy(good, tmp_path / "checkpoint", change))
    with pytest.raises(PromptError, match="cannot be rendered") as caught:
        split_template(checkpoint)
    assert "come to an end" in str(caught.value.found)


FILES = ("config.json", hostile.SHARD, hostile.INDEX, hostile.SETTINGS, "generation_config.json", hostile.WORDS)


def outcome_of_mutation(good: Path, folder: Path, seed: int) -> str:
    """Open the checkpoint with a few random bytes of one file changed."""
    rng = random.Random(seed)
    file = FILES[seed % len(FILES)]
    content = (good / file).read_bytes()
    # Of a weight file only the header, as the values of weights are not checked.
    length = 8 + int.from_bytes(content[:8], "little") if file == hostile.SHARD else len(content)
    (folder / file).write_bytes(mutated(content[:length], rng) + content[length:])
    try:
        return f"bytes of {file}: {outcome(lambda: read_all(folder))}"
    except BaseException as error:
        error.add_note(f"bytes of {file}, seed {seed}")
        raise
    finally:
        (folder / file).write_bytes(content)


@pytest.mark.usefixtures("memory", "directly")
@pytest.mark.seconds
def test_a_few_mutations(good: Path, tmp_path: Path) -> None:
    folder = changed_copy(good, tmp_path / "checkpoint", lambda folder: None)
    counts = Counter(outcome_of_mutation(good, folder, seed) for seed in range(120))
    assert sum(count for what, count in counts.items() if not what.endswith("accepted")) > 40


@pytest.mark.slow
@pytest.mark.usefixtures("memory", "directly")
def test_many_mutations(good: Path, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    folder = changed_copy(good, tmp_path / "checkpoint", lambda folder: None)
    record_counts(
        Counter(outcome_of_mutation(good, folder, seed) for seed in range(1000, 1000 + MUTATIONS)), record_property
    )


# Any JSON value.
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.sampled_from([hostile.HUGE]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
PLACES = [
    *(
        ("text_config", key)
        for key in ("rope_parameters", "head_dim", "rms_norm_eps", "eos_token_id", "attention_bias")
    ),
    *(("vision_config", key) for key in ("deepstack_visual_indexes", "patch_size", "num_heads", "rope_parameters")),
    *((None, key) for key in ("text_config", "vision_config", "dtype", "architectures", "image_token_id")),
]


@pytest.mark.usefixtures("directly")
@pytest.mark.seconds
def test_any_value_in_a_config(good: Path, tmp_path: Path) -> None:
    folder = changed_copy(good, tmp_path / "checkpoint", lambda folder: None)
    plain = (good / "config.json").read_text()

    @settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.sampled_from(PLACES), VALUES)
    def check(place: tuple[str | None, str], value: Any) -> None:
        content = json.loads(plain)
        section, key = place
        (content[section] if section else content)[key] = value
        (folder / "config.json").write_text(json.dumps(content))
        outcome(lambda: read_all(folder))

    check()
