# SPDX-License-Identifier: Apache-2.0
"""The family-wise decision, lengths, repeats, and one look per run of a suite."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from tests.results import scored_run
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Pair
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.options import ScoringOptions
from verifier.gate.run_file import Run, RunHeader
from verifier.gate.scorers.completions import CUT_OFF, END_TOKEN, CompletionRecorder
from verifier.gate.statistics import repeated_answers_loss
from verifier.gate.suite.decision import (
    Compared,
    decided,
    measured,
    outcome_of,
    p_outside,
    repeats_needed,
)
from verifier.gate.suite.result import EntryResult
from verifier.gate.suite.run import length_margin_of

LENGTH = length_margin_of("5%")


def run_of(wrong: np.ndarray, completion: np.ndarray, weights: str, repeats: int = 1) -> Run:
    count = len(wrong)
    header = RunHeader(
        model=f"/{weights}",
        weights_sha256=weights * 64,
        key={"protocol": "task", "metric": "acc", "window": 1, "corpus": "t", "documents": count},
        environment={},
        documents=[f"{i:016x}" for i in range(count)],
        groups=[i // repeats for i in range(count)] if repeats > 1 else [],
    )
    arrays = {
        "sums": wrong.astype(np.float64),
        "tokens": np.ones(count, np.int64),
        "completion": completion.astype(np.int64),
        "finish": np.full(count, END_TOKEN, np.int32),
    }
    return Run(header, arrays)


def entry_of(
    candidate_wrong: np.ndarray,
    candidate_length: np.ndarray,
    *,
    repeats: int = 1,
    cut_off: bool = False,
) -> EntryResult:
    """Return an entry whose base has half of its answers wrong, and completions of 100 tokens."""
    count = len(candidate_wrong)
    base = run_of(np.arange(count) % 2, np.full(count, 100), "a", repeats)
    candidate = run_of(candidate_wrong, candidate_length, "b", repeats)
    if cut_off:
        for run in (base, candidate):
            run.arrays["finish"][:] = CUT_OFF
    gate = compare_runs(base, candidate, Margin(0.02, "given"))
    return measured("entry", Compared(base, candidate, gate, LENGTH, repeats))


def alike(count: int) -> np.ndarray:
    return np.arange(count) % 2


def spread_lengths(count: int, mean: float) -> np.ndarray:
    return np.round(mean * (1 + 0.2 * np.tile([-1, 1], count // 2)))


@pytest.mark.parametrize(
    ("mean", "cut_off", "outcome", "reason"),
    [
        (100, False, "passed", ""),
        (112, False, "failed", "length ratio 1.120"),
        (88, False, "failed", "length ratio 0.880"),
        (105, False, "inconclusive", "is at the margin"),
        (104, False, "inconclusive", "items would decide"),
        (100, True, "inconclusive", "100% of the completions are cut off"),
    ],
)
def test_the_length_decides_on_both_sides(
    mean: float, cut_off: bool, outcome: str, reason: str
) -> None:
    entry = entry_of(alike(1000), spread_lengths(1000, mean), cut_off=cut_off)
    (found,) = decided([entry], 0.05)
    assert found.outcome == outcome, found.reasons
    assert reason in "; ".join(found.reasons)
    loss = found.criterion("loss")
    assert loss is not None
    assert loss.status == "within"


def test_holm_divides_one_error_over_all_criteria_of_all_entries() -> None:
    wrong = alike(1000)
    wrong[:88:2] = 1  # 44 answers that only the base gets right, against a margin of 20
    weak = entry_of(wrong, np.full(1000, 100))
    (loss, length) = weak.criteria
    assert (loss.measure, length.measure) == ("loss", "length")
    assert 0.05 / 20 < loss.p_value < 0.05
    assert [e.outcome for e in decided([weak], 0.05)] == ["failed"]
    many = [weak] + [entry_of(alike(1000), np.full(1000, 100))] * 9
    outcomes = [e.outcome for e in decided(many, 0.05)]
    assert outcomes == ["inconclusive"] + ["passed"] * 9
    assert outcome_of(decided(many, 0.05)) == "inconclusive"
    assert outcome_of(decided(many[1:], 0.05)) == "passed"


def test_recovery_is_candidate_over_base() -> None:
    wrong = alike(1000)
    wrong[:50:2] = 1
    entry = entry_of(wrong, np.full(1000, 100))
    assert entry.scores == (0.5, 0.475)
    recovery = entry.recovery
    assert recovery is not None
    assert recovery.value == pytest.approx(0.95)
    assert recovery.low < 0.95 < recovery.high < 1


def test_repeats_are_clustered_by_item() -> None:
    """Every answer of an item is lost or won together: 8 answers show no more than one."""
    items = np.tile([1, 0, 0, 1], 25)
    once = entry_of(items, np.full(100, 100))
    eight = entry_of(np.repeat(items, 8), np.full(800, 100), repeats=8)
    assert (once.items, eight.items, eight.repeats) == (100, 100, 8)
    base = run_of(np.repeat(alike(100), 8), np.full(800, 100), "a", 8)
    candidate = run_of(np.repeat(items, 8), np.full(800, 100), "b", 8)
    gate = compare_runs(base, candidate, Margin(0.02, "given"))
    assert gate.interval is not None
    assert gate.interval.documents == 100
    assert gate.interval.se == pytest.approx(math.sqrt(0.5 / 99), rel=0.02)


@pytest.mark.parametrize("lost", [0, 1, 3, 10, 30])
def test_the_bound_of_few_lost_items_is_that_of_a_poisson_count(lost: int) -> None:
    differences = np.zeros(20_000)
    differences[:lost] = 1
    exact = stats.chi2.ppf(0.95, 2 * (lost + 1)) / 2
    assert repeated_answers_loss(differences).high * 20_000 == pytest.approx(exact, rel=0.01)


def test_how_many_repeats_have_the_error_of_more_items() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 1, (4000, 4))
    assert repeats_needed(noise, 8000) == pytest.approx(8, abs=1)  # no variance between items
    items = rng.normal(0, 1, (4000, 1)) + np.zeros((4000, 4))
    assert repeats_needed(items, 8000) is None  # no variance within them
    assert repeats_needed(noise[:, :1], 8000) is None


def test_outside_an_interval_is_one_test_on_both_sides() -> None:
    interval = repeated_answers_loss(np.zeros(1000))
    wide = np.linspace(0.1, 10, 5)
    p_values = [p_outside(interval, margin * interval.se) for margin in wide]
    assert p_values == sorted(p_values)
    assert p_outside(interval, 1e-12) == pytest.approx(1.0)


class Model:
    """Stands for a checkpoint whose weights are digested already."""

    def __init__(self, digest: str) -> None:
        self.uri, self.weights_sha256, self.files = digest, digest, dict[str, int]()


def pair(*texts: str) -> Pair:
    corpus = Corpus("c", "", documents_digest(texts), texts=texts)
    return Pair(Model("candidate"), Model("base"), ScoringOptions(corpus))  # type: ignore[arg-type]


def test_one_run_of_a_suite_is_one_look_at_the_question_of_its_entries(tmp_path: Path) -> None:
    margin = Margin(0.005, "given")
    failed = compare_runs(scored_run(0, "a"), scored_run(1, "b", 0.01), margin)
    attempts = Attempts(tmp_path)
    for texts in (("a", "b"), ("x", "y")):
        attempts.record(pair(*texts), failed, 1.0, [margin], suite="one run")
    assert attempts.look(pair("new"), [margin]).number == 2
    for texts in (("p", "q"), ("r", "s")):
        attempts.record(pair(*texts), failed, 1.0, [margin])
    assert attempts.look(pair("new"), [margin]).number == 4


class Tokens:
    """Stands for lm-eval's adapter: a token is a letter, and z is the end token."""

    def __init__(self, rows: list[str]) -> None:
        self.rows, self.model, self.eot_token_id = rows, self, ord("z")
        self.generation_config, self.eos_token_id = self, None

    def set_cache_hook(self, hook: CompletionRecorder) -> None:
        self.hook = hook

    def tok_decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens)).replace("z", "")

    def _model_generate(self, context: np.ndarray, max_length: int, stop: list[str]) -> np.ndarray:
        return np.array([[0] * context.shape[1] + [ord(c) for c in row] for row in self.rows])


@pytest.mark.parametrize(
    ("row", "tokens", "finish"),
    [("abcdef", 6, 2), ("abzzzz", 3, 0), ("ab..de", 4, 1), ("az..de", 2, 0), ("a...z.", 3, 1)],
)
def test_a_completion_ends_at_its_first_end_token_or_stop_sequence(
    row: str, tokens: int, finish: int
) -> None:
    adapter = Tokens([row])
    recorder = CompletionRecorder(adapter)
    adapter._model_generate(np.zeros((1, 3)), max_length=9, stop=["..", ""])
    recorder.add_partial("generate_until", ("prompt", {}), "")
    found = recorder.take("prompt")
    assert (found.tokens, found.finish) == (tokens, finish)
