"""`check` of bundles in which a few bytes are others: refused, or harmless; never a traceback."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest

from builder.bundle.check import check
from tests.helpers.bundles import DATA, relisted, small_bundle
from tests.helpers.hostile import mutated, outcome

DRAWN = 3000


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return small_bundle(tmp_path / "genai")


FILES = ("manifest.json", "model.onnx", "genai_config.json", "tokenizer.json", DATA)


def drawn(bundle: Path, seed: int) -> str:
    """A file with a few other bytes; with every second seed in a manifest that lists them."""
    file = FILES[seed % len(FILES)]
    kept = {name: (bundle / name).read_bytes() for name in (file, "manifest.json")}
    content = mutated(kept[file], random.Random(seed))
    if content == kept[file]:
        return "nothing changed"
    (bundle / file).write_bytes(content)
    if file != "manifest.json" and seed % 2:
        relisted(bundle, graphs=False)
    try:
        return f"{file}, {'listed' if seed % 2 else 'as it was'}: {outcome(lambda: check(bundle))}"
    except BaseException as error:
        error.add_note(f"bytes of {file}, seed {seed}")
        raise
    finally:
        for name, content in kept.items():
            (bundle / name).write_bytes(content)


@pytest.mark.seconds
def test_a_few_drawn_bytes(bundle: Path) -> None:
    counts = Counter(drawn(bundle, seed) for seed in range(150))
    assert not [what for what in counts if what.endswith("as it was: accepted") and "manifest.json" not in what]


@pytest.mark.slow
def test_many_drawn_bytes(bundle: Path) -> None:
    counts = Counter(drawn(bundle, seed) for seed in range(1000, 1000 + DRAWN))
    assert not [what for what in counts if what.endswith("as it was: accepted") and "manifest.json" not in what]
