# SPDX-License-Identifier: Apache-2.0
"""Renderers of one `verifier.findings.Report`. They know nothing about rules."""

from __future__ import annotations

import importlib
from importlib.util import find_spec

from verifier.errors import MissingExtra
from verifier.findings import Report
from verifier.report.json_ import render_json, schema
from verifier.report.text import render_text
from verifier.text import printable

__all__ = ["FORMATS", "printable", "render", "render_json", "render_text", "require", "schema"]

FORMATS = ("text", "json", "junit", "sarif", "github", "markdown", "html")
_NEEDS = {"junit": "junitparser", "html": "jinja2"}


def require(format_: str) -> None:
    """Raise `MissingExtra` where a format needs a package that is not installed."""
    module = _NEEDS.get(format_)
    if module and find_spec(module) is None:
        raise MissingExtra(f"--format {format_}", "report")


def render(report: Report, format_: str, *, color: bool = False) -> str:
    """Return the report in one of `FORMATS`; ``color`` is for text alone.

    Raises:
        MissingExtra: the format needs a package that is not installed.
    """
    if format_ == "text":
        return render_text(report, color=color)
    require(format_)
    module = importlib.import_module(f"verifier.report.{'json_' if format_ == 'json' else format_}")
    text: str = getattr(module, f"render_{format_}")(report)
    return text
