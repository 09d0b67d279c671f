"""The rooms of builder/: imports only run downward, without a circle; what a stage key may hold; sizes."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from builder.stages.engine.build import STAGES
from builder.stages.engine.cache_key import code_digests
from tests.helpers.processes import ROOT
from tests.helpers.rooms import FILES, ROOMS

MODULES = {name.removesuffix(".py").removesuffix("/__init__").replace("/", "."): name for name in FILES}


def imported(module: str) -> Iterator[str]:
    """The modules of builder and patches that a module imports anywhere, for type checkers too."""
    name = MODULES[module]
    for node in ast.walk(ast.parse(FILES[name].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{name}: relative import"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if found := full if full in MODULES else node.module if node.module in MODULES else None:
                    yield found


IMPORTS = {module: set(imported(module)) - {module} for module in MODULES}


def room(module: str) -> str:
    parts = module.split(".")
    return "patches" if parts[0] == "patches" else parts[1] if len(parts) > 1 else ""


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_only_rooms_below_its_own(module: str) -> None:
    own = room(module)
    if own == "patches":  # next to checkpoint/
        assert {room(other) for other in IMPORTS[module]} <= {"patches", "util"}
        return
    if own in ("", "__main__"):
        return
    below = {*ROOMS[ROOMS.index(own) :], "patches"} - ({"patches"} if own in ("checkpoint", "util") else set())
    assert not {other for other in IMPORTS[module] if room(other) not in below}


def test_no_modules_import_each_other() -> None:
    waiting, circle = dict(IMPORTS), True
    while circle:  # peel off what imports nothing that is left
        free = [module for module, others in waiting.items() if not others & waiting.keys()]
        waiting = {module: others for module, others in waiting.items() if module not in free}
        circle = bool(free)
    assert not {module: sorted(others & waiting.keys()) for module, others in waiting.items()}


def test_the_rooms_are_all_there_is() -> None:
    assert {room(module) for module in MODULES} - {"", "__main__", "patches"} == set(ROOMS)


@pytest.mark.parametrize("name", sorted(name for name in FILES if name.startswith("builder/")))
def test_init_files_are_empty(name: str) -> None:
    """A stage key follows the parents of every module."""
    assert not name.endswith("__init__.py") or not FILES[name].read_text(encoding="utf-8").strip()


@pytest.mark.parametrize("stage", ["export", "quantize"])
def test_the_key_of_a_stage_holds_no_room_that_cannot_change_its_result(stage: str) -> None:
    (found,) = [one for one in STAGES if one.name == stage]
    code = code_digests(found.module_name)
    foreign = ("builder/verify/", "builder/bundle/", "builder/cli/", "builder/targets/runners/")
    assert not [name for name in code if name.startswith(foreign)]


@pytest.mark.parametrize(
    ("file", "stages"),
    [
        ("builder/verify/tolerances.py", {"verify"}),
        ("builder/verify/report/gates.py", {"verify", "bundle"}),
        ("builder/verify/report/template.html.j2", {"verify", "bundle"}),
        ("builder/bundle/model_card.py", {"bundle"}),
        ("builder/targets/notes.py", {"bundle"}),
    ],
)
def test_a_change_runs_only_what_depends_on_it(file: str, stages: set[str]) -> None:
    assert {stage.name for stage in STAGES if file in code_digests(stage.module_name, stage.files)} == stages


def test_no_room_and_no_folder_is_a_hall() -> None:
    lines = {name: len(file.read_text(encoding="utf-8").splitlines()) for name, file in FILES.items()}
    ours = {name: count for name, count in lines.items() if name.startswith("builder/")}
    rooms: Counter[str] = Counter()
    for name, count in ours.items():
        rooms[name.split("/")[1]] += count
    assert all(count <= 0.3 * sum(ours.values()) for count in rooms.values())
    folders = Counter(str(Path(name).parent) for name in FILES if not name.endswith("__init__.py"))
    assert max(folders.values()) <= 20
    assert not {name for name, count in ours.items() if count > 300 and not name.endswith("/pipeline.py")}
    tests = {file: len(file.read_text(encoding="utf-8").splitlines()) for file in (ROOT / "tests").rglob("*.py")}
    assert not {file for file, count in tests.items() if count > 450}


def test_no_test_imports_from_a_test_module() -> None:
    """What tests share is in tests/helpers/."""
    for file in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                assert not any(part.startswith("test_") for part in node.module.split(".")), file
