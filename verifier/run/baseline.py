# SPDX-License-Identifier: Apache-2.0
"""Accepted findings, each with a reason: a check fails only on findings that are new or got worse.

An entry is compared with the sum over the findings of its fingerprint. Findings with a greater
count or severity than the entry's are *grown* and fail like new ones. An entry whose rule examined
everything and did not find it again is *stale*; nothing is known of entries whose rule did not run.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verifier.errors import UsageError
from verifier.files import write_atomic
from verifier.findings import SEVERITIES, Coverage, Finding, Severity
from verifier.run.fingerprints import place
from verifier.summary import BaselineSummary, StaleEntry

MAX_BYTES = 64 << 20
MAX_WHAT = 2_000
"""The most characters of a message that an entry holds."""
_OTHER_VERSION = (
    "not of version 2: older fingerprints contain messages, so its entries match no finding; accept"
    " the findings again with `ckptgate baseline write` and a new file"
)
Path = str | os.PathLike[str]


class BaselineEntry(BaseModel):
    """One accepted defect: at most ``count`` findings of at most this severity; ``witness`` is the
    first tensor's name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    fingerprint: str = Field(pattern=r"^[0-9a-f]{32}$")
    rule: str = Field(min_length=1, max_length=64)
    severity: Severity
    count: int = Field(ge=1)
    what: str = ""
    place: str = ""
    witness: str = ""
    reason: str = Field(min_length=1)
    added: str = ""


class Baseline(BaseModel):
    """The entries of a baseline file, by fingerprint."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    version: Literal[2] = 2
    entries: tuple[BaselineEntry, ...] = Field(default=(), strict=False)

    def compare(self, findings: Iterable[Finding], coverage: Sequence[Coverage]) -> BaselineResult:
        """Return every finding with its standing, and the entries that were not found again."""
        listed = list(findings)
        totals = _totals(listed)
        entries = {e.fingerprint: e for e in self.entries}
        absent = [e for e in self.entries if e.fingerprint not in totals]
        stale = [e for e in absent if _examined_all(e.rule, coverage)]
        return BaselineResult(
            [_compared(f, entries.get(f.fingerprint), totals[f.fingerprint]) for f in listed],
            stale,
            len(absent) - len(stale),
        )


@dataclass(frozen=True, slots=True)
class BaselineResult:
    """The findings with their standing, the entries that are stale, and the number of entries whose
    rule did not examine everything.
    """

    findings: list[Finding]
    stale: list[BaselineEntry]
    not_judged: int

    def summary(self, file: str) -> BaselineSummary:
        """Return what the report says of the baseline."""
        standing = [f.standing for f in self.findings]
        stale = tuple(StaleEntry(e.fingerprint, e.rule, e.what, e.place) for e in self.stale)
        known, grown = standing.count("known"), standing.count("grown")
        return BaselineSummary(file, known, grown, stale, self.not_judged)


def load(file: Path) -> Baseline:
    """Read a baseline file.

    Raises:
        UsageError: it does not exist, is too large, or is not a baseline; the message names the
            first field that is wrong.
    """
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except OSError as error:
        why = f"{error.strerror or error}; `ckptgate baseline write` makes one"
        raise UsageError(f"baseline {os.fspath(file)}: {why}") from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"baseline {os.fspath(file)}: larger than {MAX_BYTES:,} bytes")
    try:
        baseline = Baseline.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        if first["loc"] == ("version",):
            raise UsageError(f"baseline {os.fspath(file)}: {_OTHER_VERSION}") from error
        at = ".".join(str(p) for p in first["loc"])
        raise UsageError(
            f"baseline {os.fspath(file)}: {at + ': ' if at else ''}{first['msg']}"
        ) from error
    if len({e.fingerprint for e in baseline.entries}) != len(baseline.entries):
        raise UsageError(f"baseline {os.fspath(file)}: two entries have the same fingerprint")
    return baseline


def save(baseline: Baseline, file: Path) -> None:
    """Write a baseline file atomically, entries by rule, place and fingerprint."""
    ordered = sorted(baseline.entries, key=lambda e: (e.rule, e.place, e.fingerprint))
    write_atomic(
        file,
        baseline.model_copy(update={"entries": tuple(ordered)}).model_dump_json(indent=2) + "\n",
    )


def accept(
    baseline: Baseline, findings: Iterable[Finding], reason: str
) -> tuple[Baseline, int, int]:
    """Return the baseline with every finding in it, the number of new entries, and the number of
    raised entries.

    An entry that accepts the findings already keeps its reason; one that is raised gets the new
    reason.
    """
    listed = [f for f in findings if f.severity != "info"]
    entries = {e.fingerprint: e for e in baseline.entries}
    new = raised = 0
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    for key, (count, severity) in _totals(listed).items():
        old = entries.get(key)
        if old is not None and _accepts(old, count, severity):
            continue
        first = next(f for f in listed if f.fingerprint == key)
        new, raised = new + (old is None), raised + (old is not None)
        entries[key] = BaselineEntry(
            fingerprint=key,
            rule=first.rule,
            severity=severity,
            count=count,
            what=_whole(first.message[:MAX_WHAT]),
            place=_whole(place(first)),
            witness=_whole(first.where.tensor or ""),
            reason=_whole(reason),
            added=today,
        )
    return Baseline(entries=tuple(entries.values())), new, raised


def prune(
    baseline: Baseline, findings: Iterable[Finding], coverage: Sequence[Coverage]
) -> tuple[Baseline, int, int]:
    """Return the baseline without stale entries and with counts no higher than now, the number of
    entries that were dropped, and of those that were lowered.
    """
    totals = _totals(findings)
    entries, dropped, lowered = [], 0, 0
    for entry in baseline.entries:
        count = totals[entry.fingerprint][0] if entry.fingerprint in totals else 0
        if not _examined_all(entry.rule, coverage) or count >= entry.count:
            entries.append(entry)
        elif count:
            entries.append(entry.model_copy(update={"count": count}))
            lowered += 1
        else:
            dropped += 1
    return Baseline(entries=tuple(entries)), dropped, lowered


def _totals(findings: Iterable[Finding]) -> dict[str, tuple[int, Severity]]:
    totals: dict[str, tuple[int, Severity]] = {}
    for f in findings:
        count, severity = totals.get(f.fingerprint, (0, f.severity))
        totals[f.fingerprint] = (count + f.count, min(severity, f.severity, key=SEVERITIES.index))
    return totals


def _whole(text: str) -> str:
    # A name from a header may hold half of a surrogate pair, which no UTF-8 file can.
    return text.encode("utf-8", "backslashreplace").decode()


def _accepts(entry: BaselineEntry, count: int, severity: Severity) -> bool:
    return count <= entry.count and SEVERITIES.index(severity) >= SEVERITIES.index(entry.severity)


def _compared(
    finding: Finding, entry: BaselineEntry | None, total: tuple[int, Severity]
) -> Finding:
    """Return a finding with its standing; ``total`` is that of its fingerprint."""
    if entry is None:
        return finding
    if not _accepts(entry, *total):
        accepted = f"{entry.count:,} {entry.severity} accepted ({entry.reason})"
        note = f"{total[0]:,} {total[1]} now, {accepted}"
        return replace(finding, standing="grown", note=note)
    first = _whole(finding.where.tensor or "")
    # As many as were accepted, but not the same ones: the note says so.
    moved = entry.witness and first != entry.witness
    note = f"; first {first}, when accepted {entry.witness}" if moved else ""
    return replace(finding, standing="known", note=entry.reason + note)


def _examined_all(rule: str, coverage: Sequence[Coverage]) -> bool:
    """Whether a rule ran on everything there was; also for a rule that no longer exists, which
    cannot find anything again.
    """
    return all(c.ran and c.checked == c.of for c in coverage if c.rule == rule)
