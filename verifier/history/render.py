# SPDX-License-Identifier: Apache-2.0
"""A history as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from verifier.history.record import Measure, Record
from verifier.history.trend import LAST, Deviation, LevelChange, changes, deviations, differences
from verifier.text import counted, printable

MAX_CHANGES = 50
_LEADING = ("loss", "errors")


def log_lines(records: Sequence[Record]) -> list[str]:
    """Return one line per run, oldest first."""
    return [_log_line(record) for record in records]


def _log_line(record: Record) -> str:
    leading = next((name for name in _LEADING if name in record.measures), None)
    parts = [
        f"{record.id[:8]}  {record.time[:16]}Z  {_kind(record):13} {record.verdict:12} "
        f"{printable(record.name, 60)}",
        f"{leading} {measured(record.measures[leading])}" if leading else "",
        record.commit[:10],
        printable(record.label, 60),
    ]
    return "   ".join(part for i, part in enumerate(parts) if part or i == 1)


def _kind(record: Record) -> str:
    """Return ``check header``, or the kind alone where runs have no depth."""
    depth = record.key.get("depth") if record.kind == "check" else None
    return f"{record.kind} {printable(depth, 8)}" if isinstance(depth, str) else record.kind


def show_lines(record: Record) -> list[str]:
    """Return everything in a run's record."""
    name = printable(record.name)
    lines = [
        f"run      {record.id}   {record.time}",
        f"result   {record.kind} of {name}: {record.verdict}   series {record.series}",
    ]
    if record.label:
        lines.append(f"label    {printable(record.label)}")
    sections: dict[str, Mapping[str, object]] = {
        "candid.": record.checkpoint,
        "base": record.base,
        "recipe": record.recipe,
        "key": record.key,
        "env": record.environment,
        "versions": record.versions,
    }
    lines += [f"{title:8} {pairs(values)}" for title, values in sections.items() if values]
    if record.commit:
        lines.append(f"commit   {record.commit}")
    if record.seconds is not None:
        lines.append(f"time     {record.seconds:.1f} s")
    return lines + [f"measure  {n:20} {measured(m)}" for n, m in record.measures.items()]


def pairs(values: Mapping[str, object]) -> str:
    """Return ``name value, name value``."""
    return ", ".join(f"{printable(k, 60)} {printable(str(v), 120)}" for k, v in values.items())


def measured(measure: Measure) -> str:
    """Return ``+0.00694 [+0.00585, +0.00803], margin 0.07696``."""
    if measure.value.is_integer() and measure.low is None:
        return f"{measure.value:,.0f}"
    text = f"{measure.value:+.5f}"
    if measure.low is not None and measure.high is not None:
        text += f" [{measure.low:+.5f}, {measure.high:+.5f}]"
    return text + (f", margin {measure.margin:.5f}" if measure.margin is not None else "")


def compare_lines(old: Record, new: Record) -> list[str]:
    """Return the measures of two runs next to each other, and what else is recorded as
    different.
    """
    lines = [f"a        {_log_line(old)}", f"b        {_log_line(new)}"]
    for name in dict.fromkeys([*old.measures, *new.measures]):
        a, b = old.measures.get(name), new.measures.get(name)
        difference = f"   b - a {b.value - a.value:+.6g}" if a and b else ""
        texts = [measured(m) if m else "-" for m in (a, b)]
        lines.append(f"{name:20} {texts[0]}   {texts[1]}{difference}")
    changed = differences(old, new) or ("nothing else that is recorded",)
    return lines + [f"differs  {printable(text)}" for text in changed]


def trend_lines(records: Sequence[Record], last: int = LAST) -> list[str]:
    """Return the warnings about the last runs."""
    return [_deviation(deviation) for deviation in deviations(records, last)]


def change_lines(records: Sequence[Record], measure: str | None = None) -> list[str]:
    """Return the change points, the oldest first."""
    points = sorted(changes(records, measure), key=lambda change: change.run.time)
    lines = [_change(change) for change in points[-MAX_CHANGES:]]
    earlier = len(points) - MAX_CHANGES
    return lines + ([f"change   and {counted(earlier, 'earlier one')}"] if earlier > 0 else [])


def _deviation(d: Deviation) -> str:
    name, off = printable(d.run.name, 80), abs(d.value - d.median)
    return (
        f"warning  {d.measure} {d.value:+.6g} of {name} deviates by {off:.3g} from the median of "
        f"the last {d.runs} passing runs ({d.median:+.6g}; threshold {d.allowed:.3g})"
    )


def _change(change: LevelChange) -> str:
    name, run = printable(change.run.name, 80), change.run.id[:8]
    because = [printable(text, 160) for text in change.because]
    why = "; ".join(because) or "nothing that is recorded changed"
    return f"change   {change.measure} {change.old:+.6g} → {change.new:+.6g} at {run} {name}: {why}"
