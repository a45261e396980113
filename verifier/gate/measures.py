# SPDX-License-Identifier: Apache-2.0
"""What two runs over the same tokens differ in, beside the loss; everything paired token by token,
clustered by document.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from verifier.gate.jobs import Array
from verifier.gate.run_file import Run
from verifier.gate.statistics import (
    FEW,
    Interval,
    block_error,
    bootstrap,
    moments,
    ratio,
    tail_quantile,
    token_error,
    worst,
)

SURE = 0.9
"""A base that gives its likeliest token more than this is sure."""
_SMALLEST_MASS = 1e-7
_ROWS = 1024


@dataclass(frozen=True)
class Kl:
    """Mean KL(base || candidate) and its 99.9 % quantile over tokens with bounds, nats; ``kind``
    says what it is.
    """

    kind: str
    mean: Interval
    tail: tuple[float, float, float]


@dataclass(frozen=True)
class Measures:
    """Diagnostics of a comparison. Those that need tokens are None where a run has sums only
    (lm-eval).

    ``design_effect`` is the square of the clustered over the token-wise standard error.
    ``se_blocks`` is given below 20 documents and never decides. ``worst`` is (document, its mean,
    its bound) of the document furthest beyond its bound, or nearest to it; ``beyond`` are the
    documents beyond theirs. ``flips`` of ``sure`` tokens where the base was sure and the
    candidate's likeliest token is another.
    """

    bootstrap: tuple[float, float] | None = None
    se_tokens: float | None = None
    design_effect: float | None = None
    se_blocks: float | None = None
    kl: Kl | None = None
    top1: Interval | None = None
    flips: int | None = None
    sure: int | None = None
    worst: tuple[int, float, float] | None = None
    beyond: tuple[int, ...] = ()


def measure(base: Run, candidate: Run, kl: Array | None = None, level: float = 0.95) -> Measures:
    """Return the measures of two runs; ``kl`` is KL(base || candidate) of each token where both ran
    in lockstep.
    """
    tokens = base.tokens
    difference = candidate.sums - base.sums
    scored = np.flatnonzero(tokens > 0)
    found: dict[str, object] = {"bootstrap": bootstrap(difference, tokens, level)}
    if len(scored) > 2:
        means, bound = worst(difference[scored], tokens[scored].astype(np.float64))
        at = int(np.argmax(means - bound))
        found["worst"] = (int(scored[at]), float(means[at]), float(bound[at]))
        found["beyond"] = tuple(scored[means > bound].tolist())
    if "nats" not in base.arrays or "nats" not in candidate.arrays:
        return Measures(**found)  # type: ignore[arg-type]
    each = candidate.arrays["nats"].astype(np.float64) - base.arrays["nats"]
    found["se_tokens"] = plain = token_error(each)
    if len(scored) > 1 and plain > 0:
        found["design_effect"] = (
            float(moments(difference[scored], tokens[scored].astype(np.float64))[1] / plain) ** 2
        )
    if len(scored) < FEW:
        found["se_blocks"] = block_error(each, tokens)
    if "top1" not in base.arrays or "top1" not in candidate.arrays:
        return Measures(**found)  # type: ignore[arg-type]
    same = base.arrays["top1"] == candidate.arrays["top1"]
    found["top1"] = ratio(by_document(same, tokens), tokens, level)
    sure = base.arrays["sure"] > math.log(SURE)
    found |= {
        "sure": int(sure.sum()),
        "flips": int((sure & ~same).sum()),
        "kl": _kl(base, candidate, kl, level),
    }
    return Measures(**found)  # type: ignore[arg-type]


def by_document(values: Array, tokens: Array) -> Array:
    """Return the float64 sums of a value a token over each document."""
    steps = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.cumsum(tokens)
    found: Array = steps[ends] - steps[ends - tokens]
    return found


def _kl(base: Run, candidate: Run, kl: Array | None, level: float) -> Kl | None:
    kind = "lockstep"
    if kl is None:
        if "top_ids" not in base.arrays or "top_ids" not in candidate.arrays:
            return None
        kl = kl_lower_bound(base.arrays, candidate.arrays)
        kind = f"a lower bound, from the {base.arrays['top_ids'].shape[1]} likeliest tokens and the rest"
    return Kl(
        kind,
        ratio(by_document(kl, base.tokens), base.tokens, level),
        tail_quantile(kl, base.tokens, level=level),
    )


def kl_lower_bound(base: dict[str, Array], candidate: dict[str, Array]) -> Array:
    """Return a lower bound of KL(base || candidate) at each token from the likeliest tokens of
    both, nats, [T].

    The vocabulary is cut into the tokens that both runs name, one cell each, and one cell for all
    others: merging cells cannot raise a divergence (data-processing inequality). The mass of the
    last cell is a difference from one in float32; the candidate's is taken as at least 1e-7, which
    can only lower the bound.
    """
    total = len(base["top_ids"])
    found = np.zeros(total)
    for start in range(0, total, _ROWS):
        rows = slice(start, start + _ROWS)
        ids, other = base["top_ids"][rows], candidate["top_ids"][rows]
        logp = base["top_logprobs"][rows].astype(np.float64)
        logq = candidate["top_logprobs"][rows].astype(np.float64)
        match = ids[:, :, None] == other[:, None, :]
        both = match.any(2)
        q = np.where(both, np.take_along_axis(logq, match.argmax(2), 1), 0.0)
        p = np.where(both, logp, 0.0)
        cells = np.where(both, np.exp(p) * (p - q), 0.0).sum(1)
        rest_p = 1 - np.where(both, np.exp(p), 0.0).sum(1)
        rest_q = np.maximum(1 - np.where(both, np.exp(q), 0.0).sum(1), _SMALLEST_MASS)
        rest = np.where(
            rest_p > _SMALLEST_MASS,
            rest_p * np.log(np.maximum(rest_p, _SMALLEST_MASS) / rest_q),
            0.0,
        )
        found[rows] = np.maximum(cells + rest, 0.0)
    return found
