"""The model card: the hub reads its metadata, its program runs, it has no measurements."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from builder.bundle.model_card import limits, metadata, model_card, notes
from builder.checkpoint.license import License, read_license
from builder.targets.registry import PACKAGING
from tests.helpers.checkpoints import MINIATURE
from tests.helpers.manifests import COMMIT, manifest

APACHE = License("apache-2.0", files=("LICENSE",))
IMAGE = MINIATURE.parent / "heldout" / "pic002.png"


def card_metadata(license: License = APACHE, **changes: Any) -> dict[str, Any]:
    """The metadata, as the hub reads it."""
    found: dict[str, Any] = yaml.safe_load(metadata(manifest(**changes), license))
    return found


def test_the_hub_reads_its_metadata() -> None:
    from huggingface_hub import ModelCard

    card = ModelCard(model_card(manifest(), APACHE))
    assert yaml.safe_load(card.data.to_yaml()) == {
        "license": "apache-2.0",
        "base_model": "Org/Tiny-VL",
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "image-text-to-text",
        "tags": ["deepstack", "fp32", "onnx", "onnxruntime", "onnxruntime-genai", "qwen3_vl"],
        "quantization": "fp32",
    }
    assert card.text.lstrip().startswith("# Tiny-VL for genai, fp32")
    assert COMMIT in card.text


def test_a_local_checkpoint_names_its_base_model() -> None:
    local = {"repository": None, "revision": None}
    assert "base_model" not in card_metadata(checkpoint=local)
    assert card_metadata(License(base=("Qwen/A",)), checkpoint=local)["base_model"] == "Qwen/A"
    assert card_metadata(License(base=("Qwen/A", "Qwen/B")), checkpoint=local)["base_model"] == ["Qwen/A", "Qwen/B"]
    assert card_metadata(License(base=("Qwen/A",)))["base_model"] == "Org/Tiny-VL"


def test_other_weights_are_a_quantized_model() -> None:
    assert "base_model_relation" not in card_metadata()
    found = card_metadata(recipe={"precision": "int4"})
    assert (found["base_model_relation"], found["quantization"]) == ("quantized", "int4")
    assert "int4" in found["tags"]


def test_a_license_is_stated_and_never_guessed() -> None:
    other = License("other", "tongyi", "https://example.org/license", files=("LICENSE", "NOTICE"))
    found = card_metadata(other)
    assert (found["license"], found["license_name"], found["license_link"]) == (
        "other",
        "tongyi",
        "https://example.org/license",
    )
    assert "`tongyi`. Unchanged files of the checkpoint: `LICENSE`, `NOTICE`" in model_card(manifest(), other)
    assert "license" not in card_metadata(License())
    assert "does not state a license" in model_card(manifest(), License())


@pytest.mark.parametrize("target", [*PACKAGING, "a runtime nobody has written about"])
def test_every_target_has_a_card_with_its_limits(target: str) -> None:
    text = model_card(manifest(target=target), APACHE)
    for limit in limits(manifest(target=target)):
        assert limit in text
    assert "4096 tokens" in text
    assert "evidence/report.md" in text
    assert all(len(limit.splitlines()) == 1 for limit in limits(manifest(target=target)))
    assert f"library_name: {notes(target).library}" in text


def test_cache_ports_are_counted() -> None:
    text = model_card(manifest(), APACHE)
    assert "| `model.onnx` | `inputs_embeds` [batch, seq, 8]<br>`past_key_values.0.key` and 2 similar |" in text


def test_the_same_manifest_gives_the_same_card_without_measurements() -> None:
    text = model_card(manifest(), APACHE)
    assert text == model_card(manifest(), APACHE)
    assert not re.search(r"\d(e-0\d| s\b| MB| GB)|20\d\d-\d\d", text)
    assert text.endswith("\n")


@pytest.mark.parametrize(
    "name", ["<script>x</script>", "a\n---\nb: c", "[x](http://y)", "`code`", "\x1b[2J", "x" * 9999]
)
def test_a_name_is_not_markup(name: str) -> None:
    changes = {"name": name, "repository": None, "revision": None}
    text = model_card(manifest(checkpoint=changes), License("other", name))
    head, body = text.split("\n---\n", 1)
    assert yaml.safe_load(head.removeprefix("---\n"))["license"] == "other"
    shown = re.sub("`[^`\n]*`", "", body)
    for markup in ("<script>", "](http://y)", "\x1b"):
        assert markup not in shown
    assert len(text) < 20_000


# --- what a checkpoint says ---


def card(folder: Path, text: str | bytes, *others: str, name: str = "README.md") -> License:
    folder.mkdir()
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    for other in others:
        (folder / other).write_text("x")
    return read_license(folder)


def test_a_card_names_the_license(tmp_path: Path) -> None:
    found = card(tmp_path / "a", "---\nlicense: apache-2.0\nbase_model: Qwen/X\n---\n# X\n", "NOTICE", "LICENSE")
    assert found == License("apache-2.0", base=("Qwen/X",), files=("LICENSE", "NOTICE"))
    assert found.spdx == "Apache-2.0"
    other = card(tmp_path / "b", "---\nlicense: other\nlicense_name: n\nlicense_link: LICENSE\n---\n", name="readme.md")
    assert (other.id, other.name, other.link, other.spdx) == ("other", "n", "LICENSE", None)
    assert read_license(tmp_path / "nowhere") == License()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "# no metadata",
        "---\nlicense:\n---\n",
        "---\nlicense: [a, b]\nbase_model: {a: b}\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: &a [*a]\n---\n",
        "---\nlicense: !!python/object:os.system x\n---\n",
        "---\n" + "{" * 5000 + "\n---\n",
        '---\nlicense: "a\\u001b[2J"\n---\n',
        b"\xff\xfe\x00",
        "---\nlicense: mit\n---\n" + "x" * 2_000_000,
    ],
)
def test_a_card_without_metadata_is_not_an_error(tmp_path: Path, text: str | bytes) -> None:
    assert card(tmp_path / "a", text) == License()


def test_the_miniature_names_its_license(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE"):
        shutil.copyfile(MINIATURE / name, tmp_path / name)
    assert read_license(tmp_path) == APACHE


# --- what a card says to do ---


@pytest.mark.torch  # its bundle is what the stages before it make
def test_the_program_of_the_card_answers(bundle: Callable[[str], Path]) -> None:
    folder = bundle("genai")
    shutil.copyfile(IMAGE, folder / "image.png")
    (program,) = re.findall(r"```python\n(.*?)```", model_card(manifest(), APACHE), re.DOTALL)
    changed = program.replace("What is this?", "Read the number.")
    done = subprocess.run([sys.executable, "-c", changed], cwd=folder, capture_output=True, text=True, check=False)
    answers = (json.loads(line) for line in (IMAGE.parent / "cases.jsonl").read_text().splitlines())
    (expected,) = (each["answer"] for each in answers if each["images"] == [IMAGE.name])
    assert done.stdout.strip() == expected, done.stderr


@pytest.mark.torch
def test_the_command_of_the_card_answers(bundle: Callable[[str], Path]) -> None:
    folder = bundle("onnxruntime")
    shutil.copyfile(IMAGE, folder / "image.png")
    (command,) = notes("onnxruntime").run
    changed = command.replace("What is this?", "Read the number.").replace("python", sys.executable, 1)
    done = subprocess.run(changed, shell=True, cwd=folder, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "28", done.stderr
