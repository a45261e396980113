# SPDX-License-Identifier: Apache-2.0
"""The report as workflow commands of GitHub Actions: annotations of the worst findings, and the
verdict as a line.

GitHub shows about ten annotations of each level per step and silently drops the rest; the step
summary holds more.
"""

from __future__ import annotations

from verifier.findings import Finding, Report
from verifier.report.wording import reason, sentence, verdict_line, worst_first
from verifier.text import counted, printable

MAX_ANNOTATIONS = 10
_COMMAND = {"error": "error", "warning": "warning", "info": "notice"}


def render_github(report: Report) -> str:
    """Return one line for each annotation, at most `MAX_ANNOTATIONS`, and a last line with the
    verdict.
    """
    titles = {c.rule: c.title for c in report.coverage}
    lines = []
    if report.verdict in ("inconclusive", "error"):
        message = reason(report) or report.verdict
        lines.append(_command("error", f"ckptgate: {report.verdict}", message))
    new = [f for f in worst_first(report.findings) if f.standing != "known"]
    annotated = new[: MAX_ANNOTATIONS - len(lines)]
    lines += [_annotation(f, titles.get(f.rule, "")) for f in annotated]
    if len(new) > len(annotated):
        lines.append(f"{counted(len(new) - len(annotated), 'more finding')} without an annotation")
    lines.append(f"verdict: {verdict_line(report)}")
    return "\n".join(lines) + "\n"


def _annotation(finding: Finding, title: str) -> str:
    return _command(
        _COMMAND[finding.severity], f"{finding.rule} {printable(title)}".strip(), sentence(finding)
    )


def _command(command: str, title: str, message: str) -> str:
    return f"::{command} title={_property(title)}::{_data(message)}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
