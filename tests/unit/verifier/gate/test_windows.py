# SPDX-License-Identifier: Apache-2.0
"""Windows of a corpus never cross a document, and text tokens belong to one."""

from __future__ import annotations

from verifier.gate.corpora import Corpus
from verifier.gate.windows import windows_of


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
