# SPDX-License-Identifier: Apache-2.0
"""Simulate how often a candidate that is exactly at its margin passes at some look of a series.

    python benchmarks/looks.py [--rounds 20000] [--out benchmarks/results/looks.json]

Look k sees more documents than the one before it, those of the earlier looks among them; the series
ends with the first pass. Columns: each look at 5%, at 5%/k, and at the share that
`verifier.gate.decision.alpha_of` gives it.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
from scipy import stats

from verifier.gate.decision import ERROR, alpha_of
from verifier.gate.statistics import moments

ROOT = Path(__file__).parents[1]
SERIES = {
    "8, 16, 32 …": tuple(8 * 2**k for k in range(10)),
    "8, 16, 24 …": tuple(8 * (k + 1) for k in range(10)),
    "one more each": tuple(range(8, 72)),
}
SHARES: dict[str, Callable[[int], float]] = {
    "each": lambda _look: ERROR,
    "bonferroni": lambda look: ERROR / look,
    "share": alpha_of,
}
AT_A_TIME = 1000


def wrong_passes(documents: tuple[int, ...], rounds: int, seed: int) -> dict[str, list[float]]:
    """Return by rule the share of rounds that passed at some look up to each."""
    rng = np.random.default_rng(seed)
    passed = {name: np.zeros(len(documents)) for name in SHARES}
    for _ in range(rounds // AT_A_TIME):
        sums = rng.standard_normal((AT_A_TIME, documents[-1]))
        ever = {name: np.zeros(AT_A_TIME, bool) for name in SHARES}
        for number, count in enumerate(documents):
            estimate, se, _, freedom = moments(sums[:, :count], np.ones((AT_A_TIME, count)))
            p_values = stats.t.cdf(estimate / se, freedom)
            for name, share in SHARES.items():
                ever[name] |= p_values <= share(number + 1)
                passed[name][number] += ever[name].sum()
    return {name: (counts / rounds).round(4).tolist() for name, counts in passed.items()}


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "looks.json")
    args = parser.parse_args()
    rows = []
    for seed, (name, documents) in enumerate(SERIES.items()):
        shares = wrong_passes(documents, args.rounds, seed)
        for look in sorted({1, 2, 5, len(documents)}):
            row = {"documents": name, "looks": look}
            row |= {rule: values[look - 1] for rule, values in shares.items()}
            rows.append(row)
            print(row)
    result = {
        "command": "python benchmarks/looks.py",
        "rounds": args.rounds,
        "error": ERROR,
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("numpy", "scipy")},
        },
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
