# SPDX-License-Identifier: Apache-2.0
"""Findings that were accepted, with a reason: a check fails on what is new or got worse, and says
what it let pass.

An entry is held against the sum over the findings of its fingerprint. A greater count or severity
than the entry's is no longer what was accepted: those findings are *grown* and fail like new ones.
An entry whose rule ran over everything and did not find it again is *stale*; nothing is said of
entries whose rule did not run.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verifier.errors import UsageError
from verifier.files import write_atomic
from verifier.findings import SEVERITIES, Coverage, Finding, Severity
from verifier.run.fingerprints import kind, place

MAX_BYTES = 64 << 20
Path = str | os.PathLike[str]


class Entry(BaseModel):
    """One accepted defect: ``count`` and ``severity`` are the most that is accepted, ``witness`` is
    the first one's name.
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

    version: Literal[1] = 1
    entries: tuple[Entry, ...] = Field(default=(), strict=False)

    def judge(self, findings: Iterable[Finding], coverage: Sequence[Coverage]) -> BaselineResult:
        """Give every finding its standing, and name the entries that are stale."""
        found = list(findings)
        now = _totals(found)
        entries = {e.fingerprint: e for e in self.entries}
        judged = BaselineResult(
            [_stand(f, entries.get(f.fingerprint), now[f.fingerprint]) for f in found]
        )
        for entry in self.entries:
            if entry.fingerprint in now:
                continue
            if _looked(entry.rule, coverage):
                judged.stale.append(entry)
            else:
                judged.not_judged += 1
        return judged


@dataclass
class BaselineResult:
    """The findings with their standing, and what the baseline came to."""

    findings: list[Finding]
    stale: list[Entry] = field(default_factory=list)
    not_judged: int = 0

    def stats(self, file: str) -> dict[str, Any]:
        """Return what the report says of the baseline."""
        standing = [f.standing for f in self.findings]
        return {
            "file": file,
            "known": standing.count("known"),
            "grown": standing.count("grown"),
            "stale": [
                {"fingerprint": e.fingerprint, "rule": e.rule, "what": e.what, "place": e.place}
                for e in self.stale
            ],
            "not_judged": self.not_judged,
        }


def load(file: Path) -> Baseline:
    """Read a baseline file.

    Raises:
        UsageError: it is absent, too large, or no baseline; the message names the first field that
            is wrong.
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
        found = Baseline.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        at = ".".join(str(p) for p in first["loc"])
        raise UsageError(
            f"baseline {os.fspath(file)}: {at + ': ' if at else ''}{first['msg']}"
        ) from error
    seen = {e.fingerprint for e in found.entries}
    if len(seen) != len(found.entries):
        raise UsageError(f"baseline {os.fspath(file)}: two entries have one fingerprint")
    return found


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
    """Return the baseline with every finding in it, the number of entries that are new, and of
    those that were raised.

    An entry that holds already keeps its reason; one that is raised to what is there now gets the
    new one.
    """
    found = [f for f in findings if f.severity != "info"]
    entries = {e.fingerprint: e for e in baseline.entries}
    new = raised = 0
    today = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    for key, (count, severity) in _totals(found).items():
        old = entries.get(key)
        if old is not None and _holds(old, count, severity):
            continue
        first = next(f for f in found if f.fingerprint == key)
        new, raised = new + (old is None), raised + (old is not None)
        entries[key] = Entry(
            fingerprint=key,
            rule=first.rule,
            severity=severity,
            count=count,
            what=_whole(kind(first)),
            place=_whole(place(first)),
            witness=_whole(first.where.tensor or ""),
            reason=_whole(reason),
            added=today,
        )
    return Baseline(entries=tuple(entries.values())), new, raised


def prune(
    baseline: Baseline, findings: Iterable[Finding], coverage: Sequence[Coverage]
) -> tuple[Baseline, int, int]:
    """Return the baseline without stale entries and with counts no higher than now, and how many of
    both there were.
    """
    now = _totals(findings)
    kept, dropped, lowered = [], 0, 0
    for entry in baseline.entries:
        looked = _looked(entry.rule, coverage)
        if entry.fingerprint in now and looked and now[entry.fingerprint][0] < entry.count:
            kept.append(entry.model_copy(update={"count": now[entry.fingerprint][0]}))
            lowered += 1
        elif entry.fingerprint in now or not looked:
            kept.append(entry)
        else:
            dropped += 1
    return Baseline(entries=tuple(kept)), dropped, lowered


def _totals(findings: Iterable[Finding]) -> dict[str, tuple[int, Severity]]:
    totals: dict[str, tuple[int, Severity]] = {}
    for f in findings:
        count, severity = totals.get(f.fingerprint, (0, f.severity))
        totals[f.fingerprint] = (count + f.count, min(severity, f.severity, key=SEVERITIES.index))
    return totals


def _whole(text: str) -> str:
    # A name from a header may hold half of a surrogate pair, which no UTF-8 file can.
    return text.encode("utf-8", "backslashreplace").decode()


def _holds(entry: Entry, count: int, severity: Severity) -> bool:
    return count <= entry.count and SEVERITIES.index(severity) >= SEVERITIES.index(entry.severity)


def _stand(finding: Finding, entry: Entry | None, now: tuple[int, Severity]) -> Finding:
    if entry is None:
        return finding
    if _holds(entry, *now):
        here = _whole(finding.where.tensor or "")
        # As many as were accepted, but not the same ones: that does not fail, and is said.
        moved = (
            f"; first {here}, when accepted {entry.witness}"
            if entry.witness and here != entry.witness
            else ""
        )
        return replace(finding, standing="known", note=entry.reason + moved)
    note = f"{now[0]:,} {now[1]} now, {entry.count:,} {entry.severity} accepted ({entry.reason})"
    return replace(finding, standing="grown", note=note)


def _looked(rule: str, coverage: Sequence[Coverage]) -> bool:
    """Whether a rule ran over all that there was; a rule that no longer exists will not find
    anything again.
    """
    found = [c for c in coverage if c.rule == rule]
    return all(c.ran and c.checked == c.of for c in found)
