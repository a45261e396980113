# SPDX-License-Identifier: Apache-2.0
"""Text for people: escaped names, counts with their noun."""

from __future__ import annotations


def printable(text: str, limit: int = 400) -> str:
    """Return text with control characters escaped and a bounded length; names come from files and
    may be hostile.
    """
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def counted(count: int, what: str) -> str:
    """Return ``1 error`` or ``2 errors``."""
    return f"{count:,} {what}{'s' * (count != 1)}"
