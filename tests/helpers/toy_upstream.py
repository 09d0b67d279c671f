"""A toy upstream distribution in several releases, with real files and metadata, and patches of it.

`toy_upstream` is importable at the release that was installed last.
"""

from __future__ import annotations

import importlib
import linecache
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from patches.registry import Patch

PACKAGE = "toy_upstream"
FIRST = '''\
import functools


def logged(function):
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapper


def offset():
    return 1


class Base:
    def inherited(self, x):
        return x - 1


class Layer(Base):
    @logged
    def forward(self, x, scale=2):
        """Scale and shift."""
        y = x * scale
        return y + offset()

    @staticmethod
    def fixed(x):
        return x + 5


def apply(x):
    return Layer().forward(x)
'''
SECOND = FIRST.replace("        y = x * scale\n", "        y = scale * x\n        y = y + 0\n")
RENAMED = FIRST.replace("class Layer(Base)", "class Block(Base)").replace("Layer()", "Block()")


@dataclass
class Toy:
    """The parent folder of installed releases, and the release that is importable now."""

    folder: Path
    monkeypatch: pytest.MonkeyPatch

    def install(self, release: str, text: str) -> ModuleType:
        """Install that release of `toy_upstream`, as pip would."""
        site = self.folder / f"site-{release}"
        info = site / f"{PACKAGE}-{release}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {release}\n")
        package = site / PACKAGE
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "model.py").write_text(text)
        self.forget()
        self.monkeypatch.syspath_prepend(site)
        return importlib.import_module(f"{PACKAGE}.model")

    def forget(self) -> None:
        """Remove the imported release."""
        for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        linecache.clearcache()


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Toy]:
    """An installer of toy releases; their modules are removed afterwards."""
    toy = Toy(tmp_path, monkeypatch)
    yield toy
    toy.forget()


def model() -> Any:
    """The installed release's module."""
    return importlib.import_module(f"{PACKAGE}.model")


def _make(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(self: Any, x: int, scale: int = 2) -> int:
        return scale * x + model().offset()  # type: ignore[no-any-return]

    return forward


def _check() -> None:
    from patches.registry import applied

    wanted = model().Layer().forward(3)
    with applied([LAYER]):
        got = model().Layer().forward(3)
    assert got == wanted, f"layer: {got}, expected {wanted}"


LAYER = Patch(
    name="layer",
    target=f"{PACKAGE}.model:Layer.forward",
    why="it multiplies in the wrong order",
    remove_when="upstream turns the factors around",
    covers=(f"{PACKAGE}.model:offset", f"{PACKAGE}.model:Layer.later"),
    make=_make,
    check=_check,
)


def patch(**changes: Any) -> Patch:
    """Return `LAYER` with a change."""
    return replace(LAYER, **changes)
