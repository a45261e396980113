# SPDX-License-Identifier: Apache-2.0
"""The report as one HTML file: no script, nothing fetched, at most 2 MB."""

from __future__ import annotations

from functools import partial
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined

from verifier import __version__
from verifier.findings import Finding, Report
from verifier.report.text import footer
from verifier.report.wording import (
    PARENTHESES,
    advice_line,
    amount,
    base_warning,
    baseline_line,
    by_engine,
    causes_first,
    cell,
    explains_line,
    not_checked,
    observation,
    places,
    remarks,
    repair_line,
    verdict_line,
)
from verifier.text import counted, printable

MAX_BYTES = 2_000_000
MAX_FINDINGS = 2_000
MAX_RULES = 500


def render_html(report: Report) -> str:
    """Return the page; findings that would make it larger than `MAX_BYTES` are counted instead."""
    source = (
        resources.files(__name__.rpartition(".")[0]) / "templates" / "report.html.j2"
    ).read_text(encoding="utf-8")
    environment = Environment(
        loader=DictLoader({"report": source}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"printable": printable, "cell": cell, "counted": counted}
    template = environment.get_template("report")
    rows = MAX_FINDINGS
    while True:
        page = template.render(_values(report, rows)) + "\n"
        if len(page.encode("utf-8")) <= MAX_BYTES or not rows:
            return page
        rows //= 2


def _values(report: Report, rows: int) -> dict[str, Any]:
    ordered = causes_first(report.findings)
    # Findings that follow from another come last, but none is ever left out before the others.
    ordered.sort(key=lambda f: bool(f.explained_by))
    table = by_engine(report)
    return {
        "report": report,
        "version": __version__,
        "verdict": verdict_line(report),
        "groups": _groups(ordered[:rows], {f.fingerprint: f.rule for f in ordered}),
        "titles": {c.rule: c.title for c in report.coverage},
        "advice": report.summary.advice,
        "fix": partial(advice_line, report),
        "base_warning": base_warning(report),
        "repair": repair_line(report),
        "hidden": max(0, len(ordered) - rows),
        "footer": footer(report),
        "not_checked": not_checked(report),
        "baseline": baseline_line(report),
        "coverage": report.coverage[:MAX_RULES],
        "hidden_rules": max(0, len(report.coverage) - MAX_RULES),
        "table": table,
        "parentheses": PARENTHESES,
        "engines": list(next(iter(table.values()))) if table else [],
        "options": report.summary.options_json(),
    }


def _groups(findings: list[Finding], rules: dict[str, str]) -> list[dict[str, Any]]:
    """Return the findings by severity, rule, and the rule of what explains them.

    Args:
        findings: in the order of the page.
        rules: the rule of each fingerprint.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for f in findings:
        severity = "known" if f.standing == "known" else f.severity
        groups.setdefault((severity, f.rule, rules.get(f.explained_by, "")), []).append(f)
    return [
        {
            "severity": severity,
            "rule": rule,
            "cause": cause,
            "explains": explains_line(members, findings),
            "findings": [
                {
                    "message": f.message,
                    "amount": amount(f),
                    "places": places(f),
                    "details": [t for t in (observation(f), *remarks(f)) if t],
                    "fingerprint": f.fingerprint,
                }
                for f in members
            ],
        }
        for (severity, rule, cause), members in groups.items()
    ]
