# SPDX-License-Identifier: Apache-2.0
"""Phrases that several renderers share. Every returned text is printable and bounded."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterable

from verifier.findings import SEVERITIES, Effect, Finding, Report, Severity
from verifier.inspect.names import gathered
from verifier.text import counted, listed, printable, size

MAX_RANGES = 3
MAX_PER_RULE = 10
"""How many findings of one rule a text report shows."""
_NEEDS = "needs "
PARENTHESES = "(in parentheses: the rule's default severity; the engine's behavior is not known)"


def amount(finding: Finding) -> str:
    """Return ``3 of 98,304``, ``3``, or '' for one of one."""
    if finding.of and finding.of > 1:
        return f"{finding.count:,} of {finding.of:,}"
    return f"{finding.count:,}" if finding.count > 1 else ""


def location(finding: Finding) -> str:
    """Return the tensor or file with row, block and byte, or ''."""
    where = finding.where
    name = where.tensor or where.file
    if not name:
        return ""
    indices = (("row", where.row), ("block", where.block), ("byte", where.byte))
    details = [f"{label} {value:,}" for label, value in indices if value is not None]
    if where.file and where.tensor:
        details.append(f"{'of' if where.byte is not None else 'in'} {printable(where.file)}")
    return f"{printable(name)}{' [' + ', '.join(details) + ']' if details else ''}"


def places(finding: Finding) -> list[str]:
    """Return where a finding is: its tensors with layer and expert numbers as ranges; before them
    the first location, where that has a row, block or byte.
    """
    first, ranges = location(finding), [names.label for names in gathered(finding.places)]
    if not ranges:
        return [first] if first else []
    folded = listed((printable(text) for text in ranges), MAX_RANGES)
    where = finding.where
    exact = any(value is not None for value in (where.row, where.block, where.byte))
    return [first, f"in {folded}"] if exact else [folded]


def observation(finding: Finding) -> str:
    """Return ``observed A, expected B``, or ''."""
    pairs = (("observed", finding.observed), ("expected", finding.expected))
    return ", ".join(f"{label} {printable(value, 160)}" for label, value in pairs if value)


def remarks(finding: Finding) -> list[str]:
    """Return why the severity differs from the rule's default, and what the baseline says."""
    lines = [printable(finding.because)] if finding.because else []
    if finding.standing:
        lines.append(f"{finding.standing}: {printable(finding.note)}")
    return lines


def sentence(finding: Finding) -> str:
    """Return a finding in one line: message, amount, location, observation, remarks."""
    parts = [
        printable(finding.message),
        amount(finding),
        location(finding),
        observation(finding),
        *remarks(finding),
    ]
    return "; ".join(p for p in parts if p)


def worst_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return new and grown findings before known ones, each by severity; the order within stays."""
    return sorted(findings, key=lambda f: (f.standing == "known", SEVERITIES.index(f.severity)))


def causes_first(findings: Iterable[Finding]) -> list[Finding]:
    """Return `worst_first` with the rules that explain other findings first among equally severe
    ones.
    """
    ordered = worst_first(findings)
    causes = {f.explained_by for f in ordered if f.explained_by}
    rules = {f.rule for f in ordered if f.fingerprint in causes}
    return worst_first(sorted(ordered, key=lambda f: f.rule not in rules))


def explains_line(causes: Iterable[Finding], findings: Iterable[Finding]) -> str:
    """Return ``explains 24 findings of QC205, QC207``, or ''."""
    own = {f.fingerprint for f in causes if f.fingerprint}
    rules = [f.rule for f in findings if f.explained_by in own]
    names = listed(printable(rule, 20) for rule in sorted(set(rules)))
    return f"explains {counted(len(rules), 'finding')} of {names}" if rules else ""


def verdict_line(report: Report) -> str:
    """Return ``FAILED at depth header (1 error, 0 warnings; reason; 50 rules; 25 more need
    --depth payload)``, without the findings where a check passed and has none.
    """
    parts = [_findings(report), reason(report), *_extent(report)]
    options = report.summary.options
    depth = f" at depth {options.depth}" if options is not None else ""
    return f"{report.verdict.upper()}{depth} ({'; '.join(p for p in parts if p)})"


def _findings(report: Report) -> str:
    """Return the number of findings by severity, '' where a check passed without any."""
    errors, warnings = report.count("error"), report.count("warning")
    known = sum(f.standing == "known" for f in report.findings)
    if report.verdict == "passed" and not (errors or warnings or known):
        return ""
    parts = [counted(errors, "error"), counted(warnings, "warning")]
    return ", ".join([*parts, f"{known:,} known"] if known else parts)


def _extent(report: Report) -> list[str]:
    """Return how many rules ran, what the others need, and what part of the checkpoint was read."""
    parts = []
    if report.coverage:
        parts = [counted(sum(c.ran for c in report.coverage), "rule"), *_not_run(report)]
    options = report.summary.options
    if options is not None and options.sample:
        parts.append(f"a sample of {options.sample:g}%")
    if options is not None and options.subset:
        parts.append(f"subset {options.subset}")
    return parts


def _not_run(report: Report) -> list[str]:
    """Return how many rules need an option, and how many were left out for other reasons."""
    reasons = [c.reason for c in report.coverage if not c.ran]
    needs = Counter(printable(r.removeprefix(_NEEDS)) for r in reasons if r.startswith(_NEEDS))
    parts = []
    if needs:
        (option, count), *rest = needs.most_common()
        more = [f"{n:,} {need}" for need, n in rest]
        verb = "needs" if count == 1 else "need"
        parts.append(", ".join([f"{count:,} more {verb} {option}", *more]))
    others = len(reasons) - needs.total()
    return [*parts, f"{others:,} skipped"] if others else parts


def reason(report: Report) -> str:
    """Return why the verdict is inconclusive or an error, or ''."""
    return printable(report.summary.reason)


def base_warning(report: Report) -> str:
    """Return that the base is a different model, where findings may come from that, or ''."""
    why = report.summary.different_base
    if not why or not report.findings:
        return ""
    base = printable(report.base or "")
    return f"the base {base} is a different model: {printable(why)}; check --base first"


def not_checked(report: Report) -> list[str]:
    """Return one line for each thing that was left unexamined: how many, the first, why, and what
    would settle it.
    """
    return [
        f"{e.subject}, {printable(e.example)} first: {printable(e.why)};"
        f" to settle it, {printable(e.settle)}"
        for e in report.summary.not_checked
    ]


def advice_line(report: Report, rule: str) -> str:
    """Return how the findings of a rule are fixed, and the command that explains it, or ''."""
    advice = report.summary.advice.get(rule)
    if advice is None or not advice.fix or report.summary.different_base:
        return ""
    return f"fix: {printable(advice.fix)} (ckptgate explain {printable(rule, 20)})"


def repair_line(report: Report) -> str:
    """Return the command that fixes failing findings without re-quantizing, or ''."""
    failing = dict.fromkeys(f.rule for f in report.failing if not f.explained_by)
    advice = report.summary.advice
    rules = [rule for rule in failing if rule in advice and advice[rule].repairable]
    if not rules or report.summary.different_base or report.summary.contents is None:
        return ""
    base = report.base or "BASE"
    command = shlex.join(["ckptgate", "repair", report.uri, "REPAIRED", "--base", base])
    which = "all errors" if len(rules) == len(failing) else f"{', '.join(rules)}"
    unknown = "" if report.base else " (BASE: what it was made from)"
    return f"{printable(command, 2000)} fixes {which} without re-quantizing{unknown}"


def skipped(report: Report) -> list[tuple[str, list[str]]]:
    """Return (reason, rules) of the rules that did not run."""
    groups: dict[str, list[str]] = {}
    for c in report.coverage:
        if not c.ran:
            groups.setdefault(printable(c.reason), []).append(c.rule)
    return list(groups.items())


def partial(report: Report) -> list[tuple[str, list[str]]]:
    """Return (what was not checked and why, rules) of the rules that ran on a part only."""
    groups: dict[str, list[str]] = {}
    for c in report.coverage:
        if c.ran and c.checked < c.of:
            rest = f"{c.of - c.checked:,} of {c.of:,} {c.unit} not checked: {c.reason}"
            groups.setdefault(printable(rest), []).append(c.rule)
    return list(groups.items())


def by_rules(groups: list[tuple[str, list[str]]]) -> str:
    """Return ``QC501 QC502 (reason); QC608 (other reason)``."""
    return "; ".join(f"{' '.join(rules)} ({why})" for why, rules in groups)


def remote_line(report: Report) -> str:
    """Return the commits that were read and what was fetched, '' for local directories."""
    commits, fetched = report.summary.commits, report.summary.fetched
    parts = [f"{role.replace('_', ' ')} at commit {commit}" for role, commit in commits.items()]
    if fetched is not None:
        parts.append(f"{size(fetched.bytes)} in {counted(fetched.requests, 'request')}")
    return "; ".join(parts)


def baseline_line(report: Report) -> str:
    """Return the baseline file with the number of known, grown and stale entries, or ''."""
    baseline = report.summary.baseline
    if baseline is None:
        return ""
    stale = baseline.stale
    text = (
        f"{printable(baseline.file)}: {baseline.known:,} known, {baseline.grown:,} grown, "
        f"{len(stale):,} stale"
    )
    if stale:
        names = ", ".join(printable(f"{e.rule} {e.what}", 80) for e in stale[:3])
        more = ", …" if len(stale) > 3 else ""
        text += f" (`ckptgate baseline prune` removes {names}{more})"
    unknown = baseline.not_judged
    return text + (f"; {unknown:,} not checked because their rules did not run" if unknown else "")


def by_engine(report: Report) -> dict[str, dict[str, tuple[Severity, list[str]]]]:
    """Return rule -> engine -> (worst severity, what the engine does); empty unless the profile is
    ``all``.
    """
    options = report.summary.options
    if options is None or options.profile != "all":
        return {}
    table: dict[str, dict[str, tuple[Severity, list[str]]]] = {}
    for finding in report.findings:
        for effect in finding.effects:
            cells = table.setdefault(finding.rule, {})
            severity, texts = cells.get(effect.engine, (effect.severity, []))
            worst = min(severity, effect.severity, key=SEVERITIES.index)
            cells[effect.engine] = (worst, _with(texts, effect))
    return table


def cell(entry: tuple[Severity, list[str]]) -> str:
    """Return a severity of `by_engine`, in parentheses if it is only the rule's default."""
    severity, texts = entry
    return severity if texts else f"({severity})"


def _with(texts: list[str], effect: Effect) -> list[str]:
    text = printable(effect.what)
    return texts if not text or text in texts else [*texts, text]
