"""In: what a checkpoint says of its license. Out: a `License`.

Guaranteed: nothing is guessed: a checkpoint whose card names no license has none here; a card that cannot be read is
one that says nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from builder.checkpoint.files import CARD
from builder.util.json_files import MAX_TEXT

MOST = 200  # characters of a name or an address
# The hub's names of licenses, and SPDX's where they are not the same but for the case.
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
    """A checkpoint's license.

    Args:
        id: the hub's name for it, `apache-2.0`; `other` where `name` says which; None where nothing is said.
        link: an address, or a file of the checkpoint.
        base: the hub ids of the models that the checkpoint says it was made from.
        files: licenses and notices that lie beside it.
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
    """What the files in `folder` say (see `builder.stages.fetch`, `notices/`); the folder may be missing."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    files = tuple(name for name in names if name.casefold() != CARD)
    cards = [name for name in names if name.casefold() == CARD]
    told = _metadata(folder / cards[0]) if cards else {}
    kind, name, link = (_text(told.get(key)) for key in ("license", "license_name", "license_link"))
    return License(kind, name, link, _base(told.get("base_model")), files)


def _metadata(card: Path) -> Mapping[str, Any]:
    from huggingface_hub import metadata_load

    if card.stat().st_size > MAX_TEXT:
        return {}
    try:
        return metadata_load(card) or {}
    except Exception:  # of the YAML reader, of the decoder: somebody's text is no reason to end a build
        return {}


def _base(found: Any) -> tuple[str, ...]:
    listed = found if isinstance(found, list) else [found]
    return tuple(one for one in map(_text, listed[:8]) if one and one.count("/") == 1 and " " not in one)


def _text(value: Any) -> str | None:
    if not isinstance(value, str) or not value.strip() or not value.isprintable():
        return None
    return value.strip()[:MOST]
