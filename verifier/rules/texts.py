# SPDX-License-Identifier: Apache-2.0
"""The docstring of a rule in parts: its first paragraph, and the sections under bold headings."""

from __future__ import annotations

import re

HEADINGS = ("What it does", "Why it happens", "Impact", "Fix")
_HEADING = re.compile(r"^\*\*([^*\n]+?)\.?\*\*\s*", re.MULTILINE)
_CODE = re.compile(r"``([^`]+)``")


def summary(doc: str) -> str:
    """Return the contract: what stands before the first section, in one line."""
    return " ".join(_HEADING.split(doc, maxsplit=1)[0].split())


def sections(doc: str) -> dict[str, str]:
    """Return the text of each section by its heading."""
    parts = _HEADING.split(doc)
    return {title: text.strip() for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def plain(text: str) -> str:
    """Return a text without markup: names in single backticks, one line."""
    return " ".join(_CODE.sub(r"`\1`", text).split())


def section(doc: str, heading: str) -> str:
    """Return one of the sections `HEADINGS` in one line, '' where a rule has none."""
    return plain(sections(doc).get(heading, ""))
