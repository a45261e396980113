# SPDX-License-Identifier: Apache-2.0
"""Renderers of one `verifier.findings.Report`. They know nothing about rules."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec

from verifier.errors import MissingExtra
from verifier.findings import Report
from verifier.report.concise import render_concise
from verifier.report.github import render_github
from verifier.report.json_ import render_json, schema
from verifier.report.markdown import render_markdown
from verifier.report.sarif import render_sarif
from verifier.report.text import render_text

__all__ = ["FORMATS", "REPORTERS", "render", "render_json", "render_text", "require", "schema"]


@dataclass(frozen=True, slots=True)
class Reporter:
    """A report format: what renders it, and the package that it needs ('' for none)."""

    render: Callable[[Report], str]
    package: str = ""


def _junit(report: Report) -> str:
    from verifier.report.junit import render_junit  # noqa: PLC0415  (an extra)

    return render_junit(report)


def _html(report: Report) -> str:
    from verifier.report.html import render_html  # noqa: PLC0415  (an extra)

    return render_html(report)


REPORTERS = {
    "text": Reporter(render_text),
    "concise": Reporter(render_concise),
    "json": Reporter(render_json),
    "junit": Reporter(_junit, package="junitparser"),
    "sarif": Reporter(render_sarif),
    "github": Reporter(render_github),
    "markdown": Reporter(render_markdown),
    "html": Reporter(_html, package="jinja2"),
}
FORMATS = tuple(REPORTERS)


def require(format_: str) -> None:
    """Raise `MissingExtra` if a format needs a package that is not installed."""
    package = REPORTERS[format_].package
    if package and find_spec(package) is None:
        raise MissingExtra(f"--format {format_}", "report")


def render(report: Report, format_: str, *, color: bool = False, verbose: bool = False) -> str:
    """Return the report in one of `FORMATS`; ``color`` and ``verbose`` apply to text only.

    Raises:
        MissingExtra: the format needs a package that is not installed.
    """
    require(format_)
    if format_ == "text":
        return render_text(report, color=color, verbose=verbose)
    return REPORTERS[format_].render(report)
