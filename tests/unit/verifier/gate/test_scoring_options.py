# SPDX-License-Identifier: Apache-2.0
"""Options of a gate: what they stand for, and what is refused before any model runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from verifier.errors import UsageError
from verifier.gate.gate import gate_options
from verifier.gate.jobs import Scorer


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "c.jsonl"
    file.write_text('{"ids": [1, 2, 3]}\n{"ids": [4, 5]}\n')
    return str(file)


def test_keywords_become_options(corpus: str) -> None:
    options = gate_options(corpus=corpus, seq_len=2, documents=1, kl="off", workers=3)
    scoring = options.scoring
    assert (len(scoring.corpus), scoring.protocol, scoring.seq_len) == (1, "tokens", 2)
    assert (scoring.processes, options.kl, options.cache) == (3, "off", None)
    assert scoring.job("/model", "/base").base == "/base"


def test_the_former_name_of_seq_len_still_works(corpus: str) -> None:
    with pytest.warns(DeprecationWarning, match="window is now called seq_len"):
        options = gate_options(corpus=corpus, window=64)
    assert options.scoring.seq_len == 64


def test_an_engine_is_one_process(corpus: str) -> None:
    scorer = Scorer("vllm", python="/opt/python")
    assert gate_options(corpus=corpus, workers=4, scorer=scorer).scoring.processes == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seq_len": 1}, "seq_len must be at least 2"),
        ({"batch": 0}, "batch and workers"),
        ({"workers": 0}, "batch and workers"),
        ({"documents": 0}, "documents must be at least 1"),
        ({"kl": "exact"}, "unknown --kl 'exact'"),
        ({"kl": "lockstep", "cache": "x"}, "cannot use --cache"),
        ({"max_drift": "0.1"}, "--max-drift needs --drift-against"),
        ({"scorer": Scorer("server", endpoint="http://h/v1")}, "ckptgate compare"),
        ({"scorer": Scorer("vllm")}, "--engine-python"),
        (
            {"scorer": Scorer("vllm", python="p"), "protocol": "lm-eval"},
            "needs the protocol tokens",
        ),
        ({"protocol": "lm-eval", "kl": "top-k"}, "needs the protocol tokens"),
        ({"metric": "acc"}, "--metric needs a task"),
        ({"protocol": "words"}, "not 'words'"),
    ],
)
def test_what_is_refused(corpus: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        gate_options(corpus=corpus, **options)
    with pytest.raises(UsageError, match="--corpus is required"):
        gate_options()


def test_an_unknown_option_is_an_error_of_the_caller(corpus: str) -> None:
    with pytest.raises(TypeError, match="seqlen"):
        gate_options(corpus=corpus, seqlen=3)
