# SPDX-License-Identifier: Apache-2.0
"""The report for a person: findings by rule, then what was checked and what was not, then the
verdict.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial as bound
from itertools import groupby

from verifier.findings import SEVERITIES, Finding, Report
from verifier.report.wording import (
    MAX_PER_RULE,
    PARENTHESES,
    advice_line,
    amount,
    base_warning,
    baseline_line,
    by_engine,
    by_rules,
    causes_first,
    cell,
    explains_line,
    not_checked,
    observation,
    partial,
    places,
    remarks,
    remote_line,
    repair_line,
    skipped,
    verdict_line,
)
from verifier.text import counted, printable, size

MAX_KNOWN = 20
MAX_DETAILS = 3
"""Findings of one message whose observed and expected values are listed."""
_STYLE = {
    "error": "\x1b[1;31m",
    "warning": "\x1b[33m",
    "info": "\x1b[36m",
    "passed": "\x1b[1;32m",
    "failed": "\x1b[1;31m",
    "inconclusive": "\x1b[1;33m",
}
_PLAIN = "\x1b[0m"


def render_text(report: Report, *, color: bool = False, verbose: bool = False) -> str:
    """Return the report as lines of text.

    Args:
        report: the report.
        color: color severities and the verdict.
        verbose: list every finding and every skipped rule.
    """
    optional = {
        "partial": by_rules(partial(report)),
        "skipped": by_rules(skipped(report)) if verbose else "",
        "baseline": baseline_line(report),
        "remote": remote_line(report),
        "configuration": printable(report.summary.config or ""),
        "repair": repair_line(report),
    }
    lines = [*_engines(report), footer(report)]
    lines += [f"{label}: {text}" for label, text in optional.items() if text]
    lines += [f"not checked: {text}" for text in not_checked(report)]
    lines.append(f"verdict: {_styled(verdict_line(report), report.verdict, color)}")
    warning = base_warning(report)
    head = f"{_styled('base', 'warning', color)}    {warning}\n" if warning else ""
    return head + findings_of(report, color=color, verbose=verbose) + "\n".join(lines) + "\n"


def findings_of(report: Report, *, color: bool = False, verbose: bool = False) -> str:
    """Return the findings of a report as lines of text, each rule with its fix."""
    return findings_text(
        report.findings,
        bound(advice_line, report),
        color=color,
        limit=None if verbose else MAX_PER_RULE,
    )


def findings_text(
    findings: Iterable[Finding],
    advice: Callable[[str], str] = lambda _rule: "",
    *,
    color: bool = False,
    limit: int | None = MAX_PER_RULE,
) -> str:
    """Return findings as lines of text, the worst first, known ones last.

    Findings of one rule with the same message are one entry, with all their places. Those that
    follow from another finding are counted at that one, unless there is no limit.

    Args:
        findings: of a report.
        advice: returns how the findings of a rule are fixed, or ''.
        color: color the severities.
        limit: places to list per rule; None for all.
    """
    ordered = causes_first(findings)
    lines: list[str] = []
    new = [f for f in ordered if f.standing != "known"]
    causes = {f.fingerprint for f in new} if limit is not None else set()
    shown = [f for f in new if not f.explained_by or f.explained_by not in causes]
    for (_, rule), members in groupby(shown, key=lambda f: (f.severity, f.rule)):
        group = list(members)
        lines += _of_a_rule(rule, group, color, limit)
        explains = explains_line(group, new)
        if explains and limit is not None:
            explains += "; --verbose lists them"
        lines += [f"        {text}" for text in (explains, advice(rule)) if text]
    lines += _known([f for f in ordered if f.standing == "known"])
    return "".join(f"{line}\n" for line in lines)


def _of_a_rule(rule: str, findings: list[Finding], color: bool, limit: int | None) -> list[str]:
    by_message: dict[tuple[str, str], list[Finding]] = {}
    for f in findings:
        by_message.setdefault((f.message, f.standing), []).append(f)
    lines: list[str] = []
    left = len(findings) if limit is None else limit
    for group in by_message.values():
        if left > 0:
            lines += _entry(group, left, color)
        left -= len(group)
    if left < 0:
        more = counted(-left, "more finding")
        lines.append(f"        and {more} of {rule}; --verbose lists them")
    return lines


def _entry(findings: list[Finding], limit: int, color: bool) -> list[str]:
    """Return a headline over all findings of one message, the places of at most ``limit`` of them,
    and once what they have in common.
    """
    first = findings[0]
    severity = _styled(f"{first.severity:7}", first.severity, color)
    count = sum(f.count for f in findings)
    head = replace(first, count=count, of=max(first.of or 0, count))
    lines = [f"{severity} {_headline(head)}"]
    same = {(observation(f), *remarks(f)) for f in findings}
    for number, f in enumerate(findings[:limit]):
        shown = len(same) > 1 and number < MAX_DETAILS
        details = (observation(f), *remarks(f)) if shown else ()
        lines += [f"        {place}" for place in places(f)]
        lines += [f"        {text}" for text in details if text]
    common = next(iter(same)) if len(same) == 1 else ()
    return lines + [f"        {text}" for text in common if text]


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


def statistics(report: Report) -> str:
    """Return the number of findings per rule, worst and most frequent first, and the verdict."""
    counts: dict[tuple[int, str, str], int] = {}
    for f in report.findings:
        if f.standing != "known":
            key = (SEVERITIES.index(f.severity), f.severity, f.rule)
            counts[key] = counts.get(key, 0) + f.count
    titles = {c.rule: c.title for c in report.coverage}
    lines = [
        f"{count:>12,}  {rule:8}  {severity:7}  {printable(titles.get(rule, ''))}"
        for (rank, severity, rule), count in sorted(
            counts.items(), key=lambda item: (item[0][0], -item[1], item[0][2])
        )
    ]
    return "\n".join([*lines, f"verdict: {verdict_line(report)}"]) + "\n"
