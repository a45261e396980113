# SPDX-License-Identifier: Apache-2.0
"""What the soak reports as growth, and that it reports nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.faults.soak import MOST_KB, WARM, Held, grown

STATE = Held(allocated_kb=200_000, descriptors=6, threads=1, leftovers=0)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({}, []),
        ({"allocated_kb": STATE.allocated_kb + MOST_KB}, []),
        ({"allocated_kb": STATE.allocated_kb + MOST_KB + 1}, ["allocated_kb"]),
        ({"descriptors": 7, "leftovers": 1}, ["descriptors", "leftovers"]),
        ({"threads": 2}, ["threads"]),
    ],
)
def test_growth_after_the_warm_up(change: dict[str, int], names: list[str]) -> None:
    assert grown([STATE] * WARM + [replace(STATE, **change)]) == names


def test_what_is_filled_before_is_no_growth() -> None:
    assert grown([Held(1, 1, 1, 0)] + [STATE] * WARM) == []
