# SPDX-License-Identifier: Apache-2.0
"""Equal findings over layers and experts become one, counted, with the first as its witness."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from verifier.findings import SEVERITIES, Finding, Severity
from verifier.schemes import collapse

MAX_GROUPS = 40


def group(findings: Iterable[Finding], of: int, limit: int = MAX_GROUPS) -> list[Finding]:
    """Return one finding for each kind and place (numbers in names collapsed), in order of first
    appearance.

    At most ``limit`` of them; one more says how many findings the rest held.
    """
    first: dict[tuple[str, ...], Finding] = {}
    counts: dict[tuple[str, ...], int] = {}
    dropped = 0
    severity: Severity = "info"
    for f in findings:
        place = collapse(f.where.tensor) if f.where.tensor else (f.where.file or "")
        key = (f.severity, f.because, f.message, place)
        if key in first:
            counts[key] += f.count
        elif len(first) < limit:
            first[key], counts[key] = f, f.count
        else:
            dropped += f.count
            severity = min(severity, f.severity, key=SEVERITIES.index)
    grouped = [replace(f, count=counts[k], of=max(of, counts[k])) for k, f in first.items()]
    if dropped:
        grouped.append(
            Finding(
                grouped[-1].rule,
                severity,
                "and more of other names",
                count=dropped,
                of=max(of, dropped),
            )
        )
    return grouped
