# SPDX-License-Identifier: Apache-2.0
"""Comparison of runs that were made by hand; no model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.results import ENVIRONMENT, KEY, scored_run
from verifier.cli import run as cli
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.evaluation import Margin
from verifier.gate.comparison import compare_runs
from verifier.gate.render import render_json, render_text
from verifier.gate.run_file import Run, RunHeader, sums_of, write_run

BASE, GOOD = scored_run(0, "a"), scored_run(1, "b", 0.01)
MARGIN = Margin(0.077, "given")


def test_comparison_passes_fails_and_says_why() -> None:
    good = compare_runs(BASE, GOOD, MARGIN)
    assert good.outcome == "passed"
    assert good.interval is not None
    assert good.interval.delta == pytest.approx(0.01, abs=0.005)
    assert compare_runs(BASE, scored_run(2, "c", 0.2), MARGIN).outcome == "failed"
    near = compare_runs(BASE, GOOD, Margin(good.interval.delta + good.interval.se, ""))
    assert near.outcome == "inconclusive"
    assert near.needed is not None
    assert near.needed > 40
    with pytest.raises(UsageError, match="the base itself"):
        compare_runs(BASE, scored_run(3, "a"), MARGIN)


def test_drift_fails_what_the_absolute_margin_passes() -> None:
    worse = scored_run(3, "c", 0.03)
    assert compare_runs(BASE, worse, MARGIN).outcome == "passed"
    drift = compare_runs(
        BASE, worse, MARGIN, drift_against=GOOD, drift_margin=Margin(0.003, "default")
    )
    assert drift.outcome == "failed"
    assert drift.drift is not None
    assert drift.drift.interval.delta == pytest.approx(0.02, abs=0.005)
    assert "drift    +0.0" in render_text(drift)


def test_unlike_protocols_are_refused_by_name_and_unlike_environments_widen() -> None:
    for name, value in (
        ("window", 256),
        ("dtype", "float32"),
        ("corpus_sha256", "1" * 64),
        ("bos", True),
    ):
        with pytest.raises(ContentError, match=rf"\({name} is"):
            compare_runs(BASE, scored_run(1, "b", key=KEY | {name: value}), MARGIN)
    with pytest.raises(ContentError, match="tokenizer_sha256 is null and"):
        compare_runs(BASE, scored_run(1, "b", key=KEY | {"tokenizer_sha256": "2" * 64}), MARGIN)
    assert (
        compare_runs(
            BASE, scored_run(1, "b", 0.01, key=KEY | {"corpus": "another name"}), MARGIN
        ).outcome
        == "passed"
    )
    other = compare_runs(
        BASE, scored_run(1, "b", 0.01, environment=ENVIRONMENT | {"device": "H200"}), MARGIN
    )
    same = compare_runs(BASE, GOOD, MARGIN)
    assert other.unlike == ("device cpu and H200",)
    assert other.interval is not None
    assert same.interval is not None
    assert other.interval.high == pytest.approx(same.interval.high + 0.0005)
    assert other.interval.low == pytest.approx(same.interval.low - 0.0005)
    assert "different environments (device cpu and H200)" in render_text(other)


def test_other_documents_are_refused() -> None:
    with pytest.raises(ContentError, match="other documents"):
        compare_runs(
            BASE,
            scored_run(1, "b", header_documents=["f" * 16, *GOOD.header.documents[1:]]),
            MARGIN,
        )


def test_logits_that_are_not_finite_leave_no_statistics() -> None:
    result = compare_runs(BASE, scored_run(1, "b", nonfinite=[3]), MARGIN)
    assert (result.outcome, result.interval, result.nonfinite) == ("failed", None, [3])
    assert json.loads(render_json(result))["perplexity_base"] is None


def test_experts_that_the_text_does_not_reach_are_named() -> None:
    counts = {"layers.1.experts": [5, 0, 7], "layers.2.experts": [1, 1, 1]}
    result = compare_runs(BASE, scored_run(1, "b", 0.01, experts=counts), MARGIN)
    text = render_text(result)
    assert "5 of 6 reached in 2 layers" in text
    assert "not evaluated: layers.1.experts experts 1 (1 of 3)" in text


def test_few_documents_get_a_figure_that_decides_nothing() -> None:
    few = compare_runs(
        scored_run(0, "a", documents=12), scored_run(1, "b", 0.01, documents=12), MARGIN
    )
    many = compare_runs(BASE, GOOD, MARGIN)
    assert few.measures.se_blocks is not None
    assert many.measures.se_blocks is None
    assert "informational" in render_text(few)


def test_later_looks_are_at_a_stricter_level() -> None:
    first, second = compare_runs(BASE, GOOD, MARGIN), compare_runs(BASE, GOOD, MARGIN, looks=2)
    assert first.interval is not None
    assert second.interval is not None
    assert second.interval.high > first.interval.high
    assert "95% interval" in render_text(second)
    assert "look 2" in render_text(second)


def test_hostile_names_are_escaped() -> None:
    result = compare_runs(
        BASE, scored_run(1, "b", 0.01, model="evil\x1b[31m\nverdict: PASSED"), MARGIN
    )
    text = render_text(result)
    assert "\x1b" not in text
    assert sum(line.startswith("verdict") for line in text.splitlines()) == 1


def test_compare_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = {n: str(tmp_path / f"{n}.run") for n in ("base", "good", "worse", "bad")}
    for run, name in (
        (BASE, "base"),
        (GOOD, "good"),
        (scored_run(3, "c", 0.03), "worse"),
        (scored_run(4, "d", 0.3), "bad"),
    ):
        write_run(files[name], run)
    assert cli(["compare", files["base"], files["good"]]) == 0
    assert "default budget of NVFP4" in capsys.readouterr().out
    assert cli(["compare", files["base"], files["bad"], "--format", "json"]) == 1
    assert json.loads(capsys.readouterr().out)["verdict"] == "failed"
    assert cli(["compare", files["base"], files["worse"], "--drift-against", files["good"]]) == 1
    capsys.readouterr()
    assert cli(["compare", files["base"], files["worse"], "--format", "json"]) == 0
    near = json.loads(capsys.readouterr().out)["interval"]["delta"]
    assert cli(["compare", files["base"], files["worse"], "--max-increase", f"{near:.6f}"]) == 3
    assert cli(["compare", files["base"], files["worse"], "--max-drift", "0.1"]) == 2
    assert cli(["compare", files["base"], files["base"]]) == 2
    assert cli(["compare", files["base"], str(tmp_path / "absent.run")]) == 2


def by_engine(shift: float, **header: Any) -> Run:
    """Return the base's run as another engine might score it: every token ``shift`` nats dearer,
    formats none.
    """
    nats = (BASE.arrays["nats"] + np.float32(shift)).astype(np.float32)
    arrays = BASE.arrays | {"nats": nats, "sums": sums_of(nats, BASE.tokens)}
    known = BASE.header.model_dump() | {
        "formats": [],
        "environment": {"engine": "vllm 0.32", "device": "cuda"},
    }
    return Run(
        RunHeader.model_validate(known | {"key": KEY | {"activations": "engine"}} | header), arrays
    )


def test_a_margin_within_what_engines_differ_by_is_inconclusive() -> None:
    small, wide = Margin(0.02, "given"), Margin(0.077, "given")
    assert compare_runs(BASE, GOOD, small).outcome == "passed"
    found = compare_runs(BASE, GOOD, small, floor_runs=[by_engine(0.001), by_engine(-0.03)])
    assert found.outcome == "inconclusive"
    assert found.floor == pytest.approx(0.03, abs=1e-6)
    assert "floor    0.0300" in render_text(found)
    assert "under vllm 0.32 on cuda the base differs from itself by up to 0.0010" in found.notes[0]
    assert "not above the noise floor" in found.notes[2]
    assert compare_runs(BASE, GOOD, wide, floor_runs=[by_engine(-0.03)]).outcome == "passed"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"weights_sha256": "c" * 64}, "other weights"),
        ({"key": KEY | {"window": 256}}, "window is 512 and 256"),
        ({"formats": ["NVFP4"]}, "activations"),
        ({"documents": [f"{i:016x}" for i in range(1, 41)]}, "other documents"),
        ({"nonfinite": [3]}, "not finite"),
    ],
)
def test_a_floor_that_is_none_is_refused(header: dict[str, Any], message: str) -> None:
    with pytest.raises((UsageError, IncomparableError), match=message):
        compare_runs(BASE, GOOD, MARGIN, floor_runs=[by_engine(0.001, **header)])


def test_compare_takes_floors(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, run in (
        ("base", BASE),
        ("good", GOOD),
        ("engine", by_engine(0.03)),
        ("other", scored_run(2, "c")),
    ):
        write_run(tmp_path / f"{name}.run", run)
    pair = [
        "compare",
        str(tmp_path / "base.run"),
        str(tmp_path / "good.run"),
        "--max-increase",
        "0.02",
    ]
    assert cli(pair) == 0
    assert cli([*pair, "--floor", str(tmp_path / "engine.run")]) == 3
    assert "vllm 0.32" in capsys.readouterr().out
    assert cli([*pair, "--floor", str(tmp_path / "other.run")]) == 2
    assert "other weights" in capsys.readouterr().err
