# SPDX-License-Identifier: Apache-2.0
"""Documents of a corpus, from text, from .jsonl and from WikiText."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verifier.errors import ContentError, UsageError
from verifier.gate.corpora import Corpus, documents_digest, load_corpus, split_documents

TEXT = "preamble\n = First = \n a b c \n = = Section = = \n d e \n = Second = \n f g\n"


def test_documents_begin_at_top_headings_only() -> None:
    found = split_documents(TEXT)
    assert [d.strip().splitlines()[0].strip() for d in found] == [
        "preamble",
        "= First =",
        "= Second =",
    ]
    assert "\n".join(found) == TEXT


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
