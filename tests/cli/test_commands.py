"""The command line from outside: what it prints where, and with which code it exits."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from builder.checkpoint.load import Checkpoint
from builder.cli.app import app
from builder.util.errors import BundleError, VerificationError
from builder.verify.report.gates import Gate, Report
from tests.helpers.hub_server import HubServer, Repository

ROOT = Path(__file__).parents[2]
MINIATURE = ROOT / "builder" / "miniature" / "checkpoint"
NAMES = ["fetch", "patch", "export", "optimize", "quantize", "configure", "verify", "bundle"]
HEAVY = ("torch", "transformers", "onnx", "onnxruntime", "onnxruntime_genai", "onnxscript", "onnx_ir")


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def spawned(*arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False)


def failure(result: Result, code: int) -> dict[str, Any]:
    """The JSON of an error, which must also be on stderr, without a traceback."""
    assert result.exit_code == code, result.output
    payload: dict[str, Any] = json.loads(result.stdout)
    assert payload["ok"] is False
    assert payload["exit_code"] == code
    assert result.stderr.startswith(f"error: {payload['what']}")
    assert "Traceback" not in result.output
    return payload


def test_the_verbs_are_those_of_the_manual() -> None:
    result = invoke("--help")
    assert result.exit_code == 0
    shipping = ("check", "sign", "pack", "publish", "diff")
    for verb in ("build", "explain", "verify", "golden", "run", "patches", *shipping):
        assert f"│ {verb} " in result.stdout
    assert invoke("--version").stdout.startswith("qwen3vl-onnx ")


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"], ["explain"]])
@pytest.mark.seconds
def test_nothing_heavy_is_imported_to_help_or_explain(arguments: list[str]) -> None:
    program = (
        "import sys\n"
        "from builder.cli.app import app\n"
        f"app({arguments!r}, standalone_mode=False)\n"
        f"print('heavy:', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = spawned("-c", program)
    assert done.stdout.splitlines()[-1] == "heavy: []", done.stderr


def test_explain_says_what_would_run_and_writes_nothing(tmp_path: Path) -> None:
    result = invoke("explain")
    assert result.exit_code == 0, result.output
    expected = [f"{n}-{name}".ljust(12) + " run: first time" for n, name in enumerate(NAMES, start=1)]
    assert result.stdout.splitlines() == expected
    assert not list(tmp_path.iterdir())
    as_json = json.loads(invoke("explain", "--until", "export", "--json").stdout)
    assert [stage["stage"] for stage in as_json["stages"]] == NAMES[:3]
    assert as_json["output"] == "outputs/miniature-fp32"


def test_build_prints_a_line_a_stage_and_the_result_last(tmp_path: Path) -> None:
    result = invoke("build", "--until", "fetch")
    assert result.exit_code == 0, result.output
    assert result.stdout == "outputs/miniature-fp32/1-fetch\n"
    assert result.stderr.startswith("1-fetch      run: first time … ")
    assert (tmp_path / "outputs" / "miniature-fp32" / "1-fetch" / "stage.json").is_file()

    again = invoke("build", "--until", "fetch")
    assert again.stderr.splitlines() == ["1-fetch      cached", "nothing to run: nothing changed"]
    assert again.stdout == result.stdout

    payload = json.loads(invoke("build", "--until", "fetch", "--force", "fetch", "--json").stdout)
    assert payload["ok"] is True
    assert payload["bundles"] == {}
    assert [(stage["stage"], stage["why"]) for stage in payload["stages"]] == [("fetch", "forced")]


def test_build_of_a_changed_checkpoint_names_the_file(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MINIATURE, tmp_path / "mine"))
    assert invoke("build", folder, "--until", "fetch").exit_code == 0
    generation = folder / "generation_config.json"
    generation.write_text(generation.read_text() + "\n")
    result = invoke("explain", folder, "--until", "fetch")
    assert result.stdout == "1-fetch      run: generation_config.json changed\n"


@pytest.mark.seconds
def test_rehash_sees_a_weight_that_kept_its_size_and_time(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(MINIATURE, tmp_path / "mine"))
    weights = folder / "model.safetensors"
    assert invoke("build", folder, "--until", "fetch", "--rehash").exit_code == 0
    stat = weights.stat()
    with weights.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    os.utime(weights, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    # A process of its own: this one remembers the digest of a file by its size and time.
    result = spawned("-m", "builder", "explain", str(folder), "--until", "fetch", "--rehash")
    assert result.stdout == "1-fetch      run: model.safetensors changed\n", result.stderr


@pytest.mark.seconds
def test_an_unpinned_hub_id_is_settled_once(tmp_path: Path) -> None:
    repository = Repository(MINIATURE)
    with HubServer({"Org/Mini": repository}) as hub:
        settings = {
            "HF_ENDPOINT": hub.url,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DISABLE_XET": "1",
            "NO_PROXY": "127.0.0.1",
        }
        first = spawned("-m", "builder", "build", "Org/Mini", "--until", "fetch", **settings)
        assert first.returncode == 0, first.stderr
        pinned = f"Org/Mini@{repository.commit}"
        assert f"qwen3vl-onnx build {pinned}" in first.stdout
        marker = json.loads((tmp_path / "outputs" / "Mini-fp32" / "build.json").read_text())
        assert (marker["asked"], marker["checkpoint"]) == ("Org/Mini", pinned)

        repository.commit = "beef" + "0" * 36
        later = spawned("-m", "builder", "explain", "Org/Mini", "--until", "fetch", "--json", **settings)
        assert json.loads(later.stdout)["checkpoint"] == pinned
        assert json.loads(later.stdout)["stages"][0]["state"] == "cached"
        forced = ["explain", "Org/Mini", "--until", "fetch", "--json", "--force", "fetch"]
        moved = spawned("-m", "builder", *forced, **settings)
        assert json.loads(moved.stdout)["checkpoint"] == f"Org/Mini@{repository.commit}"


def test_a_misspelt_recipe_key_is_told_with_the_nearest_one(tmp_path: Path) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text('precision = "fp32"\ntargets = ["genai"]\nmax_lenght = 9\n')
    payload = failure(invoke("build", "--recipe", recipe, "--json"), 13)
    assert payload["error"] == "RecipeError"
    assert "mine.toml: unknown key `max_lenght`" in payload["what"]
    assert payload["next"] == "did you mean `max_length`?"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine.toml"]


def no_checkpoint(folder: Path) -> None:
    (folder / "config.json").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def mixture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3_vl_moe"}))


@pytest.mark.parametrize(("spoil", "code"), [(no_checkpoint, 10), (mixture, 11), (pickled, 12)])
def test_a_checkpoint_that_cannot_be_built_is_refused_before_anything_is_written(
    tmp_path: Path, spoil: Callable[[Path], None], code: int
) -> None:
    folder = Path(shutil.copytree(MINIATURE, tmp_path / "mine"))
    spoil(folder)
    failure(invoke("build", folder, "--json"), code)
    failure(invoke("explain", folder, "--json"), code)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("verb", ["build", "explain"])
def test_a_folder_that_holds_something_else_is_refused(tmp_path: Path, verb: str) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.doc").write_text("two years of work")
    payload = failure(invoke(verb, "--output", tmp_path / "taken", "--json"), 19)
    assert payload["next"] == "give another --output"
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["thesis.doc"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["build", "--until", "bundel"], "did you mean 'bundle'?"),
        (["build", "--force", "xyz"], "'xyz' is not a stage"),
        (["explain", "--until", "export", "--force", "verify"], "verify comes after --until export"),
        (["build", "--recepi", "fp32"], "No such option"),
        (["run", "somewhere"], "Missing option"),
        (["run", "somewhere", "--prompt", "?", "--max-new-tokens", "0"], "greater than or equal to 1"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(arguments: list[str], said: str) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    words = " ".join(result.stderr.replace("│", " ").split())
    assert said in words
    assert result.stdout == ""


def module(monkeypatch: pytest.MonkeyPatch, name: str, **content: object) -> None:
    """A stand-in for a stage's module, so that what the command line makes of its answer shows alone."""
    stand_in = ModuleType(name)
    vars(stand_in).update(content)
    monkeypatch.setitem(sys.modules, name, stand_in)


def report_of(ok: bool) -> Report:
    return Report("genai", "tiny", (Gate("image features", "text", 1e-6 if ok else 1.0, 1e-4),), {})


@pytest.mark.parametrize(("ok", "code"), [(True, 0), (False, 20)])
def test_verify_exits_by_the_gates(monkeypatch: pytest.MonkeyPatch, ok: bool, code: int) -> None:
    asked: list[tuple[object, ...]] = []

    def verify_bundle(bundle: Path, checkpoint: Checkpoint, *arguments: object) -> Report:
        asked.append((bundle, checkpoint.folder, *arguments))
        return report_of(ok)

    def failed(report: Report, folder: Path) -> VerificationError:
        return VerificationError("first difference: image features", next=f"read {folder}")

    module(monkeypatch, "builder.verify.whole", verify_bundle=verify_bundle, failed=failed)
    plain = invoke("verify", "there", "--reference", MINIATURE)
    assert plain.exit_code == code
    assert ("pass" if ok else "FAIL") in plain.stdout.split()
    assert ("first difference: image features" in plain.stderr) is not ok
    limits = ("--memory", "4GB", "--store", "kept")
    as_json = invoke("verify", "there", "--reference", MINIATURE, *limits, "--json")
    assert as_json.exit_code == code
    assert json.loads(as_json.stdout) == {**report_of(ok).as_dict(), "ok": ok}
    assert asked == [
        (Path("there"), MINIATURE, None, None, []),
        (Path("there"), MINIATURE, 4 * 10**9, Path("kept"), []),
    ]


def test_verify_against_what_is_no_checkpoint_is_refused(tmp_path: Path) -> None:
    failure(invoke("verify", tmp_path, "--reference", tmp_path, "--json"), 10)


def test_run_streams_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    def answer(
        bundle: Path, prompt: str, images: list[Path], *, max_new_tokens: int, on_text: Callable[[str], None]
    ) -> None:
        for word in (prompt, str(images[-1]), str(max_new_tokens)):
            on_text(f"{word} ")

    module(monkeypatch, "builder.bundle.generate", answer=answer)
    question = ["run", "there", "--prompt", "What?", "--image", "a.png", "--image", "b.png"]
    assert invoke(*question).stdout == "What? b.png 256 \n"
    payload = json.loads(invoke(*question, "--max-new-tokens", "7", "--json").stdout)
    assert payload == {"ok": True, "bundle": "there", "prompt": "What?", "text": "What? b.png 7 "}


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (BundleError("no manifest", next="build it"), 21, "error: no manifest\n  next:     build it\n"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (ModuleNotFoundError("No module named 'torch'", name="torch"), 22, "torch, which is not installed"),
        (ModuleNotFoundError("No module named 'builder.x'", name="builder.x"), 70, "this is a bug"),
        (ZeroDivisionError("division by zero"), 70, "this is a bug"),
    ],
)
def test_each_kind_of_failure_has_its_code(
    monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int, said: str
) -> None:
    def answer(*given: object, **named: object) -> None:
        raise error

    module(monkeypatch, "builder.bundle.generate", answer=answer)
    result = invoke("run", "there", "--prompt", "What?")
    assert result.exit_code == code
    assert said in result.stderr
    assert ("Traceback" in result.stderr) is (code == 70)
    assert result.stdout.strip() == ""
