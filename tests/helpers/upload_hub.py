"""A local hub that accepts uploads: repositories, branches, LFS objects and commits, as huggingface_hub sends them.

A file is in a repository only after a commit, and an LFS object must match its name. The hub logs requests, can refuse,
and can signal when an object arrives, so that a test may stop the sender.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

from tests.helpers.hub_server import Handler, HubServer, Repository, git_blob, sha256

LFS = (".data", ".onnx", ".onnx_data", "tokenizer.json")
TOKEN = "hf_of_the_test"


class UploadHub(HubServer):
    """`with UploadHub(folder) as hub:`; a created repository is in `folder/Org/Name`.

    Args:
        objects: LFS objects by SHA-256.
        put: how often each object was sent.
        commits: (summary, names added, names removed).
        cards: README.md's that were to be judged.
        refuse: objects that are refused.
        on_put: called with an object's name before it is taken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.objects: dict[str, bytes] = {}
        self.put: list[str] = []
        self.commits: list[tuple[str, list[str], list[str]]] = []
        self.cards: list[str] = []
        self.made: list[dict[str, object]] = []
        self.refuse: set[str] = set()
        self.on_put: Callable[[str], None] = lambda oid: None
        super().__init__({})

    def handler(self) -> type[Handler]:
        return UploadHandler

    def make(self, repo: str) -> Repository:
        path = self.folder / repo
        path.mkdir(parents=True)
        (path / ".gitattributes").write_text("*.data filter=lfs diff=lfs merge=lfs -text\n")
        self.repositories[repo] = Repository(path, lfs=LFS)
        return self.repositories[repo]


class UploadHandler(Handler):
    hub: UploadHub

    def do_GET(self) -> None:  # noqa: N802 (http.server's names)
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/?]+(\?.*)?", self.path)
        if found:
            self._json(self._tree(self.hub.repositories[found[1]]))
        else:
            super().do_GET()

    def _tree(self, repository: Repository) -> list[dict[str, object]]:
        rows: list[dict[str, object]] = []
        for name in repository.files():
            content = (repository.folder / name).read_bytes()
            lfs = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            rows.append({"type": "file", "path": name, "size": len(content), "oid": git_blob(content)})
            rows[-1] |= {"lfs": lfs} if name.endswith(LFS) else {}
        return rows

    def do_PUT(self) -> None:  # noqa: N802
        oid, content = self.path.rpartition("/")[2], self._body()
        self.hub.on_put(oid)
        self.hub.put.append(oid)
        if oid in self.hub.refuse:
            self.send(403, {}, b"no")
        elif sha256(content) != oid:
            self.send(400, {}, b"other bytes")
        else:
            self.hub.objects[oid] = content
            self.send(200, {})

    def do_POST(self) -> None:  # noqa: N802
        path, body = unquote(urlsplit(self.path).path), self._body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.send(401, {}, b'{"error": "Invalid username or password."}')
            return
        if path == "/api/validate-yaml":
            self.hub.cards.append(json.loads(body)["content"])
            self._json({"errors": [], "warnings": []})
            return
        if path == "/api/repos/create":
            request = json.loads(body)
            self.hub.made.append(request)
            repo = f"{request['organization']}/{request['name']}"
            self.hub.make(repo)
            self._json({"url": f"{self.hub.url}/{repo}", "name": repo, "id": "1"})
            return
        self._post(path, body)

    def _post(self, path: str, body: bytes) -> None:
        if path.endswith(".git/info/lfs/objects/batch"):
            self._batch(json.loads(body))
            return
        _, _, _, org, name, verb, *rest = path.split("/")
        repository = self.hub.repositories[f"{org}/{name}"]
        if verb == "branch":
            repository.names.add("/".join(rest))
            self._json({})
        elif verb == "preupload":
            self._json({"files": [self._mode(repository, file["path"]) for file in json.loads(body)["files"]]})
        elif verb == "commit":
            self._commit(f"{org}/{name}", repository, [json.loads(line) for line in body.splitlines()])

    def _mode(self, repository: Repository, name: str) -> dict[str, object]:
        there = repository.folder / name
        content = there.read_bytes() if there.is_file() else None
        lfs = name.endswith(LFS)
        oid = None if content is None else sha256(content) if lfs else git_blob(content)
        return {"path": name, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": oid}

    def _batch(self, request: dict[str, list[dict[str, object]]]) -> None:
        objects = []
        for item in request["objects"]:
            href = f"{self.hub.url}/lfs/{item['oid']}"
            actions = {} if item["oid"] in self.hub.objects else {"actions": {"upload": {"href": href}}}
            objects.append({**item, **actions})
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, repo: str, repository: Repository, lines: list[dict[str, Any]]) -> None:
        head, *operations = lines
        if head["value"].get("parentCommit", repository.commit) != repository.commit:
            self.send(412, {}, b'{"error": "A commit has happened since."}')
            return
        added, removed = [], []
        for operation in operations:
            value, kind = operation["value"], operation["key"]
            path = repository.folder / value["path"]
            if kind == "deletedFile":
                path.unlink()
                removed.append(value["path"])
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(
                self.hub.objects[value["oid"]] if kind == "lfsFile" else base64.b64decode(value["content"])
            )
            added.append(value["path"])
        self.hub.commits.append((head["value"]["summary"], sorted(added), sorted(removed)))
        repository.commit = hashlib.sha1(repr(self.hub.commits).encode(), usedforsecurity=False).hexdigest()
        self._json({"commitUrl": f"{self.hub.url}/{repo}/commit/{repository.commit}", "commitOid": repository.commit})

    def _json(self, content: object) -> None:
        self.send(200, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        found = b""
        while length := int(self.rfile.readline(), 16):
            found += self.rfile.read(length)
            self.rfile.readline()
        self.rfile.readline()
        return found
