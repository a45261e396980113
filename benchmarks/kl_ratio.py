# SPDX-License-Identifier: Apache-2.0
"""Simulate how often a candidate whose KL ratio is exactly the margin passes, for three bounds, and
how often others pass or fail as they should.

    python benchmarks/kl_ratio.py [--rounds 20000] [--out benchmarks/results/kl_ratio.json]

The accepted export's divergences differ log-normally between documents, and so does the candidate's
ratio to them; in the last rows 3% of the documents have six times the divergence instead. The gate
uses the bound of the logarithm.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from verifier.gate.decision import KL_RATIO
from verifier.gate.statistics import moments

ROOT = Path(__file__).parents[1]
DOCUMENTS = (8, 20, 72)
SPREADS = ((0.3, 0.08), (0.3, 0.2), (0.6, 0.4), (1.0, 0.6))
HARMLESS, HARMFUL = 1.05, 1.35
"""About the largest ratio of damage that does not matter, and the smallest of damage that does, on
the goldens."""
HIT_SHARE, HIT = 0.03, 6.0
Draw = tuple[np.ndarray, np.ndarray, float]


def even(rng: np.random.Generator, shape: tuple[int, int], spread: float, ratios: float) -> Draw:
    """Return divergences of the accepted run and of the candidate, and the true ratio."""
    accepted = np.exp((spread**2 + 0.25) ** 0.5 * rng.standard_normal(shape))
    noise = np.exp(ratios * rng.standard_normal(shape) - ratios**2 / 2)
    return accepted, KL_RATIO * accepted * noise, KL_RATIO


def rare(rng: np.random.Generator, shape: tuple[int, int]) -> Draw:
    """Return the same where few documents are hit."""
    accepted = np.exp(0.5 * rng.standard_normal(shape))
    hit = rng.random(shape) < HIT_SHARE
    candidate = accepted * np.where(hit, HIT, 1.0) * np.exp(0.2 * rng.standard_normal(shape) - 0.02)
    return accepted, candidate, 1 + HIT_SHARE * (HIT - 1)


def power(spread: float, ratios: float, shape: tuple[int, int]) -> dict[str, float]:
    """Return how often a harmless ratio passes and a harmful one fails."""
    shares: dict[str, float] = {}
    for truth in (HARMLESS, HARMFUL):
        accepted, candidate, _ = even(np.random.default_rng(99), shape, spread, ratios)
        ratio, se, _, freedom = moments(candidate * truth / KL_RATIO, accepted)
        t99 = stats.t.ppf(0.99, freedom)
        sign = 1 if truth < KL_RATIO else -1
        shown = sign * np.log(ratio / KL_RATIO) + t99 * se / ratio <= 0
        shares[f"{'passes' if sign > 0 else 'fails'}_{truth}"] = round(float(shown.mean()), 4)
    return shares


def wrong(draw: Draw) -> dict[str, float]:
    """Return how often each bound is below the truth, and how often the lower bound above it."""
    accepted, candidate, truth = draw
    ratio, se, _, freedom = moments(candidate, accepted)
    t95, t99 = stats.t.ppf(0.95, freedom), stats.t.ppf(0.99, freedom)
    bounds = {
        "ratio_95": ratio + t95 * se <= truth,
        "ratio_99": ratio + t99 * se <= truth,
        "log_99": np.log(ratio) + t99 * se / ratio <= np.log(truth),
        "wrong_fail": np.log(ratio) - t99 * se / ratio > np.log(truth),
    }
    return {name: round(float(below.mean()), 4) for name, below in bounds.items()}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "kl_ratio.json"
    )
    args = parser.parse_args()
    rows = []
    for seed, (count, (spread, ratios)) in enumerate(itertools.product(DOCUMENTS, SPREADS)):
        rng = np.random.default_rng(seed)
        row = {"documents": count, "spread": spread, "ratios": ratios}
        shape = (args.rounds, count)
        row |= wrong(even(rng, shape, spread, ratios))
        rows.append(row | power(spread, ratios, shape))
    for count in DOCUMENTS:
        row = {"documents": count, "spread": None, "ratios": f"{HIT_SHARE:.0%} six times"}
        rows.append(row | wrong(rare(np.random.default_rng(count), (args.rounds, count))))
    result = {
        "command": "python benchmarks/kl_ratio.py",
        "rounds": args.rounds,
        "ratio": KL_RATIO,
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("numpy", "scipy")},
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
