"""Drive a headless Chromium through a pipe (DevTools protocol), and serve local folders."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

FLAGS = (
    "--headless",
    "--no-sandbox",  # not available as root
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)
# A WebGPU adapter that computes on the CPU: slow, and without float16.
WEBGPU = ("--enable-unsafe-webgpu", "--use-webgpu-adapter=swiftshader")
# The browser reads its commands from 3 and answers on 4, whatever numbers the pipes have here.
MOVED = """
import fcntl, os, sys
pipes = [fcntl.fcntl(int(number), fcntl.F_DUPFD, 10) for number in sys.argv[1:3]]
for number, pipe in enumerate(pipes, start=3):
    os.dup2(pipe, number)
os.execv(sys.argv[3], sys.argv[3:])
"""
# These headers allow shared memory between threads, so that WebAssembly uses all cores.
ISOLATED = {"Cross-Origin-Opener-Policy": "same-origin", "Cross-Origin-Embedder-Policy": "require-corp"}
KINDS = {".mjs": "text/javascript", ".wasm": "application/wasm"}
PATIENCE = 300  # longest wait, in seconds


def chromium() -> str | None:
    """Return the browser's command, or None."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class _Files(SimpleHTTPRequestHandler):
    """Serve several folders, each under its own name."""

    def __init__(self, *args: Any, folders: Mapping[str, Path], requested: list[str], **kwargs: Any) -> None:
        self.folders, self.requested = folders, requested
        self.extensions_map = {**SimpleHTTPRequestHandler.extensions_map, **KINDS}
        super().__init__(*args, **kwargs)

    def translate_path(self, path: str) -> str:
        first, _, rest = unquote(urlsplit(path).path).lstrip("/").partition("/")
        folder = self.folders.get(first)
        return str(folder / rest) if folder and ".." not in rest.split("/") else os.devnull + "/none"

    def end_headers(self) -> None:
        for name, value in ISOLATED.items():
            self.send_header(name, value)
        super().end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        self.requested.append(self.path)


@contextmanager
def served(folders: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """The server's address, and the paths requested from it."""
    requested: list[str] = []
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Files, folders=folders, requested=requested))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requested
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Page:
    """A page; every method waits for its result."""

    def __init__(self, send: int, receive: int) -> None:
        self._send, self._receive = os.fdopen(send, "wb", buffering=0), os.fdopen(receive, "rb")
        self._count, self._session = 0, ""
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self.call("Page.enable")
        self.call("DOM.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol and return its result.

        Raises:
            RuntimeError: what the browser says is wrong with it, or that it has ended.
        """
        self._count += 1
        message = {"id": self._count, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        self._send.write(json.dumps(message).encode() + b"\0")
        while True:
            reply = json.loads(self._next())
            if reply.get("id") == self._count:
                if "error" in reply:
                    raise RuntimeError(f"{method}: {reply['error']}")
                result: dict[str, Any] = reply["result"]
                return result

    def _next(self) -> bytes:
        line = bytearray()
        while (byte := self._receive.read(1)) != b"\0":
            if not byte:
                raise RuntimeError("the browser has ended")
            line += byte
        return bytes(line)

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)
        self.until("document.readyState === 'complete'")

    def value(self, expression: str) -> Any:
        """Evaluate a JavaScript expression as a JSON value."""
        reply = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in reply:
            raise RuntimeError(f"{expression}: {reply['exceptionDetails']}")
        return reply["result"].get("value")

    def until(self, condition: str, patience: float = PATIENCE) -> None:
        """
        Raises:
            TimeoutError: it never held.
        """
        end = time.monotonic() + patience
        while not self.value(condition):
            if time.monotonic() > end:
                raise TimeoutError(condition)
            time.sleep(0.05)

    def choose(self, selector: str, file: Path) -> None:
        """Set the file of an input."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.call("DOM.setFileInputFiles", nodeId=node, files=[str(file)])

    def image(self, path: Path) -> None:
        """Save a screenshot as PNG."""
        path.write_bytes(base64.b64decode(self.call("Page.captureScreenshot")["data"]))


@contextmanager
def browser(size: tuple[int, int] = (900, 1100), *, webgpu: bool = False) -> Iterator[Page]:
    """Open a page in a browser with a new profile."""
    command = chromium()
    assert command is not None
    theirs_in, send = os.pipe()
    receive, theirs_out = os.pipe()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = (
            *FLAGS,
            *(WEBGPU if webgpu else ()),
            f"--user-data-dir={profile}",
            f"--window-size={size[0]},{size[1]}",
        )
        process = subprocess.Popen(
            [sys.executable, "-c", MOVED, str(theirs_in), str(theirs_out), command, *flags],
            pass_fds=(theirs_in, theirs_out),
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        try:
            yield Page(send, receive)
        finally:
            process.kill()
            process.wait()
