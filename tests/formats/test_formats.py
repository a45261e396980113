# SPDX-License-Identifier: Apache-2.0
"""Every clean format, a part of the matrix, and that no rule raises over all of it."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

import verifier
from tests.formats import render
from tests.formats.corruptions import CORRUPTIONS
from tests.formats.files import Checkpoint
from tests.formats.formats import build
from tests.formats.matrix import (
    CRASH,
    EXACT,
    FAILED,
    INCONCLUSIVE,
    MISSED,
    NEEDS_BASE,
    OTHER,
    PASSED,
    corrupted,
    differs,
    grade_of,
    run,
    shortfalls,
)
from tests.formats.table import FORMATS
from verifier.rules import all_rules

SAMPLE = 3
ORDER = (CRASH, MISSED, NEEDS_BASE, INCONCLUSIVE, OTHER, EXACT)
VERDICTS = ("crash", "error", FAILED, INCONCLUSIVE, PASSED)
WIDE = ("expert_missing", "codes_swapped", "inputs_all_missing")
"""Corruptions that are about more than one tensor."""


def sample(name: str) -> list[str]:
    """Return the corruptions that are tried on a format here, the same on every run."""
    names = [c.name for c in CORRUPTIONS if c.name in render.read()[name].cells]
    return random.Random(f"formats {name}").sample(names, SAMPLE)  # noqa: S311


@pytest.mark.parametrize("name", FORMATS)
def test_no_grade_is_worse_than_the_committed_one(name: str, tmp_path: Path) -> None:
    """The clean format and a part of its corruptions; ``python -m tests.formats --write`` writes
    better grades.
    """
    committed = render.read()[name]
    chosen = sample(name)
    row = run(FORMATS[name], tmp_path, [c for c in CORRUPTIONS if c.name in chosen])
    assert row.tensors == committed.tensors
    for new, old in zip(
        [*row.header, *row.clean], [*committed.header, *committed.clean], strict=True
    ):
        assert VERDICTS.index(new.split()[0]) >= VERDICTS.index(old.split()[0]), (new, old)
    for corruption in chosen:
        pairs = zip(row.cells[corruption], committed.cells[corruption], strict=True)
        for new, old in pairs:
            assert ORDER.index(grade_of(new)) >= ORDER.index(grade_of(old)), (corruption, new, old)


def test_page_is_rendered_from_the_results() -> None:
    assert render.PAGE.read_text(encoding="utf-8") == render.render()


def test_results_hold_every_format() -> None:
    assert list(render.read()) == list(FORMATS)


def test_every_clean_format_passes_and_every_corruption_is_named() -> None:
    wrong = {name: shortfalls(row) for name, row in render.read().items()}
    assert {name: found for name, found in wrong.items() if found} == {}


@pytest.mark.parametrize("name", FORMATS)
def test_no_rule_raises_over_a_format_clean_or_corrupted(name: str, tmp_path: Path) -> None:
    """Every rule that reads headers or bytes, with a base, and with an overlay on several ranks."""
    clean, base = build(FORMATS[name])
    base_folder, overlay = base.write(tmp_path / "base"), clean.write(tmp_path / "clean")
    folders = {"clean": overlay}
    for broken in corrupted(FORMATS[name], clean, CORRUPTIONS):
        kind = broken.corruption.name
        folders[kind] = broken.checkpoint.write(tmp_path / "broken" / kind)
    for kind, folder in folders.items():
        with_base = verifier.check(folder, base=base_folder, depth="payload")
        alone = verifier.check(folder, merged_from=overlay, depth="payload", tp=2, ep=2)
        for report in (with_base, alone):
            assert report.summary.stopped == {}, kind
        ran = {c.rule for r in (with_base, alone) for c in r.coverage if c.ran}
        assert ran == {r.id for r in all_rules().values() if r.depth in ("header", "payload")}


def test_a_stack_of_zero_scales_is_corrupted_with_its_base(tmp_path: Path) -> None:
    """A stack of gpt-oss whose scales are all zero once stopped the comparison with the base."""
    clean, base = build(FORMATS["gpt_oss_mxfp4"])
    zero = [c for c in CORRUPTIONS if c.name == "scale_zero"]
    (broken,) = (b.checkpoint for b in corrupted(FORMATS["gpt_oss_mxfp4"], clean, zero))
    stacks = [n for n, a in broken.tensors.items() if n.endswith("_scales") and not a.any()]
    assert stacks
    folder, base_folder = broken.write(tmp_path / "ckpt"), base.write(tmp_path / "base")
    report = verifier.check(folder, base=base_folder, depth="payload")
    assert report.verdict == FAILED
    assert any(f.rule == "QC512" for f in report.findings)


@pytest.mark.parametrize("name", FORMATS)
def test_a_corruption_is_one_edit(name: str) -> None:
    """The twin differs in one tensor or in the declaration, and the clean one is left alone."""
    clean, _base = build(FORMATS[name])
    before = clean.copy()
    for broken in corrupted(FORMATS[name], clean, CORRUPTIONS):
        assert not differs(clean, before), broken.corruption.name
        changed = _changed(clean, broken.checkpoint)
        if broken.corruption.name not in WIDE:
            assert len(changed) <= 1, (broken.corruption.name, changed)
        assert bool(changed) != (clean.json != broken.checkpoint.json), broken.corruption.name


def _changed(one: Checkpoint, other: Checkpoint) -> list[str]:
    names = sorted({*one.tensors, *other.tensors})
    return [n for n in names if one.tensors.get(n) is not other.tensors.get(n)]


def test_encoders_import_neither_package() -> None:
    """A check by what made the checkpoint would prove nothing."""
    folder = Path(__file__).parent
    pattern = re.compile(r"^\s*(?:from|import)\s+(verifier|exporter)\b", re.MULTILINE)
    for file in (
        "files",
        "numbers",
        "models",
        "encoders",
        "declarations",
        "formats",
        "corruptions",
    ):
        assert not pattern.search((folder / f"{file}.py").read_text()), file


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_the_same_on_every_build(name: str) -> None:
    (one, _), (two, _) = build(FORMATS[name]), build(FORMATS[name])
    assert one.json == two.json
    first, second = ({n: a.tobytes() for n, a in c.tensors.items()} for c in (one, two))
    assert first == second
