"""Find Node.js and the npm packages that run bundles, and communicate with a Node.js program in lines of JSON.

Nothing is installed or fetched from here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import weakref
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

PROGRAMS = Path(__file__).parent / "js"
PACKAGES = "QWEN3VL_ONNX_NODE"  # environment variable: the folder in which `npm ci` was run
LIBRARY, RUNTIME = "@huggingface/transformers", "onnxruntime-node"
PINNED: Mapping[str, Any] = json.loads((PROGRAMS / "package.json").read_text(encoding="utf-8"))
PINNED_LIBRARY: str = PINNED["dependencies"][LIBRARY]
OLDEST = int(PINNED["engines"]["node"].removeprefix(">="))
INSTALL = "make node"
TAIL = 2000  # characters of a program's stderr in an error message


def packages() -> Path:
    """Return the folder with `node_modules`: from the environment, or else `.node` in this checkout."""
    configured = os.environ.get(PACKAGES)
    return Path(configured) if configured else Path(__file__).parents[3] / ".node"


def missing() -> str | None:
    """Return why bundles cannot run in Node.js here, with the next command; None if they can."""
    node = node_version()
    if node is None:
        return f"Node.js is not installed; install version {OLDEST} or newer, then `{INSTALL}`"
    if int(node.partition(".")[0]) < OLDEST:
        return f"Node.js {node} is too old; install version {OLDEST} or newer"
    library = package_version(LIBRARY)
    if library is None:
        other = f"`npm install {LIBRARY}@{PINNED_LIBRARY}` in a folder that {PACKAGES} names"
        return f"{LIBRARY} is not in {packages() / 'node_modules'}; `{INSTALL}`, or {other}"
    if _numbers(library) < _numbers(PINNED_LIBRARY):
        return f"{LIBRARY} {library} in {packages()} is too old; `{INSTALL}` installs {PINNED_LIBRARY}"
    return None


def versions() -> dict[str, str]:
    """Return the versions of the library, the runtime and Node.js; empty if bundles cannot run."""
    if missing():
        return {}
    installed = {LIBRARY: package_version(LIBRARY), RUNTIME: package_version(RUNTIME), "Node.js": node_version()}
    return {name: version for name, version in installed.items() if version}


@lru_cache(maxsize=8)
def _version_of(command: str) -> str | None:
    result = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return result.stdout.strip().removeprefix("v") or None


def node_version() -> str | None:
    """Return the version of Node.js, such as "20.19.0", or None if it is not installed."""
    command = shutil.which("node")
    return _version_of(command) if command else None


def package_version(name: str) -> str | None:
    """Return the version of an npm package, or None if it is not installed."""
    file = packages() / "node_modules" / name / "package.json"
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8")).get("version", ""))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())


class Program:
    """A Node.js program that reads requests and writes responses as lines of JSON.

    It starts with the first request. If a response is not read to its end, it is killed and restarts with the next
    request. It ends with its `Program`.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, *command: str | Path) -> None:
        self.command = [str(part) for part in command]
        self._process: subprocess.Popen[str] | None = None

    def request(self, action: str, **arguments: Any) -> Iterator[dict[str, Any]]:
        """Send a request and yield each line of the response except the final one.

        Raises:
            RuntimeError: the program reports an error, or ends; with its message, or the end of its stderr.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        complete = False
        try:
            process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                response = json.loads(line)
                if response.get("end"):
                    complete = True
                    if "error" in response:
                        raise RuntimeError(response["error"])
                    return
                yield response
            process.wait()
            raise RuntimeError(f"Node.js ended with {process.returncode}: {self._stderr()}")
        except BrokenPipeError as error:
            raise RuntimeError(f"Node.js ended: {self._stderr()}") from error
        finally:
            if not complete:
                self.close()

    def close(self) -> None:
        """End the program if it is running."""
        if self._process is not None:
            self._end()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (open as long as the program)
            self._process = subprocess.Popen(
                ["node", *self.command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
            )
            self._end = weakref.finalize(self, _stop, self._process)
        return self._process

    def _stderr(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-TAIL:].strip() or "no output on stderr"


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # unwritten data
                pipe.close()
