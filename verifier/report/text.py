# SPDX-License-Identifier: Apache-2.0
"""The report for a person: findings by rule, then what was checked and what was not, then the
verdict.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby

from verifier.findings import Finding, Report
from verifier.report.wording import (
    MAX_PER_RULE,
    PARENTHESES,
    amount,
    base_warning,
    baseline_line,
    by_engine,
    by_rules,
    cell,
    location,
    not_checked,
    observation,
    partial,
    remarks,
    remote_line,
    skipped,
    verdict_line,
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
    """Return the report as lines of text; with ``color``, severities and the verdict are
    colored.
    """
    lines = [*_engines(report), footer(report)]
    optional = {
        "partial": by_rules(partial(report)),
        "skipped": by_rules(skipped(report)),
        "baseline": baseline_line(report),
        "remote": remote_line(report),
        "configuration": printable(report.summary.config or ""),
    }
    lines += [f"{label}: {text}" for label, text in optional.items() if text]
    lines += [f"not checked: {text}" for text in not_checked(report)]
    lines.append(f"verdict: {_styled(verdict_line(report), report.verdict, color)}")
    warning = base_warning(report)
    head = f"{_styled('base', 'warning', color)}    {warning}\n" if warning else ""
    return head + findings_text(report.findings, color=color) + "\n".join(lines) + "\n"


def findings_text(findings: Iterable[Finding], *, color: bool = False) -> str:
    """Return the findings as lines of text, the worst first, known ones last."""
    ordered = worst_first(findings)
    lines: list[str] = []
    new = [f for f in ordered if f.standing != "known"]
    for (_, rule), group in groupby(new, key=lambda f: (f.severity, f.rule)):
        lines += _of_a_rule(rule, list(group), color)
    lines += _known([f for f in ordered if f.standing == "known"])
    return "".join(f"{line}\n" for line in lines)


def _of_a_rule(rule: str, findings: list[Finding], color: bool) -> list[str]:
    lines = [line for f in findings[:MAX_PER_RULE] for line in _finding(f, color)]
    rest = len(findings) - MAX_PER_RULE
    if rest > 0:
        more = counted(rest, "more finding")
        lines.append(f"        and {more} of {rule}; --format json lists them")
    return lines


def _finding(f: Finding, color: bool) -> list[str]:
    severity = _styled(f"{f.severity:7}", f.severity, color)
    details = (location(f), observation(f), *remarks(f))
    return [f"{severity} {_headline(f)}", *(f"        {line}" for line in details if line)]


def _headline(f: Finding) -> str:
    count = amount(f)
    return f"{f.rule}  {printable(f.message)}{f'   {count}' if count else ''}"


def _known(findings: list[Finding]) -> list[str]:
    lines = [f"known   {_headline(f)} ({printable(f.note)})" for f in findings[:MAX_KNOWN]]
    rest = len(findings) - MAX_KNOWN
    return lines + ([f"        and {counted(rest, 'more known finding')}"] if rest > 0 else [])


def _engines(report: Report) -> list[str]:
    table = by_engine(report)
    if not table:
        return []
    engines = list(next(iter(table.values())))
    lines = [f"engines  {'  '.join(f'{e:12}' for e in engines).rstrip()}"]
    for rule, cells in table.items():
        lines.append(f"{rule:8} " + "  ".join(f"{cell(cells[e]):12}" for e in engines).rstrip())
        lines += [f"         {e}: {text}" for e in engines for text in cells[e][1][:3]]
    return [*lines, f"         {PARENTHESES}"]


def footer(report: Report) -> str:
    """Return what was checked, in one line."""
    contents = report.summary.contents
    if contents is None:
        return f"checked {printable(report.uri)}: nothing could be read"
    formats = ", ".join(f"{n:,} {name}" for name, n in sorted(contents.formats.items())) or "none"
    tensors, shards = counted(contents.tensors, "tensor"), counted(contents.shards, "shard")
    amounts = f"{tensors} in {shards}, {size(contents.bytes)}"
    if report.summary.scale_bytes_read:
        amounts += f", {size(report.summary.scale_bytes_read)} of scales read"
    return f"checked {_extent(report)}{amounts}; quantized modules: {formats}"


def _extent(report: Report) -> str:
    """Return which part of the checkpoint was checked, or '' for all of it."""
    options = report.summary.options
    if options is not None and options.sample:
        return f"a sample of {options.sample:g}% (seed {options.seed}) of "
    return f"subset {options.subset} of " if options is not None and options.subset else ""


def _styled(text: str, kind: str, color: bool) -> str:
    return f"{_STYLE[kind]}{text}{_PLAIN}" if color else text
