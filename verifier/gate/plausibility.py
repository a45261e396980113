# SPDX-License-Identifier: Apache-2.0
"""Results that are too good, or scores that no model gives: they are never passed.

A candidate that is far better than its base, a base that is worse than guessing, log-probabilities
that are constant: each has an ordinary cause (a wrong base, an engine that speculates, one model
scored twice), and none is evidence that the candidate is sound.
"""

from __future__ import annotations

import math

import numpy as np

from verifier.evaluation import Interval
from verifier.gate.jobs import Array
from verifier.gate.run_file import Run
from verifier.gate.statistics import LEVEL, p_of_loss, scipy_stats

GAIN_ERRORS = 3.0
"""A gain is implausible beyond this many standard errors …"""
GAIN = math.log(0.99)
"""… and beyond this loss, nats per token: 1% of perplexity."""
GAIN_OF_ACCURACY = -0.01
CONSTANT_SHARE = 0.5
"""The largest share of tokens that may have the same log-probability."""
WORSE_BASE = math.log(1.01)
"""How much worse than before a base may score the same documents, nats per token."""


def doubts_about(
    base: Run, candidate: Run, interval: Interval, distinct: Array, base_record: float | None
) -> list[str]:
    """Return why a result is not plausible; each reason is one sentence.

    Args:
        base: the reference.
        candidate: the run that is compared with it.
        interval: the loss over the base, not widened.
        distinct: which documents count, bool [D].
        base_record: the base's mean loss on the same documents in an earlier attempt, nats per
            token.
    """
    if base.header.key.get("protocol") == "task":
        doubts = [_gain_of_accuracy(interval), _chance(base, distinct)]
    else:
        doubts = [
            _gain(interval),
            _uniform(base),
            _same_scores(base, candidate),
            _worse_than_before(base, base_record),
            *(_constant(run, name) for run, name in ((base, "base"), (candidate, "candidate"))),
        ]
    return [doubt for doubt in doubts if doubt]


def _gain(interval: Interval) -> str:
    if not interval.delta < min(GAIN, -GAIN_ERRORS * interval.se):
        return ""
    return (
        f"the candidate is better than its base by {-math.expm1(interval.delta):.2%} of "
        "perplexity, which quantization does not explain; is it the right base?"
    )


def _gain_of_accuracy(interval: Interval) -> str:
    if interval.exact is None:
        return ""
    lost, won, documents = interval.exact
    unlikely = float(scipy_stats().norm.sf(GAIN_ERRORS))
    if p_of_loss(lost, won, documents, GAIN_OF_ACCURACY, "within") >= unlikely:
        return ""
    return (
        f"the candidate is better than its base by {-interval.delta:.2%} of accuracy, which "
        "quantization does not explain; is it the right base?"
    )


def mean_loss(run: Run) -> float | None:
    """Return a run's loss, nats per token; None without a token, or in another unit."""
    total = int(run.tokens.sum())
    if run.header.key.get("protocol") != "tokens" or not total:
        return None
    return float(run.sums.sum()) / total


def _uniform(base: Run) -> str:
    loss, size = mean_loss(base), base.header.vocab_size
    if loss is None or size is None or size < 2 or loss < math.log(size):
        return ""
    return (
        f"the base predicts this text no better than a uniform guess ({loss:.4f} nats per token, "
        f"log of {size:,} tokens is {math.log(size):.4f})"
    )


def _chance(base: Run, distinct: Array) -> str:
    chance = base.header.chance
    if chance is None:
        return ""
    wrong = base.sums[distinct]
    right = len(wrong) - round(float(wrong.sum()))
    test = scipy_stats().binomtest(right, len(wrong), chance, alternative="greater")
    if test.pvalue <= 1 - LEVEL:
        return ""
    return (
        f"the base is not shown to be better than guessing: {right:,} of {len(wrong):,} right, "
        f"{chance:.1%} by chance"
    )


def _same_scores(base: Run, candidate: Run) -> str:
    name = "nats" if "nats" in base.arrays and "nats" in candidate.arrays else "sums"
    values, others = base.arrays[name], candidate.arrays[name]
    if not len(values) or not np.array_equal(values, others):
        return ""
    return "the candidate's scores are the base's, bit for bit: one model was scored twice"


def _constant(run: Run, name: str) -> str:
    nats = run.arrays.get("nats")
    if nats is None or len(nats) < 2:
        return ""
    _, counts = np.unique(nats, return_counts=True)
    share = float(counts.max()) / len(nats)
    if share <= CONSTANT_SHARE:
        return ""
    return (
        f"{share:.0%} of the {name}'s tokens have one and the same log-probability; an engine that "
        "speculates or does not support prompt log-probabilities answers so"
    )


def _worse_than_before(base: Run, record: float | None) -> str:
    loss = mean_loss(base)
    if loss is None or record is None or loss - record <= WORSE_BASE:
        return ""
    return (
        f"the base scores {loss:.4f} nats per token, and scored {record:.4f} on these documents in "
        "an earlier attempt; its configuration or the software changed"
    )
