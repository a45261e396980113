# SPDX-License-Identifier: Apache-2.0
"""Hooks of mkdocs: pages link to files of the repository, which a site does not have."""

from __future__ import annotations

import re
from typing import Any

_OUTSIDE = re.compile(r"\[([^\]\n]+)\]\(\.\./([^)\s]+)\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Return a page with its links out of docs/ as text: title, and path in the repository."""
    return _OUTSIDE.sub(_as_text, markdown)


def _as_text(link: re.Match[str]) -> str:
    title, path = link[1], link[2]
    return f"`{path}`" if path.strip("/").endswith(title.strip("`/")) else f"{title} (`{path}`)"
