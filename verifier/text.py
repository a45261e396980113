# SPDX-License-Identifier: Apache-2.0
"""Text for people: escaped names, counts with their noun, JSON values in JSON's words."""

from __future__ import annotations

import json


def printable(text: str, limit: int = 400) -> str:
    """Return text with control characters escaped and a bounded length; names come from files and
    may be hostile.
    """
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def counted(count: int, what: str) -> str:
    """Return ``1 error`` or ``2 errors``."""
    return f"{count:,} {what}{'s' * (count != 1)}"


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
