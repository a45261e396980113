# SPDX-License-Identifier: Apache-2.0
"""A suite's result as text, as a Markdown table for a model card, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence

from verifier.gate.suite.result import EntryResult, SuiteResult
from verifier.text import counted, printable

HEADINGS = (
    "entry",
    "score",
    "base",
    "candidate",
    "recovery [95%]",
    "length [95%]",
    "cut off",
    "no end token",
    "verdict",
)
FEWEST_COLUMNS = 6
"""Columns of a suite without generated text: those of lengths are left out."""


def table_of(result: SuiteResult) -> list[tuple[str, ...]]:
    """Return the table: headings, then a row for each entry; only where an entry generates text are
    there columns of lengths.
    """
    rows = [HEADINGS, *map(_row, result.entries)]
    if any(entry.length for entry in result.entries):
        return rows
    return [(*row[:5], row[-1]) for row in rows]


def _row(entry: EntryResult) -> tuple[str, ...]:
    base, candidate = entry.scores
    score = f"{entry.score_name}, {entry.items:,} items"
    if entry.repeats > 1:
        score += f" x {entry.repeats}"
    return (
        entry.name,
        score,
        _score(entry, base),
        _score(entry, candidate),
        _recovery(entry),
        *_length(entry),
        entry.outcome,
    )


def _score(entry: EntryResult, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.2%}" if entry.kind == "task" else f"{value:.4f}"


def _recovery(entry: EntryResult) -> str:
    recovery = entry.recovery
    if recovery is None or not math.isfinite(recovery.value):
        return "-"
    return f"{recovery.value:.2%} [{recovery.low:.2%}, {recovery.high:.2%}]"


def _length(entry: EntryResult) -> tuple[str, str, str]:
    length = entry.length
    if length is None:
        return "-", "-", "-"
    ratio = f"{length.ratio:.3f} [{length.low:.3f}, {length.high:.3f}]"
    cut_off, without = (
        f"{base:.1%} to {candidate:.1%}"
        for base, candidate in (length.cut_off, length.without_end_token)
    )
    return ratio, cut_off, without


def render_text(result: SuiteResult) -> str:
    """Return the result as lines of text, the verdict last."""
    lines = [
        f"suite    {result.name}: {result.candidate.uri} against {result.base.uri}",
        f"error    {_error(result)}",
        "",
        *_aligned(table_of(result)),
        "",
    ]
    for entry in result.entries:
        lines += [f"{entry.name}: {reason}" for reason in entry.reasons]
    lines += [f"note     {note}" for note in result.notes]
    lines.append(f"verdict: {_verdict(result)}")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def render_markdown(result: SuiteResult) -> str:
    """Return a table for a model card, with the verdict and what the numbers are below it."""
    rows = [[_cell(text) for text in row] for row in table_of(result)]
    lines = [f"| {' | '.join(row)} |" for row in rows]
    lines.insert(1, "| --- " * len(rows[0]) + "|")
    lines += ["", f"**{_verdict(result)}**, suite {_cell(result.name)}: {_error(result)}."]
    lines.append(
        "Recovery is candidate over base with its paired two-sided 95% interval (of perplexities, "
        "base over candidate)"
        + ("; length is the ratio of completion tokens." if len(rows[0]) > FEWEST_COLUMNS else ".")
    )
    lines += ["", *(f"* {e.name}: {_cell(reason)}" for e in result.entries for reason in e.reasons)]
    versions = ", ".join(f"{name} {value}" for name, value in result.versions.items())
    digests = (
        f"candidate {result.candidate.identity.weights_sha256[:16]}, base "
        f"{result.base.identity.weights_sha256[:16]}, suite {result.sha256[:16]}"
    )
    lines += ["", f"{digests} (SHA-256); {versions}; {result.time}.", ""]
    return "\n".join(lines)


def render_json(result: SuiteResult) -> str:
    """Return the result as one JSON object."""
    return json.dumps(result.as_json(), indent=2, allow_nan=False) + "\n"


def _error(result: SuiteResult) -> str:
    criteria = sum(len(entry.criteria) for entry in result.entries)
    look = "" if result.looks is None else f" at look {result.looks}"
    noun = "criterion" if criteria == 1 else "criteria"
    return (
        f"{result.alpha:.3g} for a wrong pass{look}, and for a wrong failure over {criteria} {noun}"
    )


def _verdict(result: SuiteResult) -> str:
    count = len(result.entries)
    passed = sum(entry.outcome == "passed" for entry in result.entries)
    return f"{result.outcome.upper()} ({passed} of {counted(count, 'entry')} passed)"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]


def _cell(text: str) -> str:
    return printable(text, 400).replace("|", "\\|").replace("<", "&lt;")
