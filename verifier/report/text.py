# SPDX-License-Identifier: Apache-2.0
"""The report for a person: findings by rule, then what was and was not examined, then the
verdict.
"""

from __future__ import annotations

from itertools import groupby

from verifier.findings import Finding, Report
from verifier.report.parts import (
    PARENTHESES,
    SHOWN_OF_A_RULE,
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
from verifier.text import counted, printable, size

MAX_KNOWN = 20
_STYLE = {
    "error": "\x1b[1;31m",
    "warning": "\x1b[33m",
    "info": "\x1b[36m",
    "passed": "\x1b[1;32m",
    "failed": "\x1b[1;31m",
    "inconclusive": "\x1b[1;33m",
}
_PLAIN = "\x1b[0m"


def render_text(report: Report, *, color: bool = False) -> str:
    """Return the report as lines of text; with ``color``, severities and verdict in ANSI
    colours.
    """
    lines: list[str] = []
    ordered = worst_first(report.findings)
    new = [f for f in ordered if f.standing != "known"]
    for rule, findings in groupby(new, key=lambda f: (f.severity, f.rule)):
        lines += _of_a_rule(rule[1], list(findings), color)
    lines += _known([f for f in ordered if f.standing == "known"])
    lines += _engines(report)
    lines.append(footer(report))
    skipped = not_run(report)
    if skipped:
        lines.append(
            "not run: " + "; ".join(f"{' '.join(rules)} ({why})" for why, rules in skipped)
        )
    if about := about_baseline(report):
        lines.append(f"baseline: {about}")
    if config := report.stats.get("options", {}).get("config"):
        lines.append(f"configuration: {printable(str(config))}")
    lines.append(f"verdict: {_styled(verdict(report), report.verdict, color)}")
    return "\n".join(lines) + "\n"


def _of_a_rule(rule: str, findings: list[Finding], color: bool) -> list[str]:
    lines = [line for f in findings[:SHOWN_OF_A_RULE] for line in _finding(f, color)]
    rest = len(findings) - SHOWN_OF_A_RULE
    if rest > 0:
        lines.append(f"        and {rest} more findings of {rule}; --format json lists them")
    return lines


def _finding(f: Finding, color: bool) -> list[str]:
    much = amount(f)
    head = f"{_styled(f'{f.severity:7}', f.severity, color)} {f.rule}  {printable(f.message)}{'   ' + much if much else ''}"
    return [head, *(f"        {line}" for line in (place(f), seen(f), *remarks(f)) if line)]


def _known(findings: list[Finding]) -> list[str]:
    lines = [
        f"known   {f.rule}  {printable(f.message)}{'   ' + amount(f) if amount(f) else ''} ({printable(f.note)})"
        for f in findings[:MAX_KNOWN]
    ]
    if len(findings) > MAX_KNOWN:
        lines.append(f"        and {len(findings) - MAX_KNOWN} more known findings")
    return lines


def _engines(report: Report) -> list[str]:
    table = by_engine(report)
    if not table:
        return []
    engines = list(next(iter(table.values())))
    lines = [f"engines  {'  '.join(f'{e:12}' for e in engines).rstrip()}"]
    for rule, cells in table.items():
        lines.append(f"{rule:8} " + "  ".join(f"{cell(cells[e]):12}" for e in engines).rstrip())
        lines += [f"         {e}: {what}" for e in engines for what in cells[e][1][:3]]
    return [*lines, f"         {PARENTHESES}"]


def footer(report: Report) -> str:
    """Return what was examined, in one line."""
    s = report.stats
    if "tensors" not in s:
        return f"checked {printable(report.uri)}: nothing could be read"
    formats = ", ".join(f"{n:,} {a}" for a, n in sorted(s["formats"].items())) or "none"
    payload = any(c.ran and "scales" in c.unit for c in report.coverage)
    scales = f", {size(s['scale_bytes'])} of scales read" if payload else ""
    amounts = f"{counted(s['tensors'], 'tensor')} in {counted(s['shards'], 'shard')}, {size(s['bytes'])}"
    options = s.get("options", {})
    of = f"subset {options['subset']} of " if options.get("subset") else ""
    if options.get("sample"):
        of = f"by a sample of {options['sample']:g}% (seed {options['seed']}), "
    return f"checked {of}{amounts}{scales}; quantized modules: {formats}"


def _styled(text: str, kind: str, color: bool) -> str:
    return f"{_STYLE[kind]}{text}{_PLAIN}" if color else text
