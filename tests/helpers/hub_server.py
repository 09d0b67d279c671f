"""A local hub in a thread: the part of the protocol that huggingface_hub uses to download a model.

It logs requests, and can drop a connection halfway, send wrong bytes, or refuse.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_API = re.compile(r"/api/models/(?P<repo>[^/]+/[^/]+)(?:/revision/(?P<revision>.+))?")
_FILE = re.compile(r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)")


@dataclass(frozen=True)
class Request:
    """One request: `GET`, `/Org/Name/resolve/…`, and its `Range` header."""

    method: str
    path: str
    range: str | None


@dataclass
class Repository:
    """A model repository with one commit, also named `main`.

    Args:
        folder: its files.
        commit: 40 hex digits.
        drop: file → after how many bytes the connection ends, once.
        fail: files whose content is answered with an internal error.
        replace: file → what is sent instead of its content, under the right names.
        refusal: `X-Error-Code` and status of every answer.
        names: branches, all of which are at that commit.
        lfs: how names of files end that are stored with LFS.
    """

    folder: Path
    commit: str = "c0ffee" + "0" * 34
    drop: dict[str, int] = field(default_factory=dict)
    fail: set[str] = field(default_factory=set)
    replace: dict[str, bytes] = field(default_factory=dict)
    refusal: tuple[str, int] | None = None
    names: set[str] = field(default_factory=lambda: {"main"})
    lfs: tuple[str, ...] = (".safetensors", ".bin", "tokenizer.json")

    def files(self) -> list[str]:
        """Relative paths, sorted."""
        paths = (path for path in self.folder.rglob("*") if path.is_file())
        return sorted(path.relative_to(self.folder).as_posix() for path in paths)

    def info(self, repo: str, *, blobs: bool) -> dict[str, object]:
        """The answer of `/api/models/…`."""
        siblings: list[dict[str, object]] = []
        for file in self.files():
            content = (self.folder / file).read_bytes()
            entry: dict[str, object] = {"rfilename": file}
            if blobs:
                entry |= {"size": len(content), "blobId": git_blob(content)}
                if file.endswith(self.lfs):
                    entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {
            "_id": "1",
            "id": repo,
            "modelId": repo,
            "sha": self.commit,
            "private": False,
            "siblings": siblings,
        }


class HubServer:
    """`with HubServer({"Org/Name": Repository(folder)}) as hub:`; `hub.url` is its endpoint."""

    def __init__(self, repositories: Mapping[str, Repository]) -> None:
        self.repositories = dict(repositories)
        self.requests: list[Request] = []
        self.closed = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (self.handler(),), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def handler(self) -> type[Handler]:
        """The request handler."""
        return Handler

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop listening, and drop open connections."""
        self.closed = True
        self._server.shutdown()
        self._server.server_close()

    def contents(self, file: str) -> list[Request]:
        """The requests for the content of `file`."""
        return [request for request in self.requests if request.method == "GET" and request.path.endswith("/" + file)]

    def fetched(self) -> set[str]:
        """The names of all files whose content was requested."""
        found = (_FILE.fullmatch(request.path) for request in self.requests if request.method == "GET")
        return {match["file"] for match in found if match}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: object) -> None:
        """Print nothing to stderr."""

    def _answer(self) -> None:
        if self.hub.closed:
            self.close_connection = True
            return
        url = urlsplit(self.path)
        path = unquote(url.path)
        self.hub.requests.append(Request(self.command, path, self.headers.get("Range")))
        api, file = _API.fullmatch(path), _FILE.fullmatch(path)
        found = api or file
        repository = self.hub.repositories.get(found["repo"]) if found else None
        if found is None or repository is None:
            self.send(404, {"X-Error-Code": "RepoNotFound"})
        elif repository.refusal:
            code, status = repository.refusal
            self.send(status, {"X-Error-Code": code} if code else {})
        elif found["revision"] not in (None, *repository.names, repository.commit):
            self.send(404, {"X-Error-Code": "RevisionNotFound"})
        elif api:
            info = repository.info(api["repo"], blobs="blobs=" in url.query)
            self.send(200, {"Content-Type": "application/json"}, json.dumps(info).encode())
        elif file:
            self._send_file(repository, file["file"])

    def _send_file(self, repository: Repository, file: str) -> None:
        commit = {"X-Repo-Commit": repository.commit}
        path = repository.folder / file
        if not path.is_file():
            self.send(404, {"X-Error-Code": "EntryNotFound", **commit})
            return
        content = path.read_bytes()
        headers = {"ETag": f'"{git_blob(content)}"', "Accept-Ranges": "bytes", **commit}
        if file.endswith(repository.lfs):
            headers |= {"X-Linked-ETag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
        if self.command == "GET" and file in repository.fail:
            self.send(500, commit)
            return
        content = repository.replace.get(file, content)
        status, start = 200, re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        if start:
            status, begin = 206, int(start[1])
            headers["Content-Range"] = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            content = content[begin:]
        self.send(status, headers, content, repository.drop.pop(file, None) if self.command == "GET" else None)

    def send(
        self, status: int, headers: Mapping[str, str], content: bytes = b"", drop_after: int | None = None
    ) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:drop_after])
        if drop_after is not None:
            self.close_connection = True


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
