# SPDX-License-Identifier: Apache-2.0
"""Groups equal findings over layers and experts into one, with a count and the first as witness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from verifier.findings import MAX_PLACES, SEVERITIES, Finding, Severity
from verifier.schemes import collapse

MAX_GROUPS = 40


def group(findings: Iterable[Finding], of: int, limit: int = MAX_GROUPS) -> list[Finding]:
    """Return one finding for each kind and place (numbers in names collapsed), in order of first
    appearance.

    Args:
        findings: of one rule.
        of: the units that the rule examined.
        limit: the most findings to return; one more counts those of the other groups.
    """
    first: dict[tuple[str, ...], Finding] = {}
    counts: dict[tuple[str, ...], int] = {}
    places: dict[tuple[str, ...], dict[str, None]] = {}
    dropped = 0
    severity: Severity = "info"
    for f in findings:
        place = collapse(f.where.tensor) if f.where.tensor else (f.where.file or "")
        key = (f.severity, f.because, f.message, place)
        if key in first:
            counts[key] += f.count
        elif len(first) < limit:
            first[key], counts[key] = f, f.count
            places[key] = {}
        else:
            dropped += f.count
            severity = min(severity, f.severity, key=SEVERITIES.index)
            continue
        if len(places[key]) < MAX_PLACES:
            places[key] |= dict.fromkeys(_places_of(f))
    groups = [
        replace(f, count=counts[k], of=max(of, counts[k]), places=_several(places[k]))
        for k, f in first.items()
    ]
    if dropped:
        rule, total = groups[-1].rule, max(of, dropped)
        groups.append(Finding(rule, severity, "and more of other names", count=dropped, of=total))
    return groups


def _places_of(finding: Finding) -> tuple[str, ...]:
    return finding.places or ((finding.where.tensor,) if finding.where.tensor else ())


def _several(places: Iterable[str]) -> tuple[str, ...]:
    names = tuple(places)[:MAX_PLACES]
    return names if len(names) > 1 else ()
