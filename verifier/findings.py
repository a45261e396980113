# SPDX-License-Identifier: Apache-2.0
"""What a check says: findings, coverage, verdict. Rules make them, reporters render them; neither knows the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

Severity = Literal["error", "warning", "info"]
Verdict = Literal["passed", "failed", "unproven", "broken"]
SCHEMA_VERSION = "1.0"
EXIT_OF_VERDICT: dict[str, int] = {"passed": 0, "failed": 1, "unproven": 3, "broken": 4}


@dataclass(frozen=True, slots=True)
class Where:
    """One exact place. ``row`` and ``block`` index the scale tensor; ``byte`` is the offset in ``file``."""

    tensor: str | None = None
    file: str | None = None
    row: int | None = None
    block: int | None = None
    byte: int | None = None


@dataclass(frozen=True, slots=True)
class Finding:
    """One defect: what was seen, what belongs there, how many of how many, and one witness in ``where``."""

    rule: str
    severity: Severity
    message: str
    where: Where = Where()
    observed: str = ""
    expected: str = ""
    count: int = 1
    of: int | None = None


@dataclass(frozen=True, slots=True)
class Coverage:
    """What a rule examined: ``checked`` of ``of`` units; ``reason`` says why it did not run, or not on all."""

    rule: str
    ran: bool
    checked: int
    of: int
    unit: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """The result of a check."""

    verdict: Verdict
    uri: str
    base: str | None
    findings: tuple[Finding, ...]
    coverage: tuple[Coverage, ...]
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def exit_code(self) -> int:
        """The exit code that the verdict stands for."""
        return EXIT_OF_VERDICT[self.verdict]

    def count(self, severity: Severity) -> int:
        """Return the number of findings of one severity."""
        return sum(f.severity == severity for f in self.findings)

    def by_rule(self, rule: str) -> tuple[Finding, ...]:
        """Return the findings of one rule."""
        return tuple(f for f in self.findings if f.rule == rule)


def rules_of(findings: Iterable[Finding], severity: Severity | None = None) -> set[str]:
    """Return the rule ids among findings, of one severity or of all."""
    return {f.rule for f in findings if severity in (None, f.severity)}
