"""Read the license of a checkpoint from its model card.

Nothing is guessed: without a license in a readable card, the license is unknown.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint.files import CARD
from builder.util.json_files import MAX_TEXT

MOST = 200  # characters of a name or an address
# The hub's names of licenses → SPDX ids.
SPDX = {
    "apache-2.0": "Apache-2.0",
    "mit": "MIT",
    "bsd-2-clause": "BSD-2-Clause",
    "bsd-3-clause": "BSD-3-Clause",
    "cc-by-4.0": "CC-BY-4.0",
    "cc-by-sa-4.0": "CC-BY-SA-4.0",
    "cc-by-nc-4.0": "CC-BY-NC-4.0",
    "cc-by-nc-sa-4.0": "CC-BY-NC-SA-4.0",
    "cc0-1.0": "CC0-1.0",
    "gpl-3.0": "GPL-3.0-only",
    "agpl-3.0": "AGPL-3.0-only",
    "mpl-2.0": "MPL-2.0",
}


@dataclass(frozen=True)
class License:
    """License of a checkpoint.

    Args:
        id: the hub's name, e.g. `apache-2.0`; `other` for one that `name` names; None if unknown.
        link: a URL, or a file of the checkpoint.
        base: hub ids of the models that the card names as base models.
        files: license files and notices of the checkpoint.
    """

    id: str | None = None
    name: str | None = None
    link: str | None = None
    base: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def spdx(self) -> str | None:
        return SPDX.get(self.id or "")


def read_license(folder: Path) -> License:
    """Read the license from the notices in `folder` (see `builder.stages.fetch`), which may be missing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files = tuple(name for name in names if name.casefold() != CARD)
    cards = [name for name in names if name.casefold() == CARD]
    metadata = _metadata(folder / cards[0]) if cards else {}
    kind, name, link = (_text(metadata.get(key)) for key in ("license", "license_name", "license_link"))
    return License(kind, name, link, _base(metadata.get("base_model")), files)


def _metadata(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    if card.stat().st_size > MAX_TEXT:
        return {}
    try:
        return metadata_load(card) or {}
    except Exception:  # of the YAML parser or the decoder: a malformed card must not end a build
        return {}


def _base(value: Any) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(name for name in map(_text, values[:8]) if name and name.count("/") == 1 and " " not in name)


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        return None
    return value.strip()[:MOST]
