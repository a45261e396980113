# SPDX-License-Identifier: Apache-2.0
"""Simulate the decision of `ckptgate suite`: items that it needs, and how often it is wrong.

    python benchmarks/suite.py [--rounds 4000] [--out benchmarks/results/suite.json]

``items``: how many items show a loss of accuracy with 80% power. The unpaired rule is that of
TensorRT-LLM's accuracy tests: a regression is a difference beyond z(0.05) sqrt(2 50^2 / n) points;
the paired rule is McNemar's exact test on the same answers. ``families``: entries that are all at
their margin, and how often one is called beyond it, by Holm and without; and how often a suite with
one entry at its margin passes. ``looks``: how often a candidate at its margin passes at some look.
``repeats``: items with several sampled answers, by the rule of the suite (over items) and as if all
answers were independent.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from verifier.gate.decision import ERROR, alpha_of
from verifier.gate.statistics import holm, log_ratio, p_beyond, p_of_loss, repeated_answers_loss
from verifier.gate.suite.decision import p_outside

ROOT = Path(__file__).parents[1]
SIGMA, POWER = 50.0, 0.8
ACCURACY = 0.7
MARGIN = 0.02
p_value = cache(p_of_loss)


def answers(
    rng: np.random.Generator, rounds: int, items: int, share: float, loss: float
) -> tuple[Any, Any]:
    """Return how many items only the base, and only the candidate, gets right, of each round."""
    rates = [(share + loss) / 2, (share - loss) / 2, 1 - share]
    lost, won, _ = rng.multinomial(items, rates, rounds).T
    return lost, won


def unpaired(lost: Any, won: Any, items: int) -> Any:
    """Return which rounds TensorRT-LLM's rule calls a regression."""
    threshold = stats.norm.ppf(1 - ERROR) * math.sqrt(2 * SIGMA**2 / items)
    return 100 * (lost - won) / items > threshold


def mcnemar(lost: Any, won: Any, _items: int) -> Any:
    """Return which rounds McNemar's exact one-sided test calls a regression."""
    return stats.binom.sf(lost - 1, lost + won, 0.5) <= ERROR


def items_needed(rule: Any, share: float, loss: float, rounds: int) -> int:
    """Return the least number of items, within 2%, with which a rule has the power."""
    low, high = 10, 400_000
    while high > 1.02 * low:
        middle = math.isqrt(low * high)
        rng = np.random.default_rng(middle)
        hits = rule(*answers(rng, rounds, middle, share, loss), middle).mean()
        low, high = (low, middle) if hits >= POWER else (middle, high)
    return high


def item_rows(rounds: int) -> list[dict[str, float]]:
    """Return items by the share of discordant answers and the loss to detect."""
    rows = []
    quantiles = stats.norm.ppf(1 - ERROR) + stats.norm.ppf(POWER)
    for share in (0.02, 0.05, 0.1, 0.2):
        for loss in (0.005, 0.01, 0.02):
            if loss >= share:
                continue
            planned = math.ceil(2 * SIGMA**2 * (quantiles / (100 * loss)) ** 2)
            paired = items_needed(mcnemar, share, loss, rounds)
            loose = items_needed(unpaired, share, loss, rounds)
            rng = np.random.default_rng(7)
            wrong = {
                name: float(rule(*answers(rng, 5 * rounds, n, share, 0.0), n).mean())
                for name, rule, n in (("paired", mcnemar, paired), ("unpaired", unpaired, loose))
            }
            rows.append(
                {
                    "discordant": share,
                    "loss": loss,
                    "unpaired_planned": planned,
                    "unpaired": loose,
                    "paired": paired,
                    "false_paired": round(wrong["paired"], 4),
                    "false_unpaired": round(wrong["unpaired"], 4),
                }
            )
            print(rows[-1])
    return rows


def loss_p(rng: np.random.Generator, shift: float) -> tuple[float, float]:
    """Return the p-values of "within the margin" and "beyond it" of a corpus of 62 documents."""
    values = rng.normal(shift, 1, 62)
    t = values.mean() / (values.std(ddof=1) / math.sqrt(62))
    return float(stats.t.sf(t, 61)), float(stats.t.cdf(t, 61))


def task_p(rng: np.random.Generator, loss: float) -> tuple[float, float]:
    """Return those of a task of 1,000 items with 5% discordant answers."""
    lost, won = (int(x[0]) for x in answers(rng, 1, 1000, 0.05, loss))
    beyond = p_value(lost, won, 1000, MARGIN, "beyond")
    return beyond, p_value(lost, won, 1000, MARGIN, "within")


def length_p(rng: np.random.Generator, change: float) -> tuple[float, float]:
    """Return those of the length of 500 completions, log-normal with a paired spread of 0.3."""
    base = rng.lognormal(5, 0.7, 500)
    candidate = base * rng.lognormal(change - 0.045, 0.3, 500)
    margin = math.log(1.05)
    interval = log_ratio(candidate, base, np.ones(500))
    assert interval is not None
    beyond = p_outside(interval, margin)
    return beyond, float(stats.t.sf((margin - abs(interval.delta)) / interval.se, 499))


KINDS = ((loss_p, 0.0, -0.5), (task_p, MARGIN, 0.0), (length_p, math.log(1.05), 0.0))
"""What gives the p-values of a criterion, its value at the margin, and well within it."""


def family_rows(rounds: int) -> list[dict[str, float]]:
    """Return errors by the number of criteria, of which a third is of each kind."""
    rows = []
    for count in (1, 3, 9, 21):
        rng = np.random.default_rng(count)
        kinds = [KINDS[i % 3] for i in range(count)]
        single = by_holm = passes = 0
        for _ in range(rounds):
            beyond = [make(rng, at_margin)[0] for make, at_margin, _ in kinds]
            single += min(beyond) <= ERROR
            by_holm += any(holm(beyond, ERROR))
            within = [
                make(rng, at_margin if i == 0 else fine)[1]
                for i, (make, at_margin, fine) in enumerate(kinds)
            ]
            passes += max(within) <= ERROR
        rows.append(
            {
                "criteria": count,
                "uncorrected": round(single / rounds, 4),
                "holm": round(by_holm / rounds, 4),
                "wrong_pass": round(passes / rounds, 4),
            }
        )
        print(rows[-1])
    return rows


def look_rows(rounds: int) -> list[dict[str, float]]:
    """Return how often a candidate at the margin of one entry passes by some look, each on other
    text.
    """
    rng = np.random.default_rng(11)
    p_values = rng.uniform(size=(10 * rounds, 10))
    shares = np.array([alpha_of(look) for look in range(1, 11)])
    ever = np.maximum.accumulate(p_values <= shares, axis=1).mean(0)
    each = np.maximum.accumulate(p_values <= ERROR, axis=1).mean(0)
    return [
        {"looks": k, "each_5": round(float(each[k - 1]), 4), "suite": round(float(ever[k - 1]), 4)}
        for k in (1, 2, 5, 10)
    ]


def repeat_rows(rounds: int) -> list[dict[str, float]]:
    """Return errors at a margin that is the truth: one item in 20 loses 70% of its chance to be
    answered right.
    """
    rows = []
    for items in (50, 200, 1000):
        for repeats in (2, 8):
            rng = np.random.default_rng(items + repeats)
            counts = dict.fromkeys(("pass", "fail", "naive_pass", "naive_fail"), 0)
            margin = 0.05 * 0.7 * ACCURACY
            for _ in range(rounds):
                chance = rng.beta(0.7, 0.3, items)
                hit = np.where(rng.uniform(size=items) < 0.05, 0.3, 1.0)
                right = rng.uniform(size=(items, repeats)) < chance[:, None]
                candidate = rng.uniform(size=(items, repeats)) < (chance * hit)[:, None]
                interval = repeated_answers_loss(right.mean(1) - candidate.mean(1))
                counts["pass"] += interval.high <= margin
                counts["fail"] += p_beyond(interval, margin) <= ERROR
                delta = right.mean() - candidate.mean()
                spread = (right.astype(float) - candidate).std(ddof=1)
                error = 1.645 * spread / math.sqrt(items * repeats)
                counts["naive_pass"] += delta + error <= margin
                counts["naive_fail"] += delta - error > margin
            shares = {name: round(count / rounds, 4) for name, count in counts.items()}
            rows.append({"items": items, "repeats": repeats, **shares})
            print(rows[-1])
    return rows


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=4000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "suite.json")
    args = parser.parse_args()
    result = {
        "command": f"python benchmarks/suite.py --rounds {args.rounds}",
        "rounds": args.rounds,
        "items": item_rows(args.rounds),
        "families": family_rows(args.rounds),
        "looks": look_rows(args.rounds),
        "repeats": repeat_rows(args.rounds),
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("numpy", "scipy")},
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
