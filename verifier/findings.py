# SPDX-License-Identifier: Apache-2.0
"""The result of a check: findings, coverage, verdict. Rules make it and reporters render it;
neither imports the other.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from verifier.summary import FailOn, Summary

Severity = Literal["error", "warning", "info"]
Verdict = Literal["passed", "failed", "inconclusive", "error"]
Standing = Literal["", "known", "grown"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "info")
SCHEMA_VERSION = "2.0"
FINGERPRINT_VERSION = "ckptgate/v2"
"""How `Finding.fingerprint` is made (`verifier.run.fingerprints`)."""
MAX_PLACES = 4096
READABLE_VERSIONS = ("1.1", SCHEMA_VERSION)
EXIT_OF_VERDICT: dict[str, int] = {"passed": 0, "failed": 1, "inconclusive": 3, "error": 4}
OLD_VERDICTS = {"unproven": "inconclusive", "broken": "error"}
"""Verdicts in files of version 0.1, with their names now."""


@dataclass(frozen=True, slots=True)
class Where:
    """One location. ``row`` and ``block`` index the scale tensor; ``byte`` is the offset in
    ``file``.
    """

    tensor: str | None = None
    file: str | None = None
    row: int | None = None
    block: int | None = None
    byte: int | None = None


class Effect(NamedTuple):
    """A defect's severity in one engine, and what that engine does with it ('' where it is not
    known).
    """

    engine: str
    severity: Severity
    what: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect.

    A rule sets the fields up to ``of``, and ``effects`` where engines treat this finding
    differently from the rule's others. The run sets the rest.

    Attributes:
        rule: id of the rule.
        severity: in this run.
        message: without names and numbers, so that equal findings are grouped.
        where: the location, or the first of several.
        observed: what the checkpoint has.
        expected: what it should have.
        count: findings in the group.
        of: units that the rule examined.
        effects: what engines do with the defect.
        because: the origin of a severity that is not the rule's or the finding's own.
        fingerprint: the same in every run over the same defect.
        standing: ``known`` for a finding that the baseline accepts, ``grown`` for one that got
            worse than its entry.
        note: why it was accepted, or how it grew.
        places: tensors of the group, at most `MAX_PLACES`, where there are several; in a report
            that was read from a file with numbers as ranges.
        cause: what is wrong, in words that never change; '' where the rule reports one kind.
        explained_by: the fingerprint of the finding that this one follows from; '' for none.
    """

    rule: str
    severity: Severity
    message: str
    where: Where = Where()
    observed: str = ""
    expected: str = ""
    count: int = 1
    of: int | None = None
    effects: tuple[Effect, ...] = ()
    because: str = ""
    fingerprint: str = ""
    standing: Standing = ""
    note: str = ""
    places: tuple[str, ...] = field(default=(), compare=False)
    cause: str = ""
    explained_by: str = ""


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a rule examined: ``checked`` of ``of`` units. ``reason`` is why it did not run, or
    did not examine all of them.
    """

    rule: str
    ran: bool
    checked: int
    of: int
    unit: str
    reason: str = ""
    title: str = ""


@dataclass(frozen=True)
class Report:
    """The result of a check."""

    verdict: Verdict
    uri: str
    base: str | None
    findings: tuple[Finding, ...]
    coverage: tuple[Coverage, ...]
    summary: Summary = field(default_factory=Summary)

    @property
    def exit_code(self) -> int:
        """The exit code of the verdict."""
        return EXIT_OF_VERDICT[self.verdict]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity that the baseline does not accept."""
        return sum(f.severity == severity and f.standing != "known" for f in self.findings)

    @property
    def failing(self) -> tuple[Finding, ...]:
        """The findings that fail the check: of a failing severity, and not accepted by the
        baseline.
        """
        options = self.summary.options
        return failing(self.findings, options.fail_on if options else "error")

    @property
    def stats(self) -> dict[str, Any]:
        """The summary as JSON values; deprecated."""
        warnings.warn("Report.stats is now Report.summary", DeprecationWarning, stacklevel=2)
        return self.summary.as_json()

    def by_rule(self, rule: str) -> tuple[Finding, ...]:
        """Return the findings of one rule."""
        return tuple(f for f in self.findings if f.rule == rule)


def current_verdict(verdict: Any) -> Any:
    """Return a verdict that was read from a file by its current name."""
    return OLD_VERDICTS.get(verdict, verdict) if isinstance(verdict, str) else verdict


def failing(findings: Iterable[Finding], fail_on: FailOn) -> tuple[Finding, ...]:
    """Return the findings that fail a check: errors, with ``fail_on="warning"`` also warnings, but
    none that the baseline accepts.
    """
    levels = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    return tuple(f for f in findings if f.severity in levels and f.standing != "known")


def rules_of(findings: Iterable[Finding], severity: Severity | None = None) -> set[str]:
    """Return the rule ids among findings, of one severity or of all."""
    return {f.rule for f in findings if severity in (None, f.severity)}
