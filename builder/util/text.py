"""Format numbers, and make untrusted text safe and short enough to print."""

from __future__ import annotations

import math
import re
import unicodedata

NAME = 160  # characters of a name

# Control characters, and those that change the direction of the text around them.
_UNSEEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def figure(value: float) -> str:
    """Format a number: `4.0e-06`, `0.5`, `1,204`."""
    if not math.isfinite(value):
        return str(value)
    if 0 < abs(value) < 1e-2 or abs(value) >= 1e7:
        return f"{value:.1e}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.3g}"


def clean(text: object) -> str:
    """Replace control characters and direction marks, which would change the text around them."""
    return _UNSEEN.sub("\ufffd", unicodedata.normalize("NFC", str(text)))


def cut(text: str, length: int) -> str:
    """Cut text to at most `length` characters."""
    return text if len(text) <= length else text[: length - 1] + "…"


def code(text: object, length: int = NAME) -> str:
    """Return a name for Markdown, literally.

    Inside `<code>` nothing is a mention, and punctuation written as entities is not markup.
    """
    words = " ".join(clean(cut(str(text), length)).split())
    if not words:
        return ""
    shown = "".join(c if c.isalnum() or c in " " or ord(c) > 127 else f"&#{ord(c)};" for c in words)
    return f"<code>{shown}</code>"
