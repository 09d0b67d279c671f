"""examples/node runs an `onnxruntime` bundle from JavaScript: token ids in, tokens out, without Python."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from builder.checkpoint.chat_template import split_template, token_text
from builder.checkpoint.load import Checkpoint
from builder.reference.cases import Case, held_out, shipped_cases
from tests.helpers.runtimes import NODE_EXAMPLE, require_node

if TYPE_CHECKING:
    from builder.reference.model import Reference

TOKENS = 16
# All questions in one process: starting it takes longer than an answer.
RUN_ALL = """
import { readFileSync } from "node:fs";
import { Bundle, decodePng } from "./qwen3vl.mjs";

const { folder, questions, tokens } = JSON.parse(readFileSync(0, "utf8"));
const bundle = await Bundle.load(folder);
for (const { ids, files } of questions) {
  const images = files.map((file) => decodePng(readFileSync(file)));
  const answer = [];
  for await (const token of bundle.generate(ids, images, tokens)) answer.push(token);
  console.log(JSON.stringify(answer));
}
"""


def prompt_ids(checkpoint: Checkpoint, case: Case) -> list[int]:
    """Tokenize a prompt with one image token per image, as the example expects."""
    from tokenizers import Tokenizer

    template = split_template(checkpoint)
    turn = template["prefix"] + template["image"] * len(case.images) + case.prompt + template["suffix"]
    tokenizer = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json"))
    ids: list[int] = tokenizer.encode(turn, add_special_tokens=False).ids
    assert template["image"].count(token_text(checkpoint, checkpoint.image_token_id)) == 1
    return ids


def run_example(node: str, folder: Path, questions: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Return the tokens of each answer."""
    document = json.dumps({"folder": str(folder), "questions": questions, "tokens": TOKENS})
    command = [node, "--input-type=module", "--eval", RUN_ALL]
    result = subprocess.run(command, input=document, capture_output=True, text=True, check=False, cwd=NODE_EXAMPLE)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def has_only_png(case: Case) -> bool:
    return all(path.suffix == ".png" for path in case.images)


@pytest.mark.torch
def test_tokens_equal_pytorch(miniature_built: Path, reference: Reference) -> None:
    """Held-out questions about one image, no image, several images, and images that need resizing."""
    node = require_node()
    names = {"text", "one image", "wide, tall"}
    cases = [
        *held_out(reference.checkpoint),
        *(case for case in shipped_cases() if case.name in names and has_only_png(case)),
    ]
    assert sum(len(case.images) == 1 for case in cases) >= 29
    assert any(not case.images for case in cases)
    assert any(len(case.images) > 1 for case in cases)
    questions = [
        {"ids": prompt_ids(reference.checkpoint, case), "files": [str(path.resolve()) for path in case.images]}
        for case in cases
    ]
    answers = run_example(node, miniature_built / "onnxruntime", questions)
    inputs = [reference.prepare(case.prompt, case.images) for case in cases]
    expected = [list(reference.generate(prepared, TOKENS).tokens) for prepared in inputs]
    assert answers == expected


@pytest.mark.torch
def test_it_has_a_command_line(miniature_built: Path, reference: Reference) -> None:
    node = require_node()
    case = held_out(reference.checkpoint)[0]
    ids = ",".join(map(str, prompt_ids(reference.checkpoint, case)))
    command = [node, str(NODE_EXAMPLE / "qwen3vl.mjs"), str(miniature_built / "onnxruntime"), "--ids", ids]
    result = subprocess.run(
        [*command, "--image", str(case.images[0])], capture_output=True, text=True, check=False, cwd=NODE_EXAMPLE
    )
    assert result.returncode == 0, result.stderr
    tokens = reference.generate(reference.prepare(case.prompt, case.images), TOKENS).tokens
    assert tuple(map(int, result.stdout.split())) == tokens
    rejected = subprocess.run(command[:3], capture_output=True, text=True, check=False)
    assert (rejected.returncode, rejected.stderr.partition(":")[0]) == (2, "usage")


def test_the_lock_file_names_no_registry() -> None:
    lock = json.loads((NODE_EXAMPLE / "package-lock.json").read_text(encoding="utf-8"))
    pinned = json.loads((NODE_EXAMPLE / "package.json").read_text(encoding="utf-8"))["dependencies"]
    packages = lock["packages"]
    assert not any("resolved" in facts for facts in packages.values())
    assert {name: packages[f"node_modules/{name}"]["version"] for name in pinned} == pinned
