# SPDX-License-Identifier: Apache-2.0
"""The report as one line per finding, which begins with a path that terminals and editors open."""

from __future__ import annotations

import os

from verifier.findings import Finding, Report
from verifier.report.wording import amount, observation, verdict_line, worst_first
from verifier.text import printable


def render_concise(report: Report) -> str:
    """Return ``DIR/FILE: error QC501 message (3 of 98,304) NAME [row 12]`` for each finding, and
    the verdict.
    """
    lines = [_line(f, report.uri) for f in worst_first(report.findings)]
    lines.append(f"{printable(report.uri, 2000)}: {verdict_line(report)}")
    return "\n".join(lines) + "\n"


def _line(finding: Finding, uri: str) -> str:
    where = finding.where
    path = os.path.join(uri, where.file) if where.file else uri
    severity = "known" if finding.standing == "known" else finding.severity
    text = f"{printable(path, 2000)}: {severity} {finding.rule} {printable(finding.message)}"
    count = amount(finding)
    parts = [f"({count})" if count else "", _tensor(finding), observation(finding)]
    return " ".join([text, *(part for part in parts if part)])


def _tensor(finding: Finding) -> str:
    where = finding.where
    if not where.tensor:
        return ""
    indices = (("row", where.row), ("block", where.block))
    details = ", ".join(f"{label} {value:,}" for label, value in indices if value is not None)
    return printable(where.tensor) + (f" [{details}]" if details else "")
