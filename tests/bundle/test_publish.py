"""`publish` against a hub on this machine: what is sent, what is not sent twice, what is refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest
from typer.testing import CliRunner, Result

from builder.bundle.check import check
from builder.cli.app import app
from tests.helpers.bundles import DATA, digest, edit_manifest, graph, relisted, small_bundle
from tests.helpers.processes import ROOT
from tests.helpers.upload_hub import TOKEN, UploadHub

REPO = "Org/Tiny-ONNX"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[UploadHub]:
    """A hub without a repository, which huggingface_hub uses with a token that may write."""
    with UploadHub(tmp_path / "hub") as server:
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    folder = small_bundle(tmp_path / "genai")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Tiny\n")
    relisted(folder)
    return folder


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["publish", *(str(one) for one in arguments)])


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def failure(result: Result, code: int) -> dict[str, Any]:
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def test_a_dry_run_lists_and_sends_nothing(hub: UploadHub, bundle: Path) -> None:
    result = invoke(bundle, REPO, "--dry-run")
    assert result.exit_code == 0, result.output
    for name in names(bundle):
        assert name in result.stdout
    assert "it is made" in result.stdout
    payload = json.loads(invoke(bundle, REPO, "--dry-run", "--json").stdout)
    sizes = {one["file"]: one["size"] for one in payload["files"]}
    assert sizes == {name: (bundle / name).stat().st_size for name in names(bundle)}
    assert payload["bytes to send"] == sum(sizes.values())
    assert {request.method for request in hub.requests} <= {"GET", "HEAD"}
    assert not hub.repositories


def test_the_repository_is_the_bundle(hub: UploadHub, bundle: Path) -> None:
    result = invoke(bundle, REPO)
    assert result.exit_code == 0, result.output
    repository = hub.repositories[REPO]
    assert result.stdout.splitlines()[-1] == f"{hub.url}/{REPO}/commit/{repository.commit}"
    assert names(repository.folder) == sorted([*names(bundle), ".gitattributes"])
    assert check(repository.folder).manifest == check(bundle).manifest
    assert sorted(hub.put) == sorted(digest(bundle / name) for name in (DATA, "model.onnx", "tokenizer.json"))
    ((summary, _, _),) = hub.commits
    assert summary == f"Tiny-fp32-genai: manifest {digest(bundle / 'manifest.json')[:12]}"
    assert hub.cards == [(bundle / "README.md").read_text()]


def test_what_is_downloaded_again_passes(hub: UploadHub, bundle: Path, tmp_path: Path) -> None:
    from huggingface_hub import HfApi

    assert invoke(bundle, REPO).exit_code == 0
    folder = Path(HfApi().snapshot_download(REPO, local_dir=tmp_path / "mine"))
    assert (folder / ".gitattributes").exists()
    assert (folder / ".cache" / "huggingface").is_dir()
    assert check(folder).manifest == check(bundle).manifest


def test_the_same_again_sends_nothing_and_another_only_what_differs(hub: UploadHub, bundle: Path) -> None:
    invoke(bundle, REPO)
    sent = list(hub.put)
    again = invoke(bundle, REPO)
    assert again.exit_code == 0, again.output
    assert (hub.put, len(hub.commits)) == (sent, 1)
    graph(bundle / "model.onnx", seed=1)
    relisted(bundle)
    dry = json.loads(invoke(bundle, REPO, "--dry-run", "--json").stdout)
    assert {one["file"] for one in dry["files"] if one["state"] != "same"} == {DATA, "manifest.json"}
    assert invoke(bundle, REPO).exit_code == 0
    assert hub.put[len(sent) :] == [digest(bundle / DATA)]
    assert hub.commits[-1][1] == ["manifest.json", DATA]


def test_a_branch_is_made_and_a_repository_may_be_private(hub: UploadHub, bundle: Path) -> None:
    result = invoke(bundle, REPO, "--revision", "v1", "--private", "--no-evidence")
    assert result.exit_code == 0, result.output
    assert hub.repositories[REPO].names == {"main", "v1"}
    assert hub.made[0]["visibility"] == "private"
    assert not [name for name in names(hub.repositories[REPO].folder) if name.startswith("evidence")]


def test_other_files_are_told_and_removed_only_if_asked(hub: UploadHub, bundle: Path) -> None:
    repository = hub.make(REPO)
    (repository.folder / "old.onnx").write_bytes(b"of an earlier bundle")
    result = invoke(bundle, REPO)
    assert result.exit_code == 0, result.output
    assert "old.onnx" in result.stderr
    assert "old.onnx" in names(repository.folder)
    assert invoke(bundle, REPO, "--prune").exit_code == 0
    assert hub.commits[-1][1:] == ([], ["old.onnx"])
    assert check(repository.folder).target == "genai"


def test_what_is_refused_leaves_the_repository_as_it_was(hub: UploadHub, bundle: Path) -> None:
    hub.refuse = {digest(bundle / DATA)}
    error = failure(invoke(bundle, REPO, "--json"), 28)
    assert DATA in error["what"] + error["found"]
    assert "hf auth login" in error["next"]
    assert names(hub.repositories[REPO].folder) == [".gitattributes"]
    arrived, sent = set(hub.objects), len(hub.put)
    hub.refuse = set()
    assert invoke(bundle, REPO).exit_code == 0
    assert not arrived & set(hub.put[sent:])


@pytest.mark.seconds
def test_a_sender_that_is_killed_goes_on_where_it_was(hub: UploadHub, bundle: Path, tmp_path: Path) -> None:
    """Each object that was whole is not sent again."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.url,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path / "hf"),
        "PYTHONPATH": str(ROOT),
    }
    arrived: list[str] = []
    process: list[subprocess.Popen[bytes]] = []

    def kill_at_the_second(oid: str) -> None:
        arrived.append(oid)
        if len(arrived) == 2:
            process[0].kill()
            process[0].wait()

    hub.on_put = kill_at_the_second
    command = [sys.executable, "-m", "builder", "publish", str(bundle), REPO]
    process.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    process[0].communicate(timeout=120)
    assert process[0].returncode == -9
    assert not hub.commits
    whole, sent = set(hub.objects), len(hub.put)
    assert whole
    hub.on_put = lambda oid: None
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert not whole & set(hub.put[sent:])
    assert check(hub.repositories[REPO].folder).manifest == check(bundle).manifest


def test_without_a_token_that_may_write_nothing_is_made(
    hub: UploadHub, bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_nobody")
    error = failure(invoke(bundle, REPO, "--json"), 28)
    assert "hf auth login" in error["next"]
    assert not hub.repositories


def test_a_repository_that_moved_on_is_told(hub: UploadHub, bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.make(REPO)

    def meanwhile(oid: str) -> None:
        repository.commit = "beef" + "0" * 36

    hub.on_put = meanwhile
    error = failure(invoke(bundle, REPO, "--json"), 28)
    assert "412" in error["found"]


@pytest.mark.parametrize("name", ["no name", "a/b/c", "../x", ""])
def test_a_name_that_is_none_is_told(hub: UploadHub, bundle: Path, name: str) -> None:
    assert "name" in failure(invoke(bundle, name, "--json"), 28)["what"]


def test_a_hub_that_is_gone_is_told(hub: UploadHub, bundle: Path) -> None:
    hub.close()
    assert "same command" in failure(invoke(bundle, REPO, "--json"), 28)["next"]


def test_what_fails_the_check_is_not_sent(hub: UploadHub, bundle: Path) -> None:
    edit_manifest(bundle, lambda content: content.update(opset=19))
    failure(invoke(bundle, REPO, "--json"), 21)
    assert not hub.requests
