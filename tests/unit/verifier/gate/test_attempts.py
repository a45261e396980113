# SPDX-License-Identifier: Apache-2.0
"""No re-rolls: a later look includes the earlier documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.results import scored_run
from verifier.errors import UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Pair
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.options import ScoringOptions

BASE, GOOD = scored_run(0, "a"), scored_run(1, "b", 0.01)
MARGIN = Margin(0.077, "given")


class Model:
    """Stands for a checkpoint whose weights are digested already."""

    def __init__(self, digest: str) -> None:
        self.uri, self.weights_sha256 = digest, digest


def pair(*texts: str, seq_len: int = 512) -> Pair:
    corpus = Corpus("c", "", documents_digest(texts), texts=texts)
    return Pair(Model("candidate"), Model("base"), ScoringOptions(corpus, seq_len=seq_len))  # type: ignore[arg-type]


def test_a_second_look_includes_the_first(tmp_path: Path) -> None:
    attempts = Attempts(tmp_path)
    near = compare_runs(BASE, GOOD, Margin(0.0101, ""))
    assert near.outcome == "inconclusive"
    assert attempts.looks(pair("a", "b")) == 1
    assert attempts.last_spread(pair("a")) is None
    attempts.record(pair("a", "b"), near, 3.0)
    assert attempts.looks(pair("b", "a")) == 1  # the same documents give the same numbers
    assert attempts.looks(pair("a", "b", "c")) == 2
    with pytest.raises(UsageError, match="1 of those 2 documents"):
        attempts.looks(pair("a", "c", "d"))
    assert attempts.looks(pair("x", seq_len=256)) == 1  # another protocol is another question
    with (tmp_path / "attempts.jsonl").open("ab") as handle:
        handle.write(b'{"pair": [1, \n[]\n{"documents": 3}\n')
        handle.write(b'{"documents": [[]], "pair": 5}\n{"documents": [[]], "pair": []}\n')
        handle.write(b'{"documents": ["a')
    attempts.record(pair("a", "b", "c"), compare_runs(BASE, GOOD, MARGIN), 3.0)
    assert attempts.looks(pair("a", "b", "c", "d")) == 3
    spread = attempts.last_spread(pair())
    assert spread is not None
    assert spread.scored == 40
