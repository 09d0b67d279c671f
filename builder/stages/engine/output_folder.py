"""Manage the output folder: ownership, locking, and each stage's folder with its `Record` (`stage.json`).

Guarantees: a folder with other content is never written to; two builds never write to the same folder; wherever the
process is killed, a stage's folder is the complete old one or the complete new one.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError

from builder.stages.engine.cache_key import Components
from builder.util.cost import Cost
from builder.util.errors import OutputError
from builder.util.files import link, write_text

MARKER = "build.json"
RECORD = "stage.json"
LOCK = ".lock"
EVIDENCE = "evidence"
TOOL = "qwen3vl-onnx"


@dataclass(frozen=True)
class Record:
    """Inputs, results and cost of a stage's run.

    Args:
        stage: name of the stage.
        key: of `components`.
        components: see `builder.stages.engine.cache_key`.
        after: input stage → `started` of the run whose result was read.
        facts: what the stage's `run` returned.
        files: relative path → size in bytes, of every artifact but `evidence/`.
        started: UTC, ISO 8601 to the microsecond.
        cost: see `builder.util.cost`.
    """

    stage: str
    key: str
    components: Components
    after: Mapping[str, str]
    facts: Mapping[str, object]
    files: Mapping[str, int]
    started: str
    cost: Cost


def read_record(folder: Path) -> Record | None:
    """Read the record in a stage's folder; None if there is no folder.

    Raises:
        ValueError: the folder has no readable record.
    """
    if not folder.is_dir():
        return None
    try:
        return TypeAdapter(Record).validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder / RECORD} is unreadable") from error


def write_record(folder: Path, record: Record) -> None:
    """Write `stage.json`, indented for readers."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def find_linkable(folder: Path, key: str) -> Path | None:
    """Find a complete folder of the same stage and key in another output folder next to this one."""
    for other in sorted(folder.parent.parent.glob(f"*/{folder.name}")):
        try:
            record = read_record(other)
        except ValueError:
            continue
        if record and record.key == key and not damage(other, record) and read_marker(other.parent):
            return other
    return None


def linked(folder: Path, fresh: Path) -> Mapping[str, object]:
    """Link every artifact of the complete `folder` into `fresh`, and return its facts."""
    record = read_record(folder)
    assert record is not None
    for name in record.files:
        link(folder / name, fresh / name)
    return record.facts


def sizes(folder: Path) -> dict[str, int]:
    """Map each artifact's relative path to its bytes, without `evidence/`, which may be rewritten later."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / RECORD and EVIDENCE not in file.relative_to(folder).parts
    }


def damage(folder: Path, record: Record) -> list[str]:
    """Describe the artifacts that are missing or whose size changed since they were written."""
    present = sizes(folder)
    return [
        f"{folder.name}/{name} {'missing' if name not in present else 'changed'}"
        for name, size in record.files.items()
        if present.get(name) != size
    ]


def part(folder: Path) -> Path:
    """Create an empty folder next to `folder` to write into, replacing what a killed run left."""
    remove_part(folder)
    fresh = _part(folder)
    fresh.mkdir(parents=True)
    return fresh


def remove_part(folder: Path) -> None:
    """Remove what a failed or killed run left next to `folder`."""
    if _part(folder).exists():
        shutil.rmtree(_part(folder))


def put_in_place(fresh: Path, folder: Path) -> None:
    """Rename the complete `.part` into place, then remove the old folder."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a `put_in_place` that was interrupted."""
    old = _old(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


@contextmanager
def claimed(output: Path, about: Mapping[str, str]) -> Iterator[None]:
    """Lock the output folder, creating and marking it.

    Args:
        output: created if it does not exist.
        about: what is being built, written to `build.json`.

    Raises:
        OutputError: it has other content, another build is writing to it, or it cannot be written.
    """
    refuse_foreign(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another build is writing to {output}", next="wait until it ends, or give another --output"
        ) from None
    except OSError as error:
        raise unwritable(output, error) from error
    try:
        write_marker(output, about)
        yield
    finally:
        lock.release()


def refuse_foreign(output: Path) -> None:
    """Raise `OutputError` unless the folder is absent, empty or an output folder; write nothing."""
    try:
        entries = {entry.name for entry in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(output, error) from error
    if entries - {LOCK, MARKER + ".part"} and read_marker(output) is None:
        raise OutputError(
            f"the output folder {output} has other content",
            expected=f"an empty folder, or an earlier build's with its {MARKER}",
            found=", ".join(sorted(entries)[:5]) + (", …" if len(entries) > 5 else ""),
            next="give another --output",
        )


def read_marker(output: Path) -> Mapping[str, str] | None:
    """Read `build.json`; None if it is missing or not written by this tool."""
    try:
        marker = json.loads((output / MARKER).read_bytes())
    except (OSError, ValueError):
        return None
    return marker if isinstance(marker, dict) and marker.get("tool") == TOOL else None


def write_marker(output: Path, about: Mapping[str, str]) -> None:
    """Write `build.json`, complete or not at all."""
    try:
        write_text(output / MARKER, json.dumps({"tool": TOOL, **about}, indent=2, sort_keys=True) + "\n")
    except OSError as error:
        raise unwritable(output, error) from error


def unwritable(output: Path, error: OSError) -> OutputError:
    """Return the error as an `OutputError` that the user can resolve."""
    return OutputError(
        f"the output folder {output} cannot be written",
        found=error.strerror or str(error),
        next="free some space, fix its permissions, or give another --output",
    )


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
