# SPDX-License-Identifier: Apache-2.0
"""The findings and coverage of a rule, and the verdict over all rules."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from verifier.findings import SEVERITIES, Coverage, Finding, Verdict, failing
from verifier.rules import Rule
from verifier.run.group import MAX_GROUPS, group
from verifier.run.schedule import MAX_KINDS, Outcome
from verifier.summary import FailOn, NotChecked
from verifier.text import counted


def severity_rank(finding: Finding) -> int:
    """Return the rank of a finding's severity, the worst first."""
    return SEVERITIES.index(finding.severity)


def finish_rule(
    rule: Rule, outcome: Outcome, *, all_modules: bool = True
) -> tuple[list[Finding], Coverage]:
    """Return a rule's findings, equal ones grouped, and its coverage.

    Args:
        rule: the rule.
        outcome: what its runs yielded.
        all_modules: whether it ran on all modules; the findings of a subset are grouped when its
            report is merged.
    """
    if outcome.deferred:
        return [], Coverage(rule.id, False, 0, 0, rule.unit, outcome.deferred, rule.title)
    tally = outcome.tally
    limit = MAX_GROUPS if all_modules else MAX_KINDS
    findings = group(sorted(outcome.findings, key=severity_rank), tally.of, limit)
    checked = 0 if outcome.stopped else tally.checked
    coverage = Coverage(rule.id, True, checked, tally.of, rule.unit, tally.reason, rule.title)
    return findings, coverage


def verdict_of(
    quantized: bool,
    findings: Iterable[Finding],
    coverage: Sequence[Coverage],
    require: Collection[str],
    fail_on: FailOn,
    not_checked: Sequence[NotChecked] = (),
) -> tuple[Verdict, str]:
    """Return the verdict, and the reason where it is inconclusive.

    Args:
        quantized: whether the checkpoint has any quantized module.
        findings: with their severity and standing in this run.
        coverage: of every rule.
        require: ids of the rules that must have examined something.
        fail_on: the lowest severity that fails.
        not_checked: what was left unexamined.
    """
    if failing(findings, fail_on):
        return "failed", ""
    reason = "" if quantized else "no quantized tensor"
    reason = reason or _left_out(not_checked)
    reason = reason or next(filter(None, (_gap(c, c.rule in require) for c in coverage)), "")
    if not reason and not any(c.checked for c in coverage):
        ran = any(c.ran for c in coverage)
        nothing = "the selected rules found nothing to examine"
        reason = nothing if ran else "none of the selected rules ran"
    return ("inconclusive", reason) if reason else ("passed", "")


def _left_out(entries: Sequence[NotChecked]) -> str:
    """Return what was left unexamined and why, of the first entry, and how many more there are."""
    if not entries:
        return ""
    text = f"{entries[0].subject} not checked: {entries[0].why}"
    return f"{text}; and {counted(len(entries) - 1, 'more reason')}" if entries[1:] else text


def _gap(c: Coverage, required: bool) -> str:
    """Return what a rule left unexamined that makes the verdict inconclusive, or ''."""
    if c.ran and c.of and not c.checked:
        return f"{c.rule} examined none of {c.of:,} {c.unit}: {c.reason}"
    if required and not c.ran:
        return f"{c.rule} is required and did not run: {c.reason}"
    if required and not c.checked:
        return f"{c.rule} is required and found nothing to examine"
    return ""
