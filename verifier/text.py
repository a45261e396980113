# SPDX-License-Identifier: Apache-2.0
"""Text for people: escaped names, counts with their noun, sizes, percentages, short lists, and JSON
values in JSON's words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable

_ES = re.compile(r"(s|x|z|ch|sh)$")


def printable(text: str, limit: int = 400) -> str:
    """Return text with control characters escaped, cut at ``limit`` characters.

    Names come from files and may be hostile.
    """
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def counted(count: int, noun: str) -> str:
    """Return ``1 error``, ``2 errors``, ``3 entries`` or ``4 prefixes``; the last word takes the
    plural.
    """
    return f"{count:,} {noun if count == 1 else plural(noun)}"


def plural(noun: str) -> str:
    """Return a regular noun in the plural."""
    if noun.endswith("y") and noun[-2:-1] not in "aeou":
        return f"{noun[:-1]}ies"
    return f"{noun}es" if _ES.search(noun) else f"{noun}s"


def size(count: int) -> str:
    """Return a number of bytes in decimal units: ``512 B``, ``25.8 GB``."""
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 999.95 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"


def percentage(count: int, of: int) -> str:
    """Return a part in percent; ``0%`` is none and ``100%`` is all, never nearly so."""
    if not of or count in (0, of):
        return "0%" if not count else "100%"
    value = 100 * count / of
    return "<0.01%" if value < 0.01 else (">99.99%" if value > 99.99 else f"{value:.2f}%")


def listed(names: Iterable[str], limit: int = 8) -> str:
    """Return ``a, b, c and 4 more``; at most ``limit`` names."""
    texts = list(names)
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f" and {rest:,} more" if rest > 0 else "")


def json_type(value: object) -> str:
    """Return what a parsed JSON value is: ``an object``, ``an array``, ``null`` …"""
    if value is None:
        return "null"
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return names.get(type(value), "a number")


def json_text(value: object, limit: int = 80) -> str:
    """Return a parsed JSON value as JSON, of at most ``limit`` characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else f"{text[: limit - 1]}…"
