# SPDX-License-Identifier: Apache-2.0
"""Text for people."""

from __future__ import annotations

import pytest

from verifier.text import counted, listed, percentage, plural, printable, size


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("model.layers.0", "model.layers.0"),
        ("a\x1b[31m", "a\\x1b[31m"),
        ("a\nb\tc", "a\\x0ab\\x09c"),
        ("é", "é"),
        ("x" * 20, "x" * 20),
        ("x" * 21, "x" * 19 + "…"),
        ("\n" * 9, "\\x0a" * 4 + "\\x0…"),
    ],
)
def test_names_are_escaped_and_cut(text: str, safe: str) -> None:
    assert printable(text, 20) == safe


@pytest.mark.parametrize(
    ("count", "noun", "text"),
    [
        (0, "error", "0 errors"),
        (1, "error", "1 error"),
        (2_000, "error", "2,000 errors"),
        (2, "entry", "2 entries"),
        (2, "array", "2 arrays"),
        (2, "prefix", "2 prefixes"),
        (2, "pass", "2 passes"),
        (2, "more finding", "2 more findings"),
    ],
)
def test_a_count_has_its_noun_in_the_right_number(count: int, noun: str, text: str) -> None:
    assert counted(count, noun) == text
    assert plural("match") == "matches"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1_000, "1.0 kB"),
        (999_949, "999.9 kB"),
        (999_950, "1.0 MB"),
        (25_800_000_000, "25.8 GB"),
        (10**16, "10000.0 TB"),
    ],
)
def test_sizes_are_in_decimal_units(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("count", "of", "text"),
    [
        (0, 0, "0%"),
        (0, 7, "0%"),
        (7, 7, "100%"),
        (1, 1_000_000, "<0.01%"),
        (999_999, 1_000_000, ">99.99%"),
        (1, 3, "33.33%"),
    ],
)
def test_only_none_is_0_and_only_all_is_100_percent(count: int, of: int, text: str) -> None:
    assert percentage(count, of) == text


def test_a_long_list_is_cut_and_counted() -> None:
    assert listed([]) == ""
    assert listed(["a", "b"], 2) == "a, b"
    assert listed("abcd", 2) == "a, b and 2 more"
