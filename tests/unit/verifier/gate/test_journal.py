# SPDX-License-Identifier: Apache-2.0
"""Finished units on disk: whole ones only, of one run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verifier.errors import UsageError
from verifier.gate.jobs import Unit, UnitScores
from verifier.gate.journal import Journal
from verifier.gate.windows import units_of


def windows(lengths: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(range(n)), (d,) * n) for d, n in enumerate(lengths)]


def scores_of(units: list[Unit], shift: float = 0.0) -> dict[int, UnitScores]:
    """Return scores in which a token's nats tell its window and position."""
    found = {}
    for u in units:
        nats = [
            100 * p + i + shift
            for p, (ids, _) in zip(u.places, u.windows, strict=True)
            for i in range(len(ids) - 1)
        ]
        arrays = {"nats": np.array(nats, np.float32), "top1": np.zeros(len(nats), np.int32)}
        found[u.number] = UnitScores(
            u.number, arrays | {"sure": np.zeros(len(nats), np.float32)} if nats else {}
        )
    return found


def test_a_journal_keeps_whole_units_only(tmp_path: Path) -> None:
    file, header = tmp_path / "x.part", {"key": "one"}
    scores = scores_of(units_of(windows([5, 4, 3]), 1))
    with Journal(file, header) as journal:
        journal.add(scores[0])
        journal.add(scores[1])
        with pytest.raises(UsageError, match="another process"):
            Journal(file, header)
    whole = file.read_bytes()
    for cut in range(1, 40):
        file.write_bytes(whole[:-cut])
        with Journal(file, header) as journal:
            assert set(journal.done) == {0}
            assert np.array_equal(journal.done[0].arrays["nats"], scores[0].arrays["nats"])
            journal.add(scores[1])
        assert file.read_bytes() == whole
    spoiled = bytearray(whole)
    spoiled[-10] ^= 1
    file.write_bytes(spoiled)
    with Journal(file, header) as journal:
        assert set(journal.done) == {0}
    with Journal(file, {"key": "another"}) as journal:
        assert (journal.done, journal.restarted) == ({}, True)
