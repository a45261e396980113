# SPDX-License-Identifier: Apache-2.0
"""Statistics, margins, corpora and windows of the gate; nothing here loads a model."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.evaluation import Interval, Margin, Outcome
from verifier.gate.corpora import Corpus, documents_digest, load_corpus, split_documents
from verifier.gate.decision import margin_of, outcome_of
from verifier.gate.statistics import documents_needed, paired, perplexity
from verifier.gate.windows import windows_of


def decide(interval: Interval, margin: Margin) -> Outcome:
    return outcome_of([(interval, margin)], floor=None, widening=0.0, alpha=0.05)


TEXT = "preamble\n = First = \n a b c \n = = Section = = \n d e \n = Second = \n f g\n"


def test_documents_begin_at_top_headings_only() -> None:
    found = split_documents(TEXT)
    assert [d.strip().splitlines()[0].strip() for d in found] == [
        "preamble",
        "= First =",
        "= Second =",
    ]
    assert "\n".join(found) == TEXT


def test_interval_against_the_textbook() -> None:
    rng = np.random.default_rng(3)
    tokens = rng.integers(50, 500, 40)
    base = rng.normal(5, 0.3, 40) * tokens
    shift = 0.02 + rng.normal(0, 0.01, 40)
    found = paired(list(base), list(base + shift * tokens), list(tokens))
    assert found.delta == pytest.approx((shift * tokens).sum() / tokens.sum())
    residual = (shift - found.delta) * tokens
    assert found.se_linear == pytest.approx(math.sqrt(40 / 39 * (residual**2).sum()) / tokens.sum())
    assert found.low < found.delta < found.high


def test_interval_covers_the_truth_at_its_rate() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(400):
        tokens = rng.integers(300, 400, 62)
        effect = 0.02 + rng.normal(0, 0.02, 62)
        found = paired([0.0] * 62, list(effect * tokens), list(tokens))
        hits += found.low <= 0.02 <= found.high
    assert 0.86 <= hits / 400 <= 0.94


def test_one_document_has_no_interval() -> None:
    found = paired([1.0], [1.5], [10])
    assert found.delta == pytest.approx(0.05)
    assert decide(found, Margin(0.1, "")) == "inconclusive"
    assert documents_needed(found, 0.1) is None
    nothing = paired([0.0], [0.0], [0])
    assert nothing.documents == 0
    assert decide(nothing, Margin(0.1, "")) == "inconclusive"


@pytest.mark.parametrize(
    ("low", "high", "outcome"),
    [
        (-0.1, 0.0769, "passed"),
        (0.0771, 0.2, "failed"),
        (0.0, 0.0771, "inconclusive"),
        (0.05, 0.077, "passed"),
    ],
)
def test_three_outcomes(low: float, high: float, outcome: str) -> None:
    t = float(stats.t.ppf(0.95, 9))
    interval = Interval((low + high) / 2, (high - low) / 2 / t, low, high, 10, 100, t, 9.0)
    assert decide(interval, Margin(0.077, "")) == outcome


def test_documents_needed_grows_with_the_square() -> None:
    wide = Interval(0.05, 0.02, 0.0, 0.1, 20, 1000, 1.7)
    need = documents_needed(wide, 0.06)
    assert need == math.ceil(20 * (1.7 * 0.02 / 0.01) ** 2)
    assert documents_needed(wide, 0.05) is None


def test_margins() -> None:
    assert margin_of("8%", []).nats == pytest.approx(math.log(1.08))
    assert margin_of(0.05, []).nats == 0.05
    assert margin_of("0.05 nats", []).nats == 0.05
    widest = margin_of(None, ["MXFP8", "NVFP4"])
    assert widest.nats == pytest.approx(math.log(1.08))
    assert "NVFP4" in widest.source
    assert margin_of(None, ["MXFP8"]).nats == pytest.approx(math.log(1.01))
    for bad in ("", "-1%", "8 percent", "0", "0%", "nan", "1e9", "%"):
        with pytest.raises(UsageError):
            margin_of(bad, ["NVFP4"])
    with pytest.raises(UsageError, match="max-increase"):
        margin_of(None, [])


def test_windows_of_ids_never_cross_a_document() -> None:
    corpus = Corpus("c", "", "", ids=((1, 2, 3, 4, 5), (6, 7)))
    assert windows_of(corpus, None, 3) == [
        ((1, 2, 3), (0, 0, 0)),
        ((4, 5), (0, 0)),
        ((6, 7), (1, 1)),
    ]


def test_a_token_of_text_belongs_to_the_document_in_which_it_begins() -> None:
    corpus = Corpus("c", "", "", texts=("abcd", "ef"))

    def pairs(text: str) -> tuple[list[int], list[int]]:
        assert text == "abcd\nef"
        return [10, 11, 12, 13], [0, 3, 5, 6]  # the second token spans the joint

    assert windows_of(corpus, pairs, 512) == [((10, 11, 12, 13), (0, 0, 1, 1))]
    assert [len(w[0]) for w in windows_of(corpus, pairs, 3)] == [3, 1]


def test_perplexity() -> None:
    assert perplexity([4.0, 2.0], [5, 2]) == pytest.approx(math.exp(6 / 7))
    assert math.isnan(perplexity([], []))


def test_head_is_a_corpus_of_its_own() -> None:
    corpus = Corpus("c", "", documents_digest(["a", "b"]), texts=("a", "b"))
    first = corpus.head(1)
    assert (len(first), first.digest) == (1, documents_digest(["a"]))
    assert corpus.head(5) is corpus


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"ids": [1, 2]}\n{"text": "x"}\n', "mixed"),
        ('{"ids": [1, -2]}\n', "neither"),
        ('{"ids": [true]}\n', "neither"),
        ("[1, 2]\n", "not an object"),
        ("{nope\n", "not JSON"),
        ("\n", "no document"),
    ],
)
def test_jsonl_that_is_none(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(content)
    with pytest.raises(ContentError, match=message):
        load_corpus(str(file))


def test_jsonl_of_ids_and_of_text(tmp_path: Path) -> None:
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"sampled_from": "abc"}) + '\n{"ids": [1, 2], "text": "ab"}\n')
    found = load_corpus(str(file))
    assert (found.ids, found.sampled_from, len(found)) == (((1, 2),), "abc", 1)
    file.write_text('{"text": "ab"}\n{"text": "cd"}\n')
    assert load_corpus(str(file)).texts == ("ab", "cd")


def test_text_files(tmp_path: Path) -> None:
    file = tmp_path / "c.txt"
    file.write_text(TEXT)
    assert len(load_corpus(str(file))) == 3
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ContentError, match="UTF-8"):
        load_corpus(str(file))
    with pytest.raises(UsageError, match="no corpus"):
        load_corpus(str(tmp_path / "absent.txt"))


def test_wikitext_that_is_not_here_says_what_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CKPTGATE_TEST_DATA", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UsageError, match=r"wiki\.test\.raw"):
        load_corpus("wikitext2-test")


def test_another_wikitext_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "wikitext-2").mkdir()
    (tmp_path / "wikitext-2" / "wiki.test.raw").write_text(TEXT)
    monkeypatch.setenv("CKPTGATE_TEST_DATA", str(tmp_path))
    with pytest.raises(ContentError, match="digest"):
        load_corpus("wikitext2-test")


def test_wikitext_is_62_documents(shared_data: Path) -> None:
    found = load_corpus("wikitext2-test")
    assert len(found) == 62
    assert sum(len(t.split()) for t in found.texts) == 241_211
    assert sum(len(t.encode()) for t in found.texts) == 1_290_527


def test_errors_travel_between_processes() -> None:
    error = pickle.loads(pickle.dumps(MissingExtra("the gate", "gate")))  # noqa: S301  (our own bytes)
    assert str(error) == str(MissingExtra("the gate", "gate"))
    assert error.exit_code == 2
