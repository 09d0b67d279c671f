"""The output folder: whose it is, who is writing in it, and what each stage left there.

In: a folder. Out: `claimed()` for the time of a build, and one `Record` (`stage.json`) a stage. Guaranteed:
a folder that holds something else is never written to, two builds never write to one folder at once, and a
stage's folder is either the old one or the new one, whole, wherever the process is killed.
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
    """What a stage was made from, what it found out, and what it cost.

    Args:
        stage: its name.
        key: of `components`.
        components: see `builder.stages.engine.cache_key`.
        after: input stage → the `started` of the run that it was made after.
        facts: what the stage's `run` returned.
        files: every artifact but `evidence/`, relative → size in bytes.
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
    """The record in a stage's folder; None when the stage has never been made whole.

    Raises:
        ValueError: there is a folder, and no record in it that can be read.
    """
    if not folder.is_dir():
        return None
    try:
        return TypeAdapter(Record).validate_json((folder / RECORD).read_bytes())
    except (OSError, ValidationError) as error:
        raise ValueError(f"{folder / RECORD} is unreadable") from error


def write_record(folder: Path, record: Record) -> None:
    """Write `stage.json`, readable."""
    text = json.dumps(asdict(record), indent=2, ensure_ascii=False)
    (folder / RECORD).write_text(text + "\n", encoding="utf-8")


def find_linkable(folder: Path, key: str) -> Path | None:
    """A complete folder of the same stage and key, of another build next to this one."""
    for other in sorted(folder.parent.parent.glob(f"*/{folder.name}")):
        try:
            record = read_record(other)
        except ValueError:
            continue
        if record and record.key == key and not damage(other, record) and read_marker(other.parent):
            return other
    return None


def linked(folder: Path, fresh: Path) -> Mapping[str, object]:
    """Links every artifact of the whole `folder` into `fresh`; returns its facts."""
    record = read_record(folder)
    assert record is not None
    for name in record.files:
        link(folder / name, fresh / name)
    return record.facts


def sizes(folder: Path) -> dict[str, int]:
    """Relative path → bytes of each artifact; `evidence/` may be rewritten later and is left out."""
    return {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / RECORD and EVIDENCE not in file.relative_to(folder).parts
    }


def damage(folder: Path, record: Record) -> list[str]:
    """Artifacts that are gone or have another size than when they were made, in words."""
    found = sizes(folder)
    return [
        f"{folder.name}/{name} {'is gone' if name not in found else 'changed'}"
        for name, size in record.files.items()
        if found.get(name) != size
    ]


def part(folder: Path) -> Path:
    """An empty folder beside `folder` to write into; what a killed run left there is removed."""
    remove_part(folder)
    fresh = _part(folder)
    fresh.mkdir(parents=True)
    return fresh


def remove_part(folder: Path) -> None:
    """Remove what a run that was killed, or that failed, left beside `folder`."""
    if _part(folder).exists():
        shutil.rmtree(_part(folder))


def put_in_place(fresh: Path, folder: Path) -> None:
    """Rename the whole `.part` into place; the old folder goes only after that."""
    old = _old(folder)
    if folder.exists():
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """Finish or undo a `put_in_place` that was killed between its renames."""
    old = _old(folder)
    if not old.exists():
        return
    if folder.exists():
        shutil.rmtree(old)
    else:
        old.rename(folder)


@contextmanager
def claimed(output: Path, about: Mapping[str, str]) -> Iterator[None]:
    """Hold the output folder alone, made and marked as ours.

    Args:
        output: made when it is not there.
        about: what is being built, for whoever opens `build.json`.

    Raises:
        OutputError: it holds something else, another build is writing to it, or it cannot be written.
    """
    refuse_foreign(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = FileLock(output / LOCK)
        lock.acquire(timeout=0)
    except Timeout:
        raise OutputError(
            f"another build is writing to {output}", next="wait for it to end, or give another --output"
        ) from None
    except OSError as error:
        raise unwritable(output, error) from error
    try:
        write_marker(output, about)
        yield
    finally:
        lock.release()


def refuse_foreign(output: Path) -> None:
    """Raise `OutputError` unless the folder is absent, empty or one of ours; writes nothing."""
    try:
        entries = {entry.name for entry in output.iterdir()}
    except FileNotFoundError:
        return
    except OSError as error:
        raise unwritable(output, error) from error
    if entries - {LOCK, MARKER + ".part"} and read_marker(output) is None:
        raise OutputError(
            f"the output folder {output} holds something else",
            expected=f"an empty folder, or one with a {MARKER} of an earlier build",
            found=", ".join(sorted(entries)[:5]) + (", …" if len(entries) > 5 else ""),
            next="give another --output",
        )


def read_marker(output: Path) -> Mapping[str, str] | None:
    """What `build.json` says, or None where it is not there or not ours."""
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
    """The same failure as the user's to mend."""
    return OutputError(
        f"the output folder {output} cannot be written",
        found=error.strerror or str(error),
        next="free some space, mend its permissions, or give another --output",
    )


def _part(folder: Path) -> Path:
    return folder.with_name(folder.name + ".part")


def _old(folder: Path) -> Path:
    return folder.with_name(folder.name + ".old")
