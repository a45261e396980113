# SPDX-License-Identifier: Apache-2.0
"""Margins, and the three outcomes."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from verifier.errors import UsageError
from verifier.evaluation import Interval, Margin, Outcome
from verifier.gate.decision import margin_of, outcome_of
from verifier.gate.statistics import documents_needed, paired


def decide(interval: Interval, margin: Margin) -> Outcome:
    return outcome_of([(interval, margin)], floor=None, widening=0.0, alpha=0.05)


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
