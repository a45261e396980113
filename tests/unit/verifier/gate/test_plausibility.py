# SPDX-License-Identifier: Apache-2.0
"""What is never passed: results that are too good, scores that no model gives, few documents."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.results import KEY, scored_run
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.evaluation import GateResult, Margin, gate_result_of
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import load_corpus
from verifier.gate.render import render_text
from verifier.gate.run_file import Run, sums_of

BASE, GOOD = scored_run(0, "a"), scored_run(1, "b", 0.01)
WIDE = Margin(0.077, "given")


def with_nats(run: Run, nats: np.ndarray, **header: Any) -> Run:
    """Return a run with other losses per token."""
    arrays = run.arrays | {"nats": nats, "sums": sums_of(nats, run.tokens)}
    return Run(run.header.model_copy(update=header), arrays)


def constant(run: Run, value: float) -> Run:
    return with_nats(run, np.full(len(run.arrays["nats"]), value, np.float32))


def task(right: np.ndarray, weights: str, chance: float | None) -> Run:
    count = len(right)
    run = scored_run(0, weights, documents=count, chance=chance)
    header = run.header.model_copy(update={"key": KEY | {"protocol": "task", "documents": count}})
    return Run(header, {"sums": 1.0 - right, "tokens": np.ones(count, np.int64)})


def answers(right: int, count: int = 500) -> np.ndarray:
    return np.arange(count) < right


def doubtful(result: GateResult, reason: str) -> None:
    assert result.outcome == "inconclusive"
    assert any(reason in doubt for doubt in result.doubts), result.doubts
    assert f"doubt    {result.doubts[0]}" in render_text(result)
    assert gate_result_of(result.as_json()).doubts == result.doubts


def test_a_gain_that_quantization_does_not_explain() -> None:
    doubtful(compare_runs(BASE, scored_run(1, "b", -0.2), WIDE), "better than its base by 18")
    # A gain within 1% of perplexity may be, on text that the model was not made for.
    assert compare_runs(BASE, scored_run(1, "b", -0.008), WIDE).outcome == "passed"


def test_a_base_that_is_worse_than_uniform() -> None:
    size = int(math.exp(BASE.sums.sum() / BASE.tokens.sum()))
    for vocabulary, outcome in ((size, "inconclusive"), (2 * size, "passed")):
        base = scored_run(0, "a", vocab_size=vocabulary)
        result = compare_runs(base, GOOD, WIDE)
        assert result.outcome == outcome
    doubtful(compare_runs(scored_run(0, "a", vocab_size=size), GOOD, WIDE), "uniform guess")


@pytest.mark.parametrize("value", [0.0, 2.5])
def test_log_probabilities_that_are_constant(value: float) -> None:
    doubtful(compare_runs(BASE, constant(GOOD, value), Margin(9.0, "given")), "one and the same")
    doubtful(compare_runs(constant(BASE, value), GOOD, Margin(9.0, "given")), "the base's tokens")


def test_one_model_scored_twice() -> None:
    again = with_nats(GOOD, BASE.arrays["nats"])
    doubtful(compare_runs(BASE, again, WIDE), "bit for bit")


def test_an_accepted_run_of_the_candidate_itself_is_refused() -> None:
    drift = Margin(0.003, "default")
    with pytest.raises(UsageError, match="the accepted run is of the candidate itself"):
        compare_runs(BASE, GOOD, WIDE, drift_against=GOOD, drift_margin=drift)
    broken = scored_run(2, "c", nonfinite=[1])
    with pytest.raises(IncomparableError, match="the accepted run has logits"):
        compare_runs(BASE, GOOD, WIDE, drift_against=broken, drift_margin=drift)


@pytest.mark.parametrize(
    ("right", "chance", "outcome"),
    [
        (125, 0.25, "inconclusive"),
        (180, 0.25, "passed"),
        (0, 0.0, "inconclusive"),
        (125, None, "passed"),
    ],
)
def test_a_base_at_chance_on_a_task(right: int, chance: float | None, outcome: str) -> None:
    base, candidate = (task(answers(right), weights, chance) for weights in "ab")
    result = compare_runs(base, candidate, Margin(0.15, "given"))
    assert result.outcome == outcome
    if outcome == "inconclusive":
        doubtful(result, "not shown to be better than guessing")


def test_a_task_in_which_the_candidate_is_far_better() -> None:
    base, candidate = task(answers(150), "a", 0.25), task(answers(300), "b", 0.25)
    doubtful(compare_runs(base, candidate, Margin(0.15, "given")), "30.00% of accuracy")


def test_fewer_than_eight_distinct_documents_do_not_pass() -> None:
    for count, outcome in ((7, "inconclusive"), (8, "passed")):
        runs = [scored_run(s, w, 0.01 * s, documents=count) for s, w in ((0, "a"), (1, "b"))]
        assert compare_runs(*runs, WIDE).outcome == outcome
    # A loss that is shown stays shown.
    lost = scored_run(1, "b", 2.0, documents=4)
    assert compare_runs(scored_run(0, "a", documents=4), lost, WIDE).outcome == "failed"


def test_one_document_has_no_interval() -> None:
    runs = [scored_run(s, w, 0.01 * s, documents=1) for s, w in ((0, "a"), (1, "b"))]
    text = render_text(compare_runs(*runs, WIDE))
    assert "one document has no interval" in text
    assert "inf" not in text
    assert "nan" not in text


def test_a_repeated_document_counts_once() -> None:
    """The documents of one corpus, and the best of them repeated until its mean would pass."""
    base, candidate = scored_run(0, "a", documents=12), scored_run(1, "b", 0.03, documents=12)
    margin = Margin(0.029, "given")
    plain = compare_runs(base, candidate, margin)
    best = int(np.argmin((candidate.sums - base.sums) / base.tokens))
    repeated = [repeat(run, best, 30) for run in (base, candidate)]
    result = compare_runs(*repeated, margin)
    assert result.interval == plain.interval
    assert result.perplexity_base == plain.perplexity_base
    assert result.outcome == plain.outcome != "passed"
    assert "30 documents repeat an earlier one and count once" in result.notes
    once = [repeat(scored_run(s, w, 0.01 * s, documents=1), 0, 40) for s, w in ((0, "a"), (1, "b"))]
    doubtful(compare_runs(*once, WIDE), "1 distinct document")


def repeat(run: Run, document: int, times: int) -> Run:
    """Return a run with a document's scores, and its digest, appended some times."""
    end = int(run.tokens[: document + 1].sum())
    part = slice(end - int(run.tokens[document]), end)
    arrays = {
        name: np.concatenate([values, *[values[part]] * times])
        for name, values in run.arrays.items()
        if name not in ("sums", "tokens")
    }
    arrays["tokens"] = np.append(run.tokens, [run.tokens[document]] * times)
    arrays["sums"] = sums_of(arrays["nats"], arrays["tokens"])
    digests = run.header.documents
    header = run.header.model_copy(update={"documents": digests + [digests[document]] * times})
    return Run(header, arrays)


def test_documents_of_one_group_are_one_cluster() -> None:
    """Four parts of each book: as many documents, a quarter of the evidence."""
    rng = np.random.default_rng(5)
    effects = np.repeat(rng.normal(0.01, 0.02, 10), 4)
    per_token = np.repeat(effects, BASE.tokens).astype(np.float32)
    candidate = with_nats(GOOD, BASE.arrays["nats"] + per_token + np.float32(0.05))
    groups = [i // 4 for i in range(40)]
    apart = compare_runs(BASE, candidate, WIDE)
    books = [
        replace(r, header=r.header.model_copy(update={"groups": groups})) for r in (BASE, candidate)
    ]
    together = compare_runs(*books, WIDE)
    assert apart.interval is not None
    assert together.interval is not None
    assert together.interval.documents == 10
    assert together.interval.delta == pytest.approx(apart.interval.delta, abs=1e-12)
    assert together.interval.se > 1.5 * apart.interval.se
    assert "over 10 groups" in render_text(together)


def test_groups_of_a_corpus(tmp_path: Path) -> None:
    file = tmp_path / "books.jsonl"
    rows = [{"text": f"chapter {i}", "group": f"book {i // 3}"} for i in range(7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = load_corpus(str(file))
    assert corpus.group_numbers == (0, 0, 0, 1, 1, 1, 2)
    assert corpus.head(4).group_numbers == (0, 0, 0, 1)
    del rows[2]["group"]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ContentError, match="6 of 7 documents have a group"):
        load_corpus(str(file))


def test_logits_of_the_base_that_are_not_finite_are_said_to_be_the_bases() -> None:
    text = render_text(compare_runs(scored_run(0, "a", nonfinite=[2, 3]), GOOD, WIDE))
    assert "the base's logits are not finite in 2 documents (#2, #3)" in text
    assert "the candidate's" not in text
    text = render_text(compare_runs(BASE, scored_run(1, "b", nonfinite=[5]), WIDE))
    assert "the candidate's logits are not finite in 1 document (#5)" in text


def test_without_a_record_earlier_attempts_are_unknown() -> None:
    unknown, first = compare_runs(BASE, GOOD, WIDE), compare_runs(BASE, GOOD, WIDE, looks=1)
    assert (unknown.alpha, first.alpha) == (0.05, 0.025)
    assert any("earlier attempts are unknown" in note for note in unknown.notes)
    assert not any("unknown" in note for note in first.notes)
