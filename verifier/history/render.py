# SPDX-License-Identifier: Apache-2.0
"""A history for a person."""

from __future__ import annotations

from collections.abc import Sequence

from verifier.history.record import Measure, Record
from verifier.history.trend import LAST, Change, Warned, changes, differences, warnings
from verifier.text import printable

MAX_CHANGES = 50


def log_lines(records: Sequence[Record]) -> list[str]:
    """Return one line a run, oldest first."""
    lines = []
    for r in records:
        lead = next((n for n in ("loss", "errors") if n in r.measures), None)
        told = f"{lead} {interval(r.measures[lead])}" if lead else ""
        extra = f"   {printable(r.label, 60)}" if r.label else ""
        commit = f"   {r.commit[:10]}" if r.commit else ""
        lines.append(
            f"{r.id[:8]}  {r.time[:16]}Z  {r.kind:6} {r.verdict:8} {printable(r.name, 60)}   {told}{commit}{extra}"
        )
    return lines


def show_lines(r: Record) -> list[str]:
    """Return everything that a run's record tells."""
    lines = [
        f"run      {r.id}   {r.time}",
        f"what     {r.kind} of {printable(r.name)}: {r.verdict}   series {r.series}",
    ]
    if r.label:
        lines.append(f"label    {printable(r.label)}")
    for what, values in (
        ("candid.", r.checkpoint),
        ("base", r.base),
        ("recipe", r.recipe),
        ("key", r.key),
        ("env", r.environment),
        ("versions", r.versions),
    ):
        if values:
            lines.append(
                f"{what:8} "
                + ", ".join(
                    f"{printable(k, 60)} {printable(str(v), 120)}" for k, v in values.items()
                )
            )
    if r.commit:
        lines.append(f"commit   {r.commit}")
    if r.seconds is not None:
        lines.append(f"time     {r.seconds:.1f} s")
    return [*lines, *(f"measure  {n:20} {interval(m)}" for n, m in r.measures.items())]


def interval(m: Measure) -> str:
    """Return ``+0.00694 [+0.00585, +0.00803], margin 0.07696``."""
    if m.value.is_integer() and m.low is None:
        return f"{m.value:,.0f}"
    ends = f" [{m.low:+.5f}, {m.high:+.5f}]" if m.low is not None and m.high is not None else ""
    return f"{m.value:+.5f}{ends}" + (f", margin {m.margin:.5f}" if m.margin is not None else "")


def compare_lines(a: Record, b: Record) -> list[str]:
    """Return two runs' measures side by side, and what else is recorded as different."""
    lines = [f"a        {log_lines([a])[0]}", f"b        {log_lines([b])[0]}"]
    for name in [*a.measures, *(n for n in b.measures if n not in a.measures)]:
        ours, theirs = a.measures.get(name), b.measures.get(name)
        both = f"   b - a {theirs.value - ours.value:+.6g}" if ours and theirs else ""
        lines.append(
            f"{name:20} {interval(ours) if ours else '-'}   {interval(theirs) if theirs else '-'}{both}"
        )
    told = differences(a, b)
    return [
        *lines,
        *(f"differs  {printable(t)}" for t in told or ("nothing else that is recorded",)),
    ]


def trend_lines(records: Sequence[Record], last: int = LAST) -> list[str]:
    """Return the warnings about the last runs."""
    return [_warning(w) for w in warnings(records, last)]


def change_lines(records: Sequence[Record], measure: str | None = None) -> list[str]:
    """Return the change points, the oldest first."""
    found = sorted(changes(records, measure), key=lambda c: c.run.time)
    lines = [_change(c) for c in found[-MAX_CHANGES:]]
    return lines + (
        [f"change   and {len(found) - MAX_CHANGES} earlier ones"]
        if len(found) > MAX_CHANGES
        else []
    )


def _warning(w: Warned) -> str:
    return (
        f"warning  {w.measure} {w.value:+.6g} of {printable(w.run.name, 80)} is off the median {w.median:+.6g} of the last "
        f"{w.runs} accepted runs by {abs(w.value - w.median):.3g} (allowed {w.allowed:.3g})"
    )


def _change(c: Change) -> str:
    why = "; ".join(printable(b, 160) for b in c.because) or "nothing that is recorded changed"
    return f"change   {c.measure} {c.old:+.6g} -> {c.new:+.6g} at {c.run.id[:8]} {printable(c.run.name, 80)}: {why}"
