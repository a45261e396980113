# SPDX-License-Identifier: Apache-2.0
"""The report as GitHub-flavored Markdown, for a step summary or a comment. GitHub takes 1 MiB."""

from __future__ import annotations

import re
from collections.abc import Sequence

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
    location,
    not_checked,
    observation,
    partial,
    remarks,
    repair_line,
    skipped,
    verdict_line,
)
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
        f"{code(report.uri, 2000)}: {_words(verdict_line(report))}",
        "",
    ]
    if base_warning(report):
        lines += [f"**{_words(base_warning(report))}**", ""]
    ordered = causes_first(report.findings)
    own = [f for f in ordered if not f.explained_by]
    following = [f for f in ordered if f.explained_by]
    lines += _table(own[:rows], following)
    lines += _fixes(report)
    if folded := following[: max(0, rows - len(own))]:
        summary = f"{counted(len(folded), 'finding')} that these explain"
        lines += [f"<details><summary>{summary}</summary>", "", *_table(folded), "</details>", ""]
    if len(ordered) > rows:
        lines += [f"{counted(len(ordered) - rows, 'more finding')} not shown.", ""]
    lines += _engines(report)
    lines += [_words(footer(report)), ""]
    left_out = [f"* {_words(text)}" for text in not_checked(report)]
    lines += ["Not checked:", "", *left_out, ""] if left_out else []
    lines += _rules("Partly checked", partial(report))
    lines += _rules("Skipped", skipped(report))
    baseline = baseline_line(report)
    if baseline:
        lines += [f"Baseline {_words(baseline)}", ""]
    return "\n".join(lines)


def _fixes(report: Report) -> list[str]:
    """Return how the findings of each rule are fixed, as a list."""
    rules = dict.fromkeys(
        f.rule for f in report.findings if f.standing != "known" and not f.explained_by
    )
    fixes = [(rule, advice_line(report, rule)) for rule in rules]
    rows = [f"* {_words(rule)}: {_words(text)}" for rule, text in fixes if text]
    repair = repair_line(report)
    rows += [f"* {_words(repair)}"] if repair else []
    return [*rows, ""] if rows else []


def code(text: str, limit: int = 400) -> str:
    """Return text as a code span, in which Markdown reads nothing; a pipe is escaped for tables."""
    safe = printable(text, limit).replace("|", "\\|")
    longest = max((len(run) for run in re.findall("`+", safe)), default=0)
    fence = "`" * (longest + 1)
    pad = " " if longest or not safe.strip() else ""
    return f"{fence}{pad}{safe}{pad}{fence}"


def _words(text: str) -> str:
    return text if _PLAIN.fullmatch(text) else code(text, 2000)


def _table(findings: Sequence[Finding], following: Sequence[Finding] = ()) -> list[str]:
    """Return a table of findings, each with what it explains of those that follow from others."""
    if not findings:
        return []
    head = ["| severity | rule | finding | amount | where |", "| --- | --- | --- | --- | --- |"]
    return [*head, *(_row(f, explains_line([f], following)) for f in findings), ""]


def _row(f: Finding, explains: str) -> str:
    details = (observation(f), *remarks(f), explains)
    texts = [printable(f.message), *(t for t in details if t)]
    severity = f"{f.severity} (known)" if f.standing == "known" else f.severity
    where = code(location(f), 900) if location(f) else ""
    cells = (severity, _words(f.rule), "<br>".join(map(_words, texts)), amount(f), where)
    return f"| {' | '.join(cells)} |"


def _rules(title: str, groups: list[tuple[str, list[str]]]) -> list[str]:
    if not groups:
        return []
    rows = [f"* {_words(why)}: {_words(' '.join(rules))}" for why, rules in groups]
    return [f"{title}:", "", *rows, ""]


def _engines(report: Report) -> list[str]:
    table = by_engine(report)
    if not table:
        return []
    engines = list(next(iter(table.values())))
    lines = [f"| rule | {' | '.join(engines)} |", f"| --- |{' --- |' * len(engines)}"]
    for rule, cells in table.items():
        texts = ["<br>".join([cell(cells[e]), *map(_words, cells[e][1][:3])]) for e in engines]
        lines.append(f"| {_words(rule)} | {' | '.join(texts)} |")
    return [*lines, "", PARENTHESES, ""]
