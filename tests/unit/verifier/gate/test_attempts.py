# SPDX-License-Identifier: Apache-2.0
"""No re-rolls: whatever a later attempt changes, it has its share of one error or is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.results import scored_run
from verifier.errors import UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Look, Pair
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.decision import alpha_of
from verifier.gate.jobs import Scorer
from verifier.gate.options import ScoringOptions
from verifier.gate.statistics import moments, scipy_stats

BASE, GOOD = scored_run(0, "a"), scored_run(1, "b", 0.01)
MARGIN, WIDE = Margin(0.005, "given"), Margin(0.077, "default")
PASSED, FAILED = (compare_runs(BASE, GOOD, margin) for margin in (WIDE, MARGIN))


class Model:
    """Stands for a checkpoint whose weights are digested already."""

    def __init__(self, digest: str) -> None:
        self.uri, self.weights_sha256, self.files = digest, digest, dict[str, int]()


def pair(*texts: str, candidate: str = "candidate", seq_len: int = 512, **options: object) -> Pair:
    corpus = Corpus("c", "", documents_digest(texts), texts=texts)
    scoring = ScoringOptions(corpus, seq_len=seq_len, **options)  # type: ignore[arg-type]
    return Pair(Model(candidate), Model("base"), scoring)  # type: ignore[arg-type]


@pytest.fixture
def attempts(tmp_path: Path) -> Attempts:
    """Return a cache in which one candidate failed on two documents."""
    attempts = Attempts(tmp_path)
    assert attempts.look(pair("a", "b"), [MARGIN]) == Look()
    assert attempts.last_spread(pair("a")) is None
    attempts.record(pair("a", "b"), FAILED, 3.0, [MARGIN])
    return attempts


@pytest.mark.parametrize(
    ("second", "margin", "remark"),
    [
        (pair("a", "b", "c"), MARGIN, "superset"),
        (pair("a", "b", "b", "b"), MARGIN, "repeated documents"),
        (pair("b", "a"), MARGIN, "order"),
        (pair("x", "y"), MARGIN, "other text"),
        (pair("a", "b", seq_len=2), MARGIN, "other sequence length"),
        (pair("a", "b", candidate="one code changed"), MARGIN, "nearly equal weights"),
        (pair("a", "b", scorer=Scorer(activations="declared")), MARGIN, "activations"),
        (pair("a", "b", protocol="lm-eval"), MARGIN, "protocol"),
        (pair("a", "b"), WIDE, "wider margin"),
    ],
    ids=lambda value: value.replace(" ", "-") if isinstance(value, str) else "",
)
def test_a_second_look_has_its_share_whatever_changed(
    attempts: Attempts, second: Pair, margin: Margin, remark: str
) -> None:
    look = attempts.look(second, [margin])
    assert look.number == 2
    assert "1 earlier attempt at candidates of this base did not pass" in look.notes[0]
    assert any("wider" in note for note in look.notes) is (margin is WIDE)
    attempts.record(second, FAILED, 3.0, [margin])
    assert attempts.look(pair("a", "b", "x", "y", "c"), [margin]).number == 3


def test_a_gate_without_the_drift_of_the_first_is_a_look_of_its_own(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.record(pair("a", "b"), FAILED, 3.0, [MARGIN], ["top-k", "accepted"])
    assert attempts.look(pair("a", "b"), [MARGIN], ["top-k", "accepted"]).number == 1
    for terms in (["top-k", ""], ["top-k", "another run"], ["off", "accepted"]):
        assert attempts.look(pair("a", "b"), [MARGIN], terms).number == 2


def test_the_same_numbers_are_not_a_new_look(attempts: Attempts) -> None:
    assert attempts.look(pair("a", "b"), [MARGIN]) == Look(base_record=FAILED.base_nats)
    attempts.record(pair("a", "b"), FAILED, 3.0, [MARGIN])
    assert attempts.look(pair("a", "b", "c"), [MARGIN]).number == 2


def test_a_look_that_passed_is_not_spent(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    attempts.record(pair("a", "b"), PASSED, 3.0, [WIDE])
    assert attempts.look(pair("a", candidate="the next release"), [WIDE]) == Look()


@pytest.mark.parametrize("texts", [("a",), ("a", "c", "d")])
def test_a_part_of_the_documents_is_refused(attempts: Attempts, texts: tuple[str, ...]) -> None:
    """With the scores of each document at hand, the best ones could be chosen."""
    for candidate in ("candidate", "one code changed"):
        with pytest.raises(UsageError, match="1 of those 2 documents"):
            attempts.look(pair(*texts, candidate=candidate), [MARGIN])


def test_a_task_is_a_question_of_its_own(attempts: Attempts) -> None:
    assert attempts.look(pair("a", "b", protocol="task"), [MARGIN]).number == 1


def test_damaged_lines_are_skipped_and_old_ones_are_read(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    with (tmp_path / "attempts.jsonl").open("ab") as handle:
        handle.write(b'{"pair": ["candidate", "base", 512, "tokens"], "documents": [], "outcome": ')
        handle.write(b'"failed", "scored": 40, "se": 0.1, "delta": 0.2, "seconds": 1.0}\n')
        handle.write(b'{"pair": [1, \n[]\n{"documents": 3}\n')
        handle.write(b'{"documents": [[]], "pair": 5}\n{"documents": [[]], "pair": []}\n')
        handle.write(b'{"documents": ["a')
    assert attempts.look(pair("a"), [MARGIN]).number == 2
    attempts.record(pair("a", "b"), FAILED, 3.0, [MARGIN])
    assert attempts.look(pair("a", "b", "c"), [MARGIN]).number == 3
    spread = attempts.last_spread(pair())
    assert spread is not None
    assert spread.scored == 40


def test_a_base_that_is_worse_than_its_own_record_is_not_passed(attempts: Attempts) -> None:
    record = attempts.look(pair("a", "b"), [WIDE]).base_record
    assert record == FAILED.base_nats
    assert compare_runs(BASE, GOOD, WIDE, base_record=record).outcome == "passed"
    assert record is not None
    doubtful = compare_runs(BASE, GOOD, WIDE, base_record=record - 0.02)
    assert doubtful.outcome == "inconclusive"
    assert "in an earlier attempt" in doubtful.doubts[0]


def test_shares_add_up_to_the_error() -> None:
    assert alpha_of(None) == 0.05
    assert sum(alpha_of(k) for k in range(1, 10_000)) <= 0.05
    assert alpha_of(1) == 0.025


def test_nested_looks_pass_what_is_at_the_margin_in_5_percent() -> None:
    """Five looks at 8, 16 … 128 documents; the true loss is the margin. 5%/k would pass 9%."""
    stats = scipy_stats()
    rng = np.random.default_rng(15)
    sums = rng.normal(0, 1, (4000, 128))
    passed = np.zeros(4000, bool)
    for look in range(1, 6):
        part = sums[:, : 4 * 2**look]
        estimate, se, _, freedom = moments(part, np.ones_like(part))
        passed |= estimate + stats.t.ppf(1 - alpha_of(look), freedom) * se <= 0
    assert 0.02 < passed.mean() < 0.05
