# SPDX-License-Identifier: Apache-2.0
"""A part of the mutation score over the formats, and that what is committed is whole."""

from __future__ import annotations

import json

from tests.mutation.formats import CLEAN, FIRST_HARMLESS, HARMFUL, HARMLESS, KINDS, RESULTS, run

SAMPLE, QUIET = 3 * len(KINDS), 12


def test_mutations_of_formats_are_caught_or_listed() -> None:
    listed = {m["seed"] for m in json.loads(RESULTS.read_text())["survivors"]}
    for mutation in run(range(SAMPLE)):
        assert not mutation.crash, mutation
        assert not mutation.survived or mutation.seed in listed, mutation


def test_harmless_rewrites_of_formats_raise_no_finding() -> None:
    for mutation in run(range(FIRST_HARMLESS, FIRST_HARMLESS + QUIET)):
        assert (mutation.caught, mutation.crash) == ((False, False), ""), mutation


def test_committed_results_are_of_all_formats() -> None:
    results = json.loads(RESULTS.read_text())
    assert (results["n"], results["harmless"]) == (HARMFUL, HARMLESS)
    assert len(CLEAN) >= 20
    assert set(results["formats"]) == {f.name for f in CLEAN}
    assert results["kinds"].keys() == KINDS.keys()
    assert (results["alarms"], results["crashes"]) == ([], [])
