# SPDX-License-Identifier: Apache-2.0
"""Simulate how often the gate's intervals cover the truth, and how often the worst-document rule
finds a dead expert.

    python benchmarks/intervals.py [--rounds 10000] [--out benchmarks/results/intervals.json]

(Not coverage.py: numba imports a package of that name, and would find this file next to a script.)

Scenarios are fixed: number of documents x lengths x how documents differ. Token noise has the
standard deviation 0.35 nats of published paired logs; normal token noise is drawn as its sum,
Student-t noise token by token on documents of a twentieth of the length (the harder case). The
truth is the effect of the population.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from verifier.gate.statistics import moments, worst

ROOT = Path(__file__).parents[1]
DOCUMENTS = (8, 20, 62)
TOKEN_SD = 0.35
EFFECT = 0.02
HIT_SHARE, HIT = 0.03, 0.2
KINDS = {
    "sd 0": "documents do not differ",
    "sd 0.005": "normal, SD 0.005 nats",
    "sd 0.01": "normal, SD 0.01 nats",
    "sd 0.02": "normal, SD 0.02 nats",
    "t3 tokens": "normal, SD 0.01 nats; tokens Student t of 3 degrees of freedom",
    "skewed": "exponential, SD 0.02 nats, tail towards loss",
    "rare": "3% of documents lose 0.2 nats more (a dead expert)",
}
SYMMETRIC = ("sd 0", "sd 0.005", "sd 0.01", "sd 0.02", "t3 tokens")
LENGTHS = {
    "equal": "4,500 tokens",
    "log-normal": "log-normal, median 3,000, sigma 0.8",
    "wikitext-2": "those of WikiText-2's test split",
}


def real_lengths() -> np.ndarray:
    """Return the scored tokens of WikiText-2's 62 test documents, from the golden's manifest."""
    manifest = json.loads((ROOT / "goldens" / "minimax-m3-tiny" / "manifest.json").read_text())
    rows = [
        s
        for s in manifest["scores"]
        if s["corpus"] == "wikitext2-test" and s["protocol"]["protocol"] == "tokens"
    ]
    return np.array([t for _, t in rows[0]["documents"]], np.float64)


def lengths(kind: str, rounds: int, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return tokens of documents, [rounds, count]."""
    if kind == "equal":
        return np.full((rounds, count), 4500.0)
    if kind == "log-normal":
        return np.ceil(3000 * np.exp(0.8 * rng.standard_normal((rounds, count))))
    real = real_lengths()
    if count == len(real):
        return np.tile(real, (rounds, 1))
    return real[np.argsort(rng.random((rounds, len(real))), 1)[:, :count]]


def draw(
    kind: str, tokens: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, float]:
    """Return per-document sums of the paired difference, which documents were hit hard, and the
    truth.
    """
    shape, hit, truth = tokens.shape, np.zeros(tokens.shape, bool), EFFECT
    if kind == "skewed":
        effect = EFFECT + 0.02 * (rng.standard_exponential(shape) - 1)
    elif kind == "rare":
        hit = rng.random(shape) < HIT_SHARE
        effect, truth = (
            EFFECT + 0.005 * rng.standard_normal(shape) + HIT * hit,
            EFFECT + HIT_SHARE * HIT,
        )
    else:
        effect = EFFECT + (0.01 if kind == "t3 tokens" else float(kind[3:])) * rng.standard_normal(
            shape
        )
    if kind == "t3 tokens":
        ends = np.cumsum(tokens.astype(np.int64).ravel())
        values = np.concatenate(
            [[0.0], np.cumsum(rng.standard_t(3, int(ends[-1])) * (TOKEN_SD / 3**0.5))]
        )
        noise = (values[ends] - values[np.concatenate([[0], ends[:-1]])]).reshape(shape)
    else:
        noise = TOKEN_SD * np.sqrt(tokens) * rng.standard_normal(shape)
    return effect * tokens + noise, hit, truth


def measure(kind: str, length: str, count: int, rounds: int) -> dict[str, Any]:
    """Return one row: the coverage of each kind of interval and bound, and the worst-document
    rule.
    """
    rng = np.random.default_rng(
        [20260101, list(KINDS).index(kind), list(LENGTHS).index(length), count]
    )
    left, parts = rounds, []
    while left:
        part = min(left, 500)
        tokens = lengths(length, part, count, rng)
        if kind == "t3 tokens":
            tokens = np.ceil(tokens / 20)
        sums, hit, truth = draw(kind, tokens, rng)
        parts.append(_one(sums, tokens, hit, truth))
        left -= part
    columns = {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}
    row = {"documents": count, "effect": kind, "lengths": length, "rounds": rounds}
    row |= {
        k: round(float(columns[k].mean()), 4)
        for k in ("token", "linear", "jackknife", "gate", "high_holds", "low_holds")
    }
    hit_any = columns["hit"]
    row["worst_false"] = round(float(columns["worst"][~hit_any].mean()), 4)
    row["worst_found"] = (
        round(float(columns["found"][hit_any].mean()), 4) if hit_any.any() else None
    )
    return row


def _one(
    sums: np.ndarray, tokens: np.ndarray, hit: np.ndarray, truth: float
) -> dict[str, np.ndarray]:
    count = tokens.shape[-1]
    estimate, jackknife, linear, freedom = moments(sums, tokens)
    off = np.abs(estimate - truth)
    plain = stats.t.ppf(0.975, count - 1)
    bound = stats.t.ppf(0.95, freedom) * jackknife
    means, limit = worst(sums, tokens)
    beyond = means > limit
    return {
        # The claim of independent tokens, from their own spread.
        "token": off <= 1.96 * TOKEN_SD / np.sqrt(tokens.sum(-1)),
        "linear": off <= plain * linear,
        "jackknife": off <= plain * jackknife,
        "gate": off <= stats.t.ppf(0.975, freedom) * jackknife,
        "high_holds": estimate + bound >= truth,
        "low_holds": estimate - bound <= truth,
        "worst": beyond.any(-1),
        "hit": hit.any(-1),
        "found": (beyond & hit).any(-1),
    }


def main() -> None:
    """Simulate and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10_000)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "benchmarks" / "results" / "intervals.json"
    )
    args = parser.parse_args()
    started = time.monotonic()
    scenarios = itertools.product(DOCUMENTS, KINDS, LENGTHS)
    rows = [measure(kind, length, count, args.rounds) for count, kind, length in scenarios]
    result = {
        "command": "python benchmarks/intervals.py",
        "level": 0.95,
        "token_sd": TOKEN_SD,
        "effect": EFFECT,
        "hit": {"share": HIT_SHARE, "nats": HIT},
        "effects": KINDS,
        "lengths": LENGTHS,
        "symmetric": list(SYMMETRIC),
        "rows": rows,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("numpy", "scipy")},
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for r in rows:
        print(
            f"{r['documents']:3} {r['effect']:10} {r['lengths']:11} "
            + " ".join(f"{k} {r[k]}" for k in list(r)[4:])
        )
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
