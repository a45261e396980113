# SPDX-License-Identifier: Apache-2.0
"""What a check says: findings, coverage, verdict. Rules make them, reporters render them; neither
knows the other.
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
FINGERPRINT_VERSION = "ckptgate/v1"
"""How `Finding.fingerprint` is made (`verifier.run.fingerprints`)."""
READABLE_VERSIONS = ("1.1", SCHEMA_VERSION)
EXIT_OF_VERDICT: dict[str, int] = {"passed": 0, "failed": 1, "inconclusive": 3, "error": 4}
OLD_VERDICTS = {"unproven": "inconclusive", "broken": "error"}
"""What files of version 0.1 call a verdict, and its name now."""


@dataclass(frozen=True, slots=True)
class Where:
    """One exact place. ``row`` and ``block`` index the scale tensor; ``byte`` is the offset in
    ``file``.
    """

    tensor: str | None = None
    file: str | None = None
    row: int | None = None
    block: int | None = None
    byte: int | None = None


class Effect(NamedTuple):
    """What one engine makes of a defect: its severity there, and what that engine does with it (''
    where not known).
    """

    engine: str
    severity: Severity
    what: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect: what was seen, what belongs there, how many of how many, and one witness in
    ``where``.

    A rule fills the fields up to ``of``, and ``effects`` where engines treat this finding otherwise
    than the rule's others. The run fills the rest: ``because`` says where a severity comes from
    that is not the rule's or the finding's own; ``fingerprint`` is the same in every run over the
    same defect; ``standing`` is ``known`` for one in the baseline, ``grown`` for one that got worse
    than its entry; ``note`` says why it was accepted, or how it grew.
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


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a rule examined: ``checked`` of ``of`` units; ``reason`` says why it did not run, or not
    on all.
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
        """The exit code that the verdict stands for."""
        return EXIT_OF_VERDICT[self.verdict]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity; those that the baseline holds are not
        counted.
        """
        return sum(f.severity == severity and f.standing != "known" for f in self.findings)

    @property
    def failing(self) -> tuple[Finding, ...]:
        """The findings that make the check fail: of a failing severity, and not known from the
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
    """Return the findings that fail a check: errors, with ``fail_on="warning"`` warnings too; none
    that is known.
    """
    levels = SEVERITIES[: SEVERITIES.index(fail_on) + 1]
    return tuple(f for f in findings if f.severity in levels and f.standing != "known")


def rules_of(findings: Iterable[Finding], severity: Severity | None = None) -> set[str]:
    """Return the rule ids among findings, of one severity or of all."""
    return {f.rule for f in findings if severity in (None, f.severity)}
