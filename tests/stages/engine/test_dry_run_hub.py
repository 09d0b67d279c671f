"""`build --dry-run` of a checkpoint on a hub: what would be downloaded, without downloading it."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from builder.checkpoint.files import needed_files
from builder.util.units import size
from tests.helpers.dry_runs import estimate, invoke, spawned, stage
from tests.helpers.hub_server import HubServer, Repository

pytestmark = pytest.mark.seconds


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def hub(sharded: Path, tmp_path: Path) -> Iterator[tuple[HubServer, Mapping[str, str]]]:
    """A hub with a checkpoint in three shards, and the environment that makes a process use it."""
    with HubServer({"Org/Tiny": Repository(sharded)}) as server:
        yield (
            server,
            {
                "HF_ENDPOINT": server.url,
                "HF_HOME": str(tmp_path / "hf"),
                "HF_HUB_DISABLE_XET": "1",
                "NO_PROXY": "127.0.0.1",
            },
        )


def test_a_download_is_estimated_without_its_weights(
    hub: tuple[HubServer, Mapping[str, str]], sharded: Path, checkpoint: Callable[[str], Path]
) -> None:
    server, settings = hub
    done = spawned("-m", "builder", "build", "Org/Tiny", "--dry-run", "--json", **settings)
    assert done.returncode == 0, done.stderr
    index = "model.safetensors.index.json"
    assert server.fetched() == {"config.json", index}
    names = [file.name for file in sharded.iterdir()]
    wanted = set(needed_files(names, [name for name in names if name.endswith(".safetensors")]))
    sizes = {name: (sharded / name).stat().st_size for name in wanted - server.fetched()}
    figures = json.loads(done.stdout)["estimate"]
    assert figures["download"] == {"files": sizes, "bytes": sum(sizes.values())}
    assert figures["disks"][0]["download"] == sum(sizes.values())
    local = estimate(invoke(checkpoint("biased"), "--dry-run", "--json"))
    assert [row["data_bytes"] for row in figures["graphs"]] == [row["data_bytes"] for row in local["graphs"]]
    assert stage(figures, "quantize")["memory"] == stage(local, "quantize")["memory"]
    assert not list(Path().iterdir())

    shown = spawned("-m", "builder", "build", "Org/Tiny", "--dry-run", **settings)
    assert f"download  {size(sum(sizes.values()))} in {len(sizes)} files" in shown.stdout


def test_what_was_downloaded_is_not_downloaded_again(hub: tuple[HubServer, Mapping[str, str]]) -> None:
    server, settings = hub
    built = spawned("-m", "builder", "build", "Org/Tiny", "--until", "fetch", **settings)
    assert built.returncode == 0, built.stderr
    requests = len(server.requests)
    done = spawned("-m", "builder", "build", "Org/Tiny", "--dry-run", "--json", **settings)
    figures = json.loads(done.stdout)["estimate"]
    assert figures["download"] == {"files": {}, "bytes": 0}
    assert stage(figures, "fetch")["state"] == "cached"
    assert len(server.requests) == requests
    forced = spawned("-m", "builder", "build", "Org/Tiny", "--dry-run", "--json", "--force", "fetch", **settings)
    figures = json.loads(forced.stdout)["estimate"]
    assert figures["download"]["bytes"] == 0
    assert stage(figures, "fetch")["state"] == "run"
