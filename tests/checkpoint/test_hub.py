"""The stage `fetch` against a local hub server, with and without faults."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub.constants
import pytest

from builder.checkpoint.fingerprint import hub_fingerprint, open_fetched, resolve
from builder.checkpoint.source import parse_source
from builder.stages.engine.build import Build
from builder.stages.engine.execute import execute, plan
from builder.targets.recipe_file import load_recipe
from builder.util.errors import BuildError, CheckpointError, DownloadError, UnsafeError, UnsupportedError
from tests.helpers.fetching import SHARD, fetch_into, sha256
from tests.helpers.hub_server import HubServer, Repository
from tests.helpers.openings import count_openings

pytestmark = pytest.mark.seconds

REPO = "Org/Tiny-VL"


@pytest.fixture
def repository(sharded: Path) -> Repository:
    """A checkpoint as a hub repository, with other files that repositories have."""
    (sharded / "README.md").write_text("# Tiny")
    (sharded / "pytorch_model.bin").write_bytes(b"never to be fetched")
    (sharded / "onnx").mkdir()
    (sharded / "onnx" / "model.onnx").write_bytes(b"nor this")
    return Repository(sharded)


@pytest.fixture
def hub(repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub server with that repository, which huggingface_hub uses, and an empty cache."""
    with HubServer({REPO: repository}) as server:
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        settings = {
            "ENDPOINT": server.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": template,
            "HF_HUB_CACHE": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_OFFLINE": False,
            "DOWNLOAD_CHUNK_SIZE": 1024,
        }
        for name, value in settings.items():
            monkeypatch.setattr(huggingface_hub.constants, name, value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Output folder of the stage."""
    return tmp_path / "1-fetch"


def test_unpinned_id_is_resolved_once_and_only_needed_files_are_fetched(
    hub: HubServer, repository: Repository, out: Path
) -> None:
    source = resolve(parse_source(REPO))
    assert source.revision == repository.commit
    assert source.command == f"qwen3vl-onnx build {REPO}@{repository.commit}"
    assert hub.fetched() == {"config.json"}
    assert hub_fingerprint(source) == {"repository": REPO, "revision": repository.commit}
    facts = fetch_into(source, out)
    assert facts["report"] == f"pinned: {source.command}"
    checkpoint = open_fetched(out)
    assert (checkpoint.name, checkpoint.revision) == ("Tiny-VL", repository.commit)
    unwanted = {"pytorch_model.bin", "onnx/model.onnx"}
    assert hub.fetched() == {*checkpoint.files, "README.md"} == set(repository.files()) - unwanted
    assert (out / "notices" / "README.md").read_text() == "# Tiny"
    record = json.loads((out / "checkpoint.json").read_text())
    assert record["command"] == source.command
    for file, entry in record["files"].items():
        assert entry["sha256"] == sha256(repository.folder / file)


def test_dropped_connection_is_resumed(hub: HubServer, repository: Repository, out: Path) -> None:
    repository.drop[SHARD] = 100_000
    fetch_into(resolve(parse_source(REPO)), out)
    first, second = hub.contents(SHARD)
    assert first.range is None
    assert second.range is not None
    begin = int(second.range.removeprefix("bytes=").removesuffix("-"))
    assert 0 < begin <= 100_000
    assert sha256(open_fetched(out).folder / SHARD) == sha256(repository.folder / SHARD)


def test_second_try_keeps_complete_files(hub: HubServer, repository: Repository, out: Path) -> None:
    last = "model-00003-of-00003.safetensors"
    repository.fail.add(last)
    source = resolve(parse_source(REPO))
    with pytest.raises(DownloadError, match="could not be downloaded") as caught:
        fetch_into(source, out)
    assert f"{source.command} once" in str(caught.value.next)
    assert not (out / "checkpoint.json").exists()
    repository.fail.clear()
    fetch_into(source, out)
    assert len(hub.contents(SHARD)) == 1
    assert len(hub.contents(last)) == 2


@pytest.mark.parametrize("file", [SHARD, "generation_config.json"])
def test_other_bytes_than_the_hub_names_are_refused(
    hub: HubServer, repository: Repository, out: Path, file: str
) -> None:
    content = (repository.folder / file).read_bytes()
    repository.replace[file] = content[:-2] + bytes([content[-2] ^ 1]) + content[-1:]
    source = resolve(parse_source(REPO))
    with pytest.raises(DownloadError, match=f"{file} differs from the file at the hub") as caught:
        fetch_into(source, out)
    repository.replace.clear()
    removed = str(caught.value.next).split()[1]
    Path(removed).unlink()
    fetch_into(source, out)
    assert sha256(open_fetched(out).folder / file) == sha256(repository.folder / file)


def test_a_download_is_opened_to_check_it_and_once_more_from_the_record(
    hub: HubServer, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = count_openings(monkeypatch)
    build = Build(resolve(parse_source(REPO)), load_recipe(), out)
    execute(build, until="fetch")
    plan(build)
    assert len(opened) == 2
    assert build.checkpoint.folder == opened[0] == opened[1]


def test_cached_commit_needs_no_network(hub: HubServer, repository: Repository, out: Path) -> None:
    pinned = resolve(parse_source(REPO))
    fetch_into(pinned, out)
    hub.close()
    requests = len(hub.requests)
    assert resolve(pinned) == pinned
    shutil.rmtree(out)
    fetch_into(pinned, out)
    assert open_fetched(out).revision == repository.commit
    assert len(hub.requests) == requests
    with pytest.raises(DownloadError, match="could not be downloaded"):
        resolve(parse_source(REPO))


@pytest.mark.parametrize(
    ("text", "refusal", "message", "advice"),
    [
        ("Org/None", None, "no repository Org/None", "spelling"),
        (f"{REPO}@nope", None, "no revision nope", "commits"),
        (REPO, ("GatedRepo", 403), "gated", "hf auth login"),
        (REPO, ("RepoNotFound", 401), "that you can read", "HF_TOKEN"),
        (REPO, ("", 403), "could not be downloaded", REPO),
    ],
)
def test_refusals_of_the_hub(
    hub: HubServer,
    repository: Repository,
    text: str,
    refusal: tuple[str, int] | None,
    message: str,
    advice: str,
) -> None:
    repository.refusal = refusal
    with pytest.raises(DownloadError, match=message) as caught:
        resolve(parse_source(text))
    assert advice in str(caught.value.next)


def make_moe(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "qwen3_vl_moe"}))


def demand_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoModel": "mine.Model"}}))


def leave_pickles(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()


def leave_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text("{}")


def name_outside(folder: Path) -> None:
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))


def lose_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (make_moe, UnsupportedError),
        (demand_code, UnsafeError),
        (leave_pickles, UnsafeError),
        (leave_adapter, UnsupportedError),
        (name_outside, UnsafeError),
        (lose_shard, CheckpointError),
    ],
)
def test_refused_before_a_weight_is_fetched(
    hub: HubServer, repository: Repository, out: Path, change: Callable[[Path], None], error: type[BuildError]
) -> None:
    change(repository.folder)

    def build() -> None:
        fetch_into(resolve(parse_source(REPO)), out)

    with pytest.raises(error):
        build()
    assert not any(file.endswith((".safetensors", ".bin")) for file in hub.fetched())


def test_endpoint_and_cache_are_those_of_the_environment(
    hub: HubServer, repository: Repository, tmp_path: Path
) -> None:
    code = (
        "import sys; from builder.checkpoint.fingerprint import *; from builder.checkpoint.source import *; "
        "print(resolve(parse_source(sys.argv[1])))"
    )
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_CACHE": str(tmp_path / "other")}
    command = [sys.executable, "-c", code, REPO]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    assert found.strip() == f"{REPO}@{repository.commit}"
    assert list((tmp_path / "other").rglob("config.json"))


def test_offline_setting_is_named(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError, match="could not be downloaded") as caught:
        resolve(parse_source(REPO))
    assert "OfflineModeIsEnabled" in str(caught.value.found)
    assert hub.requests == []
