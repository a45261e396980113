# SPDX-License-Identifier: Apache-2.0
"""What several renderers say in the same words. Every text that is returned is printable and
bounded.
"""

from __future__ import annotations

from collections.abc import Iterable

from verifier.findings import SEVERITIES, Effect, Finding, Report, Severity
from verifier.text import counted, printable

SHOWN_OF_A_RULE = 10
PARENTHESES = "(in parentheses: the rule's own severity; what the engine does is not known)"


def amount(finding: Finding) -> str:
    """Return ``3 of 98,304``, ``3``, or '' for one of one."""
    if finding.of and finding.of > 1:
        return f"{finding.count:,} of {finding.of:,}"
    return f"{finding.count:,}" if finding.count > 1 else ""


def place(finding: Finding) -> str:
    """Return the tensor or file with row, block and byte, or ''."""
    where = finding.where
    name = where.tensor or where.file
    if not name:
        return ""
    spots = [
        f"{label} {value:,}"
        for label, value in (("row", where.row), ("block", where.block), ("byte", where.byte))
        if value is not None
    ]
    if where.file and where.tensor:
        spots.append(f"{'of' if where.byte is not None else 'in'} {printable(where.file)}")
    return f"{printable(name)}{' [' + ', '.join(spots) + ']' if spots else ''}"


def seen(finding: Finding) -> str:
    """Return ``observed A, expected B``, or ''."""
    pairs = (("observed", finding.observed), ("expected", finding.expected))
    return ", ".join(f"{label} {printable(v, 160)}" for label, v in pairs if v)


def remarks(finding: Finding) -> list[str]:
    """Return where the severity comes from, and how the finding stands against the baseline."""
    lines = [printable(finding.because)] if finding.because else []
    if finding.standing:
        lines.append(f"{finding.standing}: {printable(finding.note)}")
    return lines


def sentence(finding: Finding) -> str:
    """Return a finding in one line: message, amount, place, what was seen, remarks."""
    parts = [
        printable(finding.message),
        amount(finding),
        place(finding),
        seen(finding),
        *remarks(finding),
    ]
    return "; ".join(p for p in parts if p)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return new and grown findings before known ones, each by severity; the order within stays."""
    return sorted(findings, key=lambda f: (f.standing == "known", SEVERITIES.index(f.severity)))


def verdict(report: Report) -> str:
    """Return ``FAILED (1 error, 0 warnings, 3 known; why)``."""
    parts = [counted(report.count("error"), "error"), counted(report.count("warning"), "warning")]
    known = sum(f.standing == "known" for f in report.findings)
    if known:
        parts.append(f"{known:,} known")
    why = why_not(report)
    return f"{report.verdict.upper()} ({', '.join(parts)}{f'; {why}' if why else ''})"


def why_not(report: Report) -> str:
    """Return why a verdict is inconclusive or an error, or ''."""
    return printable(str(report.stats.get("inconclusive") or report.stats.get("error") or ""))


def not_run(report: Report) -> list[tuple[str, list[str]]]:
    """Return (reason, rules) for what did not run, and for what ran over a part only."""
    groups: dict[str, list[str]] = {}
    for c in report.coverage:
        if not c.ran:
            groups.setdefault(printable(c.reason), []).append(c.rule)
        elif c.checked < c.of:
            groups.setdefault(
                printable(f"on {c.of - c.checked:,} of {c.of:,} {c.unit}: {c.reason}"), []
            ).append(c.rule)
    return list(groups.items())


def about_baseline(report: Report) -> str:
    """Return what the baseline came to in one line, or '' without one."""
    found = report.stats.get("baseline")
    if not found:
        return ""
    stale = found["stale"]
    text = f"{printable(found['file'])}: {found['known']:,} known, {found['grown']:,} grown, {len(stale):,} stale"
    if stale:
        first = ", ".join(printable(f"{e['rule']} {e['what']}", 80) for e in stale[:3])
        text += f" (`ckptgate baseline prune` drops them: {first}{', …' if len(stale) > 3 else ''})"
    return text + (
        f"; {found['not_judged']:,} of rules that did not judge all" if found["not_judged"] else ""
    )


def by_engine(report: Report) -> dict[str, dict[str, tuple[Severity, list[str]]]]:
    """Return rule -> engine -> (its worst severity there, what the engine does); empty unless the
    profile is ``all``.
    """
    if report.stats.get("options", {}).get("profile") != "all":
        return {}
    table: dict[str, dict[str, tuple[Severity, list[str]]]] = {}
    for finding in report.findings:
        for effect in finding.effects:
            cells = table.setdefault(finding.rule, {})
            severity, what = cells.get(effect.engine, (effect.severity, []))
            cells[effect.engine] = (
                min(severity, effect.severity, key=SEVERITIES.index),
                _with(what, effect),
            )
    return table


def cell(found: tuple[Severity, list[str]]) -> str:
    """Return a severity of `by_engine`; in parentheses where it is the rule's, nothing being known
    of the engine.
    """
    return found[0] if found[1] else f"({found[0]})"


def _with(what: list[str], effect: Effect) -> list[str]:
    text = printable(effect.what)
    return what if not text or text in what else [*what, text]
