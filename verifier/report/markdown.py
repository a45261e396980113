# SPDX-License-Identifier: Apache-2.0
"""The report as GitHub-flavoured Markdown, for a step summary or a comment; bounded to fit the 1
MiB of a summary.
"""

from __future__ import annotations

import re

from verifier.findings import Finding, Report
from verifier.report.parts import (
    PARENTHESES,
    about_baseline,
    amount,
    by_engine,
    cell,
    not_run,
    place,
    remarks,
    seen,
    verdict,
    worst_first,
)
from verifier.report.text import footer
from verifier.text import counted, printable

MAX_BYTES = 900_000
MAX_ROWS = 500
# Words that mean nothing to Markdown, GitHub's mentions and its automatic links.
_PLAIN = re.compile(r"(?!.*(?:www\.|://))[A-Za-z0-9 ,;:.()'/%+=…_-]*")


def render_markdown(report: Report) -> str:
    """Return the report as Markdown; what does not fit is counted."""
    rows = MAX_ROWS
    while True:
        text = _render(report, rows)
        if len(text.encode("utf-8", "backslashreplace")) <= MAX_BYTES or not rows:
            return text
        rows //= 2


def _render(report: Report, rows: int) -> str:
    lines = [
        f"## ckptgate: {report.verdict}",
        "",
        f"{code(report.uri, 2000)}: {_words(verdict(report))}",
        "",
    ]
    ordered = worst_first(report.findings)
    if ordered[:rows]:
        lines += [
            "| severity | rule | finding | amount | where |",
            "| --- | --- | --- | --- | --- |",
        ]
        lines += [_row(f) for f in ordered[:rows]]
        lines.append("")
    if len(ordered) > rows:
        lines += [f"{counted(len(ordered) - rows, 'more finding')} not shown.", ""]
    lines += _engines(report)
    lines += [_words(footer(report)), ""]
    skipped = not_run(report)
    if skipped:
        lines += [
            "Not run:",
            "",
            *(f"* {_words(why)}: {_words(' '.join(rules))}" for why, rules in skipped),
            "",
        ]
    if about := about_baseline(report):
        lines += [f"Baseline {_words(about)}", ""]
    return "\n".join(lines)


def code(text: str, limit: int = 400) -> str:
    """Return text as a code span, in which Markdown reads nothing; a pipe is escaped for tables."""
    safe = printable(text, limit).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", safe)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not safe.strip() else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def _words(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else code(text, 2000)


def _row(f: Finding) -> str:
    told = [_words(printable(f.message)), *(_words(t) for t in (seen(f), *remarks(f)) if t)]
    severity = f"{f.severity} (known)" if f.standing == "known" else f.severity
    where = place(f)
    return f"| {severity} | {_words(f.rule)} | {'<br>'.join(told)} | {amount(f)} | {code(where, 900) if where else ''} |"


def _engines(report: Report) -> list[str]:
    table = by_engine(report)
    if not table:
        return []
    engines = list(next(iter(table.values())))
    lines = [f"| rule | {' | '.join(engines)} |", f"| --- |{' --- |' * len(engines)}"]
    for rule, cells in table.items():
        shown = ["<br>".join([cell(cells[e]), *map(_words, cells[e][1][:3])]) for e in engines]
        lines.append(f"| {_words(rule)} | {' | '.join(shown)} |")
    return [*lines, "", PARENTHESES, ""]
