# SPDX-License-Identifier: Apache-2.0
"""Margins, and the three outcomes."""

from __future__ import annotations

import math

import pytest
from scipy import stats

from tests.paths import TESTS
from verifier.checkpoint import open_checkpoint
from verifier.errors import UsageError
from verifier.evaluation import Interval, Margin, Outcome
from verifier.gate.decision import margin_of, outcome_of
from verifier.gate.score import format_parameters
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
    narrowest = margin_of(None, ["MXFP8", "NVFP4"])
    assert narrowest.nats == pytest.approx(math.log(1.01))
    assert "MXFP8" in narrowest.source
    assert margin_of(None, ["MXFP8"]).nats == pytest.approx(math.log(1.01))
    for bad in ("", "-1%", "8 percent", "0", "0%", "nan", "1e9", "%"):
        with pytest.raises(UsageError):
            margin_of(bad, ["NVFP4"])
    with pytest.raises(UsageError, match="max-increase"):
        margin_of(None, [])


def test_default_budgets_weigh_formats_by_their_parameters() -> None:
    three = margin_of(None, {"NVFP4": 3, "MXFP8": 205})
    assert three.nats == pytest.approx((3 * math.log(1.08) + 205 * math.log(1.01)) / 208)
    assert "98.6% MXFP8 at 1%, 1.4% NVFP4 at 8%" in three.source
    assert margin_of(None, {"NVFP4": 7}).nats == math.log1p(0.08)
    # What has no budget, or is not quantized, adds nothing.
    half = margin_of(None, {"NVFP4": 5, "unquantized": 4, "INT8": 1})
    assert half.nats == pytest.approx(math.log(1.08) / 2)
    with pytest.raises(UsageError, match="max-increase"):
        margin_of(None, {"unquantized": 4, "INT8": 1})


def test_parameters_of_a_mixed_checkpoint() -> None:
    data = TESTS / "data" / "modelopt"
    counts = format_parameters(open_checkpoint(data / "qwen3moe_nvfp4_experts_max"))
    base = format_parameters(open_checkpoint(data / "src_qwen3moe"))
    assert set(counts) == {"NVFP4", "unquantized"}
    assert base == {"unquantized": sum(counts.values())}
