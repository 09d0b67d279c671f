"""The rooms of builder/ and the files in them."""

from __future__ import annotations

from tests.helpers.processes import ROOT

# From top to bottom; a room imports only rooms after it.
ROOMS = (
    "cli",
    "stages",
    "verify",
    "bundle",
    "targets",
    "graph",
    "quantization",
    "reference",
    "checkpoint",
    "util",
)
FILES = {
    file.relative_to(ROOT).as_posix(): file
    for package in ("builder", "patches")
    for file in sorted((ROOT / package).rglob("*.py"))
}
