"""Node.js, the npm packages that play bundles in it, and a program in it that is asked in lines of JSON.

In: what is installed. Out: why nothing can be played, versions, a `Program`. Guaranteed: nothing is installed or
fetched from here; a program ends with its `Program`, or when nobody listens to its answer any longer.
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
PACKAGES = "QWEN3VL_ONNX_NODE"  # names the folder in which `npm ci` was run
LIBRARY, RUNTIME = "@huggingface/transformers", "onnxruntime-node"
PINNED: Mapping[str, Any] = json.loads((PROGRAMS / "package.json").read_text(encoding="utf-8"))
PINNED_LIBRARY: str = PINNED["dependencies"][LIBRARY]
OLDEST = int(PINNED["engines"]["node"].removeprefix(">="))
INSTALL = "make node"
TAIL = 2000  # characters of what a program said before it died


def packages() -> Path:
    """The folder that has `node_modules`: what the environment names, else `.node` of this checkout."""
    named = os.environ.get(PACKAGES)
    return Path(named) if named else Path(__file__).parents[3] / ".node"


def missing() -> str | None:
    """Why nothing can be played in Node.js here, and the next command; None where it can."""
    node = node_version()
    if node is None:
        return f"Node.js is not installed; install version {OLDEST} or newer, then `{INSTALL}`"
    if int(node.partition(".")[0]) < OLDEST:
        return f"Node.js {node} is too old; install version {OLDEST} or newer"
    found = package_version(LIBRARY)
    if found is None:
        other = f"`npm install {LIBRARY}@{PINNED_LIBRARY}` in a folder that {PACKAGES} names"
        return f"{LIBRARY} is not in {packages() / 'node_modules'}; `{INSTALL}`, or {other}"
    if _numbers(found) < _numbers(PINNED_LIBRARY):
        return f"{LIBRARY} {found} in {packages()} is too old; `{INSTALL}` installs {PINNED_LIBRARY}"
    return None


def versions() -> dict[str, str]:
    """Of what plays a bundle here; nothing where it cannot be played."""
    if missing():
        return {}
    found = {LIBRARY: package_version(LIBRARY), RUNTIME: package_version(RUNTIME), "Node.js": node_version()}
    return {name: version for name, version in found.items() if version}


@lru_cache(maxsize=8)
def _version_of(command: str) -> str | None:
    done = subprocess.run([command, "--version"], capture_output=True, text=True, check=False)
    return done.stdout.strip().removeprefix("v") or None


def node_version() -> str | None:
    """Such as "20.19.0"; None without Node.js."""
    command = shutil.which("node")
    return _version_of(command) if command else None


def package_version(name: str) -> str | None:
    """Of an installed npm package; None where it is not there."""
    file = packages() / "node_modules" / name / "package.json"
    if not file.is_file():
        return None
    return str(json.loads(file.read_text(encoding="utf-8")).get("version", ""))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.partition("-")[0].split(".") if part.isdigit())


class Program:
    """A Node.js program; it starts with the first request, and again after one whose answer was not heard out.

    Args:
        command: the program and its arguments.
    """

    def __init__(self, *command: str | Path) -> None:
        self.command = [str(part) for part in command]
        self._process: subprocess.Popen[str] | None = None

    def ask(self, action: str, **request: Any) -> Iterator[dict[str, Any]]:
        """Each line of the answer, but for the one that ends it.

        Raises:
            RuntimeError: what the program says that went wrong, or the last that it said before it ended.
        """
        process = self._running()
        assert process.stdin is not None
        assert process.stdout is not None
        heard_out = False
        try:
            process.stdin.write(json.dumps({"action": action, **request}) + "\n")
            process.stdin.flush()
            for line in process.stdout:
                told = json.loads(line)
                if told.get("end"):
                    heard_out = True
                    if "error" in told:
                        raise RuntimeError(told["error"])
                    return
                yield told
            process.wait()
            raise RuntimeError(f"Node.js ended with {process.returncode}: {self._said()}")
        except BrokenPipeError as error:
            raise RuntimeError(f"Node.js ended: {self._said()}") from error
        finally:
            if not heard_out:
                self.close()

    def close(self) -> None:
        """Ends the program, if it runs."""
        if self._process is not None:
            self._end()
            self._process = None

    def _running(self) -> subprocess.Popen[str]:
        if self._process is None:
            self._errors = TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115  (as long as the program)
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

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read()[-TAIL:].strip() or "it said nothing"


def _stop(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with suppress(BrokenPipeError):  # what was still to be written to it
                pipe.close()
