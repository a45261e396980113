# SPDX-License-Identifier: Apache-2.0
"""Checks every format clean and with every corruption, and grades what the check says."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import verifier
from tests.formats.corruptions import CORRUPTIONS, Corruption, NotApplicable
from tests.formats.files import Checkpoint
from tests.formats.formats import Format, build, layout
from tests.formats.table import FORMATS
from verifier.findings import Finding, Report

EXACT, OTHER, INCONCLUSIVE, MISSED = "exact", "other", "inconclusive", "missed"
CRASH, NEEDS_BASE = "crash", "needs base"
PASSED, FAILED, UNNAMED = "passed", "failed", "unnamed"
NEW_WORDS = {"unproven": INCONCLUSIVE, "broken": "error"}
Key = tuple[str, str, str, str]


@dataclass(frozen=True)
class Outcome:
    """What one check said: its verdict, its findings but for information, or its crash."""

    verdict: str
    findings: tuple[Finding, ...] = ()
    text: str = ""
    crash: str = ""

    def keys(self) -> set[Key]:
        """Return what tells one finding from another."""
        return {key(f) for f in self.findings}


@dataclass
class Row:
    """The results of one format: ``clean`` and ``cells`` each without and with the base."""

    name: str
    tensors: dict[str, str] = field(default_factory=dict)
    header: list[str] = field(default_factory=list)
    clean: list[str] = field(default_factory=list)
    cells: dict[str, list[str]] = field(default_factory=dict)


def key(finding: Finding) -> Key:
    """Return what tells a finding from another."""
    return finding.rule, finding.severity, finding.message, finding.where.tensor or ""


def check(path: Path, base: Path | None, depth: str = "payload", weights: str = "") -> Outcome:
    """Check a checkpoint in this process."""
    stated = weights if base is not None and weights else None
    try:
        report: Report = verifier.check(
            path,
            base=base,
            depth=depth,  # type: ignore[arg-type]
            weights=stated,
        )
    except Exception as error:  # noqa: BLE001  (a crash is an outcome here)
        return Outcome("crash", crash=f"{type(error).__name__}: {error}")
    found = tuple(f for f in report.findings if f.severity != "info")
    reasons = " ".join(c.reason for c in report.coverage)
    text = f"{reasons} {report.summary} {' '.join(f.message for f in report.findings)}"
    return Outcome(NEW_WORDS.get(report.verdict, report.verdict), found, text)


def names(finding: Finding, corruption: Corruption, place: str) -> bool:
    """Whether a finding names what a corruption broke."""
    text = f"{finding.where.tensor or ''} {finding.message}"
    unrolled = re.sub(r"experts\.\d+\.", "experts.", text)
    stacked = place.replace("switch_mlp.", "experts.")
    return (
        (not corruption.rules or finding.rule in corruption.rules.split())
        and (place in text or stacked in unrolled)
        and re.search(corruption.words, finding.message, re.IGNORECASE) is not None
    )


def grade(corruption: Corruption, place: str, clean: Outcome, broken: Outcome, base: bool) -> str:
    """Return the grade of what a check said about a corrupted checkpoint.

    ``exact``: it failed, and a finding that the clean twin lacks names the cause. ``other``: it
    failed by other findings, whose rules follow.
    """
    if broken.crash:
        return f"{CRASH} {broken.crash}"
    before = clean.keys()
    new = [f for f in broken.findings if key(f) not in before]
    if broken.verdict == FAILED and any(names(f, corruption, place) for f in new):
        return EXACT
    if broken.verdict == FAILED and new:
        return f"{OTHER} {' '.join(sorted({f.rule for f in new}))}"
    if broken.verdict == INCONCLUSIVE:
        return INCONCLUSIVE
    if corruption.needs_base and not base:
        return NEEDS_BASE
    warned = " ".join(sorted({f.rule for f in new}))
    return f"{OTHER} {warned} (warning)" if warned else MISSED


def describe(fmt: Format, outcome: Outcome) -> str:
    """Return the verdict on a clean checkpoint, with its errors, its warnings in brackets, and
    ``unnamed`` where the verdict is inconclusive and nothing names the format.
    """
    if outcome.crash:
        return f"{CRASH} {outcome.crash}"
    errors = sorted({f.rule for f in outcome.findings if f.severity == "error"})
    warnings = sorted({f.rule for f in outcome.findings if f.severity == "warning"})
    parts = [outcome.verdict, *errors, *(f"({rule})" for rule in warnings)]
    if outcome.verdict == INCONCLUSIVE:
        named = fmt.known_as and re.search(fmt.known_as, outcome.text, re.IGNORECASE)
        parts += [] if named else [UNNAMED]
    return " ".join(parts)


@dataclass(frozen=True)
class Broken:
    """A corrupted checkpoint in memory, and the place of its corruption."""

    corruption: Corruption
    checkpoint: Checkpoint
    place: str


def corrupted(
    fmt: Format, clean: Checkpoint, corruptions: Sequence[Corruption]
) -> Iterator[Broken]:
    """Yield a clean checkpoint with each corruption that the format has a place for."""
    for corruption in corruptions:
        copy = clean.copy()
        try:
            place = corruption.edit(copy, fmt)
        except NotApplicable:
            continue
        if differs(copy, clean):
            yield Broken(corruption, copy, place)


def differs(one: Checkpoint, other: Checkpoint) -> bool:
    """Whether two checkpoints differ in a tensor or a JSON file; unchanged arrays are shared."""
    same = one.tensors.keys() == other.tensors.keys() and all(
        array is other.tensors[name] for name, array in one.tensors.items()
    )
    return not same or one.json != other.json


def run(fmt: Format, home: Path, corruptions: Sequence[Corruption] = CORRUPTIONS) -> Row:
    """Check a format clean and corrupted, in a folder that is empty again afterwards."""
    clean, base = build(fmt)
    folder, base_folder = clean.write(home / "clean"), base.write(home / "base")
    row = Row(fmt.name, layout(fmt))
    row.header = [describe(fmt, check(folder, b, "header")) for b in (None, base_folder)]
    without = check(folder, None)
    with_base = check(folder, base_folder, weights=fmt.weights)
    row.clean = [describe(fmt, without), describe(fmt, with_base)]
    for broken in corrupted(fmt, clean, corruptions):
        path = broken.checkpoint.write(home / "broken")
        row.cells[broken.corruption.name] = [
            grade(
                broken.corruption,
                broken.place,
                twin,
                check(path, b, weights=fmt.weights),
                b is not None,
            )
            for twin, b in ((without, None), (with_base, base_folder))
        ]
        shutil.rmtree(path)
    shutil.rmtree(folder)
    shutil.rmtree(base_folder)
    return row


def grade_of(text: str) -> str:
    """Return a grade without what follows it."""
    return NEEDS_BASE if text == NEEDS_BASE else text.split()[0]


def shortfalls(row: Row) -> list[str]:
    """Return what is wrong in a row: ``clean``, and the corruptions that are not named.

    A clean checkpoint passes, or is inconclusive where its format is only recognised and the
    report names it; then a corruption may be inconclusive too.
    """
    fmt = FORMATS[row.name]
    allowed = {EXACT, NEEDS_BASE} | ({INCONCLUSIVE} if fmt.known_as else set())
    wrong = [] if _sound(fmt, row) else ["clean"]
    for name, pair in row.cells.items():
        if name in fmt.unknowable:
            allowed_here = allowed | {MISSED, INCONCLUSIVE, OTHER}
        else:
            allowed_here = allowed
        if any(grade_of(text) not in allowed_here for text in pair):
            wrong.append(name)
    return wrong


def _sound(fmt: Format, row: Row) -> bool:
    """Whether a clean checkpoint gets the right verdict."""
    sound = {PASSED, INCONCLUSIVE} if fmt.known_as else {PASSED}
    words = [text.split() for text in (*row.header, *row.clean)]
    return all(w[0] in sound and UNNAMED not in w for w in words)
