# SPDX-License-Identifier: Apache-2.0
"""Every sound method passes and every broken twin fails; what a check says without the option."""

from __future__ import annotations

import random
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import verifier
from tests.formats import methods_page
from tests.formats.formats import build
from tests.formats.methods import METHODS, ONE_BLOCK, TWINS, Method, rows_swapped, run, shortfalls
from tests.mutation import harmless, image
from verifier.errors import UsageError
from verifier.run.merge import merge_reports

SAMPLE = 2
STATED = [m for m in METHODS.values() if m.format.weights]


def _sample(name: str) -> list[str]:
    """Return the twins that are tried here, the same on every run."""
    twins = list(methods_page.read()[name].twins)
    return random.Random(f"methods {name}").sample(twins, SAMPLE)  # noqa: S311


@pytest.mark.parametrize("name", METHODS)
def test_sound_methods_pass_and_their_twins_fail(name: str, tmp_path: Path) -> None:
    result = run(METHODS[name], tmp_path, _sample(name))
    assert len(result.twins) == SAMPLE
    assert shortfalls(result) == [], result


def test_committed_results_have_no_shortfall() -> None:
    results = methods_page.read()
    assert list(results) == list(METHODS)
    assert {n: shortfalls(r) for n, r in results.items() if shortfalls(r)} == {}
    for name, result in results.items():
        extra = {"fold lost"} if METHODS[name].format.weights != "folded" else set()
        assert set(TWINS) - set(result.twins) <= extra | {ONE_BLOCK}, name


def test_page_is_rendered_from_the_results() -> None:
    assert methods_page.PAGE.read_text(encoding="utf-8") == methods_page.render()


@pytest.mark.parametrize("method", STATED, ids=lambda m: m.name)
def test_moved_weights_are_one_finding_that_names_the_option(
    method: Method, tmp_path: Path
) -> None:
    clean, base = build(method.format)
    path, base_path = clean.write(tmp_path / "clean"), base.write(tmp_path / "base")
    report = verifier.check(path, base=base_path, depth="payload")
    (finding,) = (f for f in report.findings if f.severity != "info")
    assert (report.verdict, finding.rule) == ("failed", "QC519")
    assert f"--weights {method.format.weights}" in finding.expected


@pytest.mark.parametrize("stated", ["moved", "rotated", "folded"])
@pytest.mark.parametrize("method", STATED, ids=lambda m: m.name)
def test_a_wrong_statement_fails(method: Method, stated: str, tmp_path: Path) -> None:
    if stated == method.format.weights:
        pytest.skip("a right statement")
    if stated == "moved" and method.name == "nvfp4_folded_0.3":
        pytest.skip("small factors are small changes too")
    clean, base = build(method.format)
    path, base_path = clean.write(tmp_path / "clean"), base.write(tmp_path / "base")
    report = verifier.check(path, base=base_path, depth="payload", weights=stated)
    assert report.verdict == "failed"
    assert "QC519" in {f.rule for f in report.findings if f.severity == "error"}


@pytest.mark.parametrize("name", ["nvfp4_folded_0.3", "ct_rotated", "nvfp4_trained_20"])
def test_findings_depend_neither_on_workers_nor_on_subsets(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("verifier.run.schedule.WORTH_COPIES", 1)
    fmt = METHODS[name].format
    clean, base = build(fmt)
    rows_swapped(clean, fmt)
    whole = image.read(clean.write(tmp_path / "whole"))
    harmless.cut_into_shards(whole, np.random.default_rng(0))
    path, base_path = whole.write(tmp_path / "shards"), base.write(tmp_path / "base")
    check = partial(
        verifier.check, path, base=base_path, depth="payload", weights=fmt.weights or None
    )
    one, copied = check(workers=1), check(workers=3)
    merged = merge_reports([check(subset=f"{n}/2") for n in (1, 2)])
    assert {"QC519"} < {f.rule for f in one.findings}
    assert one.findings == copied.findings == merged.findings


@pytest.mark.parametrize("stated", ["moved", "rotated", "folded"])
def test_a_statement_about_weights_that_are_the_base_s_is_a_note(
    stated: str, tmp_path: Path
) -> None:
    clean, base = build(METHODS["nvfp4_max"].format)
    path, base_path = clean.write(tmp_path / "clean"), base.write(tmp_path / "base")
    report = verifier.check(path, base=base_path, depth="payload", weights=stated)
    assert report.verdict == "passed"
    assert [(f.rule, f.severity) for f in report.findings] == [("QC519", "info")]


def test_an_unknown_statement_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="one of base, moved, rotated, folded"):
        verifier.check(tmp_path, weights="turned")
