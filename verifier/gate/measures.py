# SPDX-License-Identifier: Apache-2.0
"""Diagnostics of two runs over the same tokens, paired token by token and clustered by document."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from verifier.evaluation import EXACT_KL, Kl, KlRatio, Margin, Measures
from verifier.gate.clusters import Clusters, clusters_of
from verifier.gate.jobs import Array
from verifier.gate.run_file import Run
from verifier.gate.statistics import (
    FEW,
    block_error,
    bootstrap,
    log_ratio,
    ratio,
    tail_quantile,
    token_error,
    worst,
)

CONFIDENT = 0.9
"""The base is confident where it gives its top token a higher probability than this."""
KL_STRICTER = 5
"""The bounds of a KL divergence have a fifth of the error: 99% where those of a loss have 95%."""
_SMALLEST_MASS = 1e-7
_ROWS = 1024


def measure(
    base: Run,
    candidate: Run,
    kl: Array | None = None,
    level: float = 0.95,
    clusters: Clusters | None = None,
) -> Measures:
    """Return the diagnostics of two runs.

    Args:
        base: the reference.
        candidate: the run that is compared with it.
        kl: KL(base || candidate) of each token, nats, where both ran in lockstep.
        level: of each one-sided bound.
        clusters: the sampling units; by default those of the base's header.
    """
    units = clusters or clusters_of(base.header.documents, base.header.groups)
    tokens, difference = base.tokens, candidate.sums - base.sums
    measures = _of_documents(difference, tokens, units, level)
    if "nats" not in base.arrays or "nats" not in candidate.arrays:
        return measures
    each = candidate.arrays["nats"].astype(np.float64) - base.arrays["nats"]
    measures = _with_token_errors(measures, each, base, units)
    if "top1" not in base.arrays or "top1" not in candidate.arrays:
        return measures
    same = base.arrays["top1"] == candidate.arrays["top1"]
    confident = base.arrays["sure"] > math.log(CONFIDENT)
    return replace(
        measures,
        top1=ratio(units.sums(by_document(same, tokens)), units.sums(tokens), level),
        sure=int(confident.sum()),
        flips=int((confident & ~same).sum()),
        kl=_kl(base, candidate, kl, units, level),
    )


def _of_documents(difference: Array, tokens: Array, units: Clusters, level: float) -> Measures:
    sums = units.sums(difference), units.sums(tokens)
    measures = Measures(bootstrap=bootstrap(*sums, level))
    scored = np.flatnonzero((tokens > 0) & units.distinct)
    if len(scored) < 3:
        return measures
    means, bound = worst(difference[scored], tokens[scored].astype(np.float64))
    at = int(np.argmax(means - bound))
    return replace(
        measures,
        worst=(int(scored[at]), float(means[at]), float(bound[at])),
        beyond=tuple(scored[means > bound].tolist()),
    )


def _with_token_errors(measures: Measures, each: Array, base: Run, units: Clusters) -> Measures:
    """Return measures with the standard errors that ``each``, a difference per token, has."""
    se_tokens = token_error(each)
    design_effect = None
    interval = ratio(units.sums(by_document(each, base.tokens)), units.sums(base.tokens))
    if interval.documents > 1 and se_tokens > 0:
        design_effect = float(interval.se / se_tokens) ** 2
    se_blocks = block_error(each, base.tokens) if interval.documents < FEW else None
    return replace(measures, se_tokens=se_tokens, design_effect=design_effect, se_blocks=se_blocks)


def by_document(values: Array, tokens: Array) -> Array:
    """Return the float64 sums of a value per token over each document."""
    steps = np.concatenate([[0.0], np.cumsum(values, dtype=np.float64)])
    ends = np.cumsum(tokens)
    sums: Array = steps[ends] - steps[ends - tokens]
    return sums


def _kl(base: Run, candidate: Run, kl: Array | None, units: Clusters, level: float) -> Kl | None:
    computed = kl_of_tokens(base, candidate, kl)
    if computed is None:
        return None
    per_token, kind = computed
    return Kl(
        kind,
        ratio(
            units.sums(by_document(per_token, base.tokens)),
            units.sums(base.tokens),
            kl_level(level),
        ),
        tail_quantile(per_token, base.tokens, level=level),
    )


def kl_level(level: float) -> float:
    """Return the level of bounds of a KL divergence: a fifth of the error, since it is skewed."""
    return 1 - (1 - level) / KL_STRICTER


def kl_of_tokens(base: Run, candidate: Run, kl: Array | None = None) -> tuple[Array, str] | None:
    """Return KL(base || candidate) at each token, nats, and how it was computed; None where a run
    has no top tokens.

    Args:
        base: the reference.
        candidate: the run that is compared with it.
        kl: the exact divergence, where both ran in lockstep.
    """
    if kl is not None:
        return kl, EXACT_KL
    top_k = min(top_k_of(base), top_k_of(candidate))
    if not top_k:
        return None
    kind = f"a lower bound, from the top {top_k} tokens and the rest"
    return kl_lower_bound(_top(base, top_k), _top(candidate, top_k)), kind


def top_k_of(run: Run) -> int:
    """Return how many top tokens a run has at each position, 0 for none."""
    top = run.arrays.get("top_ids")
    return top.shape[1] if top is not None else 0


def _top(run: Run, top_k: int) -> dict[str, Array]:
    return {name: run.arrays[name][:, :top_k] for name in ("top_ids", "top_logprobs")}


def kl_ratio(
    base: Run, candidate: Run, accepted: Run, units: Clusters, margin: Margin, level: float
) -> KlRatio | None:
    """Return KL(base || candidate) / KL(base || accepted), both from the same number of top tokens;
    None where a run has none, or the accepted run does not differ from the base.

    Args:
        base: the reference.
        candidate: the run to evaluate.
        accepted: the run that is known to be good.
        units: the sampling units.
        margin: the largest tolerated ratio, as a logarithm.
        level: of the loss's bounds; those of the ratio are stricter (`kl_level`).
    """
    runs = (base, candidate, accepted)
    top_k = min(map(top_k_of, runs))
    if not top_k:
        return None
    tops = [_top(run, top_k) for run in runs]
    sums = [units.sums(by_document(kl_lower_bound(tops[0], top), base.tokens)) for top in tops[1:]]
    total = float(units.sums(base.tokens).sum())
    interval = log_ratio(sums[0], sums[1], units.sums(base.tokens), kl_level(level))
    if interval is None:
        return None
    kind = f"lower bounds, from the top {top_k} tokens and the rest of both"
    means = [float(values.sum()) / total for values in sums]
    return KlRatio(kind, means[0], means[1], interval, margin)


def kl_lower_bound(base: dict[str, Array], candidate: dict[str, Array]) -> Array:
    """Return a lower bound of KL(base || candidate) at each token from the top tokens, nats, [T].

    The vocabulary is divided into the tokens that both runs name, one cell each, and one cell for
    all others: merging cells cannot raise a divergence (data-processing inequality). The mass of
    the last cell is a difference from one in float32; the candidate's is taken as at least 1e-7,
    which can only lower the bound.
    """
    total = len(base["top_ids"])
    bounds = np.zeros(total)
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
        bounds[rows] = np.maximum(cells + rest, 0.0)
    return bounds
