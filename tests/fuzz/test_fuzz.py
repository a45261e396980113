# SPDX-License-Identifier: Apache-2.0
"""Seeded hostile inputs: only the package's own errors, a report that can be printed, and most of
them reach the rules.
"""

from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path

import pytest

from tests.fuzz import command, engine, judge
from tests.fuzz.hostile import bombs, build, write
from verifier.schemes import Exclusions
from verifier.schemes.patterns import STEPS, compile_regex

CHUNKS = 8
RESULTS = Path(__file__).with_name("results.json")


@pytest.fixture(autouse=True)
def _no_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Time is `tox -e fuzz`'s business: under coverage and beside other tests it says nothing."""
    monkeypatch.setattr(judge, "SECONDS", float("inf"))


@pytest.mark.parametrize("seed", range(100, 100 + CHUNKS))
def test_two_thousand_seeded_inputs(seed: int) -> None:
    tally = engine.seeded(seed, 2000 // CHUNKS)
    assert tally.wrong == {}
    assert set(tally.codes) <= {0, 1, 2, 3}  # 2: the directory holds no checkpoint
    assert tally.reached * 5 > tally.runs


@pytest.mark.parametrize("name", bombs())
def test_bombs_are_findings(name: str, tmp_path: Path) -> None:
    verdict = judge.judge(write(bombs()[name], [], tmp_path / "ckpt"))
    assert (verdict.wrong, verdict.code) == ("", 1)


def test_twenty_as_command_lines() -> None:
    found = command.run(9, 20, 1)
    assert found["failures"] == {}
    assert found["runs"] == sum(found["exit_codes"].values()) == 20


def test_an_input_means_the_same_again(tmp_path: Path) -> None:
    data = random.Random(4).randbytes(40)  # noqa: S311
    assert build(data, tmp_path) == build(data, tmp_path)


def test_the_judge_hears_a_defect(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fails(*_: object, **__: object) -> None:
        raise KeyError("x")

    monkeypatch.setattr(judge.verifier, "check", fails)
    assert judge.judge(tmp_path).wrong.startswith("KeyError")


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+$",
        "(a|a)*b",
        "(.*a){25}b",
        "(x+x+)+y",
        "((a*)b)*",
        "(a{2,})*",
        "(",
        "*a",
        "a" * 2000,
        "(?:a*|b){12}",
    ],
)
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    assert compile_regex(pattern) is None


@pytest.mark.parametrize(
    ("pattern", "name", "wanted"),
    [
        (r".*self_attn.*", "model.layers.0.self_attn.q_proj", True),
        (r"model\.layers\.\d+\.mlp\.gate$", "model.layers.12.mlp.gate", True),
        (r".*(gate|up)_proj", "a.up_proj", True),
        (r"[^.]*lm_head", "lm_head", True),
        (r"[]*+(]x", "*x", True),
        (r"\(a\)*", "(a", True),
        (r"visual.*", "model.visual", False),
        (r"(a|b)?c{2}", "acc", True),
        (r".*.*.*.*z", "a" * 5000, False),
    ],
)
def test_patterns_of_releases_are_matched(pattern: str, name: str, wanted: bool) -> None:
    found = compile_regex(pattern)
    assert found is not None
    assert found.match(name) is wanted


@pytest.mark.parametrize("repeats", [1, 2, 4, 8, 13, 20])
def test_a_match_is_begun_only_where_it_ends_soon(repeats: int) -> None:
    found = compile_regex("[a-z]*" * repeats + "0")
    assert found is not None
    assert (
        math.comb(found.longest + repeats, repeats)
        <= STEPS
        < math.comb(found.longest + 1 + repeats, repeats)
    )
    assert not found.match("a" * 5000)


@pytest.mark.parametrize("pattern", [".*.*.*.*zz", r"\.*.*.*x", "[.*.*]*y", ".*.*", r"a\\.*.*"])
def test_dots_and_stars_in_a_row_are_one(pattern: str) -> None:
    found = compile_regex(pattern)
    assert found is not None
    for name in (
        "model.layers.0.zz",
        "..x",
        "x",
        ".*y",
        "a\\bc",
        "model.layers.0.mlp.gate_proj",
        "",
    ):
        assert found.match(name) is (re.match(pattern, name) is not None)


def test_a_long_list_reads_as_a_short_one() -> None:
    short = ["lm_head", "model.layers.1.mlp.gate", "layers.0.self_attn", "vision*"]
    long = Exclusions([*short, *(f"model.layers.{i}.x.{i}" for i in range(100, 3000))])
    names = (
        "lm_head",
        "a.lm_head.b",
        "model.layers.0.self_attn.q_proj",
        "vision_tower.x",
        "model.layers.2.mlp.gate",
        "x",
    )
    for name in names:
        assert long.loose(name) == Exclusions(short).loose(name), name
    dead = long.dead(["lm_head", "model.layers.1.mlp.gate", "vision.a"])
    assert set(dead) >= {"layers.0.self_attn", "model.layers.100.x.100"}


def test_too_many_wildcards_are_a_finding(tmp_path: Path) -> None:
    import verifier

    path = write(bombs()["many-patterns"], [], tmp_path / "ckpt")
    assert any("wildcards" in f.message for f in verifier.check(path).by_rule("QC407"))


def test_committed_results_have_no_failure() -> None:
    found = json.loads(RESULTS.read_text())
    assert (found["failures"], found["commands"]["failures"]) == ({}, {})
    assert found["runs"] >= 100_000
    assert found["reached_the_rules"] * 5 > found["runs"]
    assert found["peak_megabytes"] <= engine.MEGABYTES
