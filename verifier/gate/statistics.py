# SPDX-License-Identifier: Apache-2.0
"""The paired difference of two models over the same documents, with intervals clustered by
document.

Tokens of a document are not independent: token-wise errors cover 64 to 86% where 95% is claimed.
The document is the sampling unit (Miller, "Adding Error Bars to Evals", arXiv 2411.00640, section
2.2).

The estimate is a ratio of sums, sum(S_d) / sum(T_d). Its standard error is the delete-one jackknife
over documents (Cochran, Sampling Techniques, 3rd ed., sections 6.3 and 6.17): the residual of
document d, r_d = S_d - estimate * T_d, is divided by the tokens of the other documents, T - T_d,
where linearization divides by T; this undoes the shrinking of a long document's own residual. It is
compared with Student's t of nu degrees of freedom, where nu = min(D - 1, (sum a_d)^2 / sum a_d^2),
a_d = (T_d / (T - T_d))^2 (Satterthwaite, for documents that differ in their mean): with documents
of one length nu is D - 1, with a few long ones fewer. benchmarks/intervals.py measures what the
alternatives cover.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from verifier.evaluation import Interval
from verifier.gate.jobs import Array

LEVEL = 0.95
"""The level of each one-sided bound; together they are a two-sided 90% interval."""
RESAMPLES = 2000
RESAMPLE_BATCH = 250
SEED = 20260101
BLOCK = 512
FEW = 20
NUISANCE = 0.001
"""The chance that the interval of a nuisance parameter misses it (`p_of_loss`)."""
_SMALLEST_RATIO = 1e-12
MAX_NEEDED = 10_000_000


def scipy_stats() -> Any:
    """Return ``scipy.stats``, which takes half a second to import and comes with an extra."""
    from scipy import stats  # noqa: PLC0415

    return stats


def moments(sums: Array, tokens: Array) -> tuple[Array, Array, Array, Array]:
    """Return estimate, jackknife standard error, linearized standard error and degrees of freedom
    over the last axis.

    Args:
        sums: what each document's tokens add up to, [..., D].
        tokens: tokens of each document, [..., D], all above zero; D is at least 2.
    """
    count = tokens.shape[-1]
    total = tokens.sum(-1, keepdims=True)
    estimate = sums.sum(-1, keepdims=True) / total
    residual = sums - estimate * tokens
    jackknife = np.sqrt((count - 1) / count * ((residual / (total - tokens)) ** 2).sum(-1))
    linear = np.sqrt(count / (count - 1) * (residual**2).sum(-1)) / total[..., 0]
    a = (tokens / (total - tokens)) ** 2
    freedom = np.minimum(count - 1, a.sum(-1) ** 2 / (a**2).sum(-1))
    return estimate[..., 0], jackknife, linear, freedom


def ratio(sums: Array, tokens: Array, level: float = LEVEL) -> Interval:
    """Return a mean per token over documents.

    With one document, or none that was scored, the interval is infinite: nothing is known of how
    documents differ.

    Args:
        sums: what each document's tokens add up to, [D].
        tokens: tokens of each document, [D]; documents without any are left out.
        level: of each one-sided bound.
    """
    stats = scipy_stats()
    sums, tokens = _scored(sums, tokens)
    count, total = len(tokens), int(tokens.sum())
    if count < 2:
        delta = float(sums.sum()) / total if total else math.nan
        return Interval(delta, math.inf, -math.inf, math.inf, count, total, math.inf)
    delta, se, linear, freedom = (float(x) for x in moments(sums, tokens))
    t = float(stats.t.ppf(level, freedom))
    return Interval(delta, se, delta - t * se, delta + t * se, count, total, t, freedom, linear)


def log_ratio(
    sums: Sequence[float] | Array,
    reference: Sequence[float] | Array,
    tokens: Sequence[int] | Array,
    level: float = LEVEL,
) -> Interval | None:
    """Return the logarithm of the ratio of two positive totals over the same documents, with its
    interval; None below two documents, or where the reference is 0.

    The jackknife of the ratio, brought to the logarithm by its derivative: for skewed values, such
    as KL divergences, bounds hold better there than on the ratio (benchmarks/kl_ratio.py).

    Args:
        sums: what each document adds to the numerator, [D].
        reference: what each adds to the denominator, [D].
        tokens: of each document; those without any are left out.
        level: of each one-sided bound.
    """
    scored = np.asarray(tokens) > 0
    above = np.asarray(sums, np.float64)[scored]
    below = np.asarray(reference, np.float64)[scored]
    total = float(below.sum())
    if len(above) < 2 or total <= 0 or (below >= total).any():
        return None
    estimate, se, _, freedom = (float(x) for x in moments(above, below))
    estimate = max(estimate, _SMALLEST_RATIO)
    delta, se = math.log(estimate), se / estimate
    t = float(scipy_stats().t.ppf(level, freedom))
    return Interval(
        delta,
        se,
        delta - t * se,
        delta + t * se,
        len(above),
        int(np.asarray(tokens).sum()),
        t,
        freedom,
    )


def _scored(sums: Array, tokens: Array) -> tuple[Array, Array]:
    """Return sums and tokens as float64, of the documents that have any."""
    tokens = np.asarray(tokens, np.float64)
    return np.asarray(sums, np.float64)[tokens > 0], tokens[tokens > 0]


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Return exp(total nats / total tokens), NaN without a token."""
    total = sum(tokens)
    return math.exp(sum(nats) / total) if total else math.nan


def paired(
    base: Sequence[float] | Array,
    candidate: Sequence[float] | Array,
    tokens: Sequence[int] | Array,
    level: float = LEVEL,
) -> Interval:
    """Return the paired difference candidate - base.

    Args:
        base: negative log-likelihood of each document, nats.
        candidate: the same for the candidate, on the same tokens.
        tokens: scored tokens of each document.
        level: of each one-sided bound.
    """
    return ratio(
        np.asarray(candidate, np.float64) - np.asarray(base, np.float64), np.asarray(tokens), level
    )


def p_beyond(interval: Interval, margin: float) -> float:
    """Return the one-sided p-value of "the mean is at most ``margin``"; 1 where nothing is
    known.
    """
    stats = scipy_stats()
    if interval.exact is not None:
        return p_of_loss(*interval.exact, margin, "beyond")
    if not math.isfinite(interval.se):
        return 1.0
    if interval.se == 0:
        return 0.0 if interval.delta > margin else 1.0
    return float(stats.t.sf((interval.delta - margin) / interval.se, interval.freedom))


def p_of_loss(
    lost: int, won: int, documents: int, margin: float, side: Literal["beyond", "within"]
) -> float:
    """Return the exact one-sided p-value of "the loss of accuracy is at most ``margin``"
    (``beyond``), or at least (``within``).

    Given the discordant documents, those that only the base or only the candidate gets right, the
    lost ones are binomial; at margin 0 with probability 1/2, which is McNemar's exact test. At
    another margin the probability is (1 + margin / share) / 2, where the share of discordant
    documents is not known: the p-value is the largest over its Clopper-Pearson interval of
    confidence 1 - `NUISANCE`, plus `NUISANCE` (Berger and Boos, JASA 89, 1994).

    Args:
        lost: documents that only the base gets right.
        won: documents that only the candidate gets right.
        documents: the number of all documents.
        margin: of accuracy, in (-1, 1).
        side: which of both is tested.
    """
    stats = scipy_stats()
    discordant = lost + won
    direction: Literal["greater", "less"] = "greater" if side == "beyond" else "less"

    def binomial(probability: float) -> float:
        return float(stats.binomtest(lost, discordant, probability, alternative=direction).pvalue)

    if margin == 0:
        return binomial(0.5) if discordant else 1.0
    shares = _discordant_share(discordant, documents)
    # A loss of that size needs as many discordant documents; where there cannot be as many, only
    # one side can be true.
    if shares[1] < abs(margin):
        return NUISANCE if (margin > 0) == (side == "within") else 1.0
    if not discordant:
        return 1.0
    ends = [(1 + margin / max(x, abs(margin))) / 2 for x in shares]
    return min(1.0, max(map(binomial, ends)) + NUISANCE)


@lru_cache(maxsize=64)
def _discordant_share(discordant: int, documents: int) -> tuple[float, float]:
    """Return the Clopper-Pearson interval of the share of discordant documents, of confidence
    1 - `NUISANCE`; a bisection asks for one many times.
    """
    test = scipy_stats().binomtest(discordant, documents)
    interval = test.proportion_ci(1 - NUISANCE, "exact")
    return float(interval.low), float(interval.high)


def accuracy_loss(lost: int, won: int, documents: int, level: float = LEVEL) -> Interval:
    """Return the loss of accuracy with exact one-sided bounds (`p_of_loss` inverted); its standard
    error serves planning.
    """
    stats = scipy_stats()
    delta = (lost - won) / documents
    se = math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / documents)) / documents
    low = -_bound(lambda m: p_of_loss(lost, won, documents, -m, "beyond") > 1 - level)
    high = _bound(lambda m: p_of_loss(lost, won, documents, m, "within") > 1 - level)
    quantile = float(stats.norm.ppf(level))
    return Interval(
        delta, se, low, high, documents, documents, quantile, exact=(lost, won, documents)
    )


def repeated_answers_loss(differences: Array, level: float = LEVEL) -> Interval:
    """Return the loss of accuracy over items that were answered several times each.

    Student's t over items, with two corrections, so that few items that differ do not give a narrow
    interval: 3/4 is added to the sum of squares, and 1 + (t^2 - 1) / 3 items to the upper end. With
    them the bound of k lost items in many is that of a Poisson count within 1% (0 lost items: 3.0 /
    n); benchmarks/suite.py simulates both ends.

    Args:
        differences: of the share of wrong answers, candidate - base, of each item, [n], n >= 2.
        level: of each one-sided bound.
    """
    count = len(differences)
    delta = float(differences.mean())
    squares = float(((differences - delta) ** 2).sum()) * count / (count - 1)
    se = math.sqrt(squares + 0.75) / count
    t = float(scipy_stats().t.ppf(level, count - 1))
    high = delta + t * se + (1 + (t * t - 1) / 3) / count
    return Interval(delta, se, delta - t * se, high, count, count, t, count - 1)


def _bound(holds: Callable[[float], bool]) -> float:
    """Return the least margin in (-1, 1) that does not hold, to 1e-6; those that hold are below
    it.
    """
    below, above = -1.0 + 1e-9, 1.0
    while above - below > 1e-6:
        middle = (below + above) / 2
        below, above = (middle, above) if holds(middle) else (below, middle)
    return above


def holm(p_values: Sequence[float], alpha: float) -> list[bool]:
    """Return which of a family of hypotheses are rejected (Holm, Scand. J. Statist. 6, 1979)."""
    rejected = [False] * len(p_values)
    for done, i in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        if p_values[i] > alpha / (len(p_values) - done):
            break
        rejected[i] = True
    return rejected


def bootstrap(
    sums: Array, tokens: Array, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float] | None:
    """Return the BCa bounds over resampled documents (Efron, JASA 82, 1987), or None below 3
    documents.

    A cross-check that is computed in another way than `ratio`; it never decides.
    """
    stats = scipy_stats()
    sums, tokens = _scored(sums, tokens)
    if len(tokens) < 3:
        return None
    estimate = sums.sum() / tokens.sum()
    rng = np.random.default_rng(seed)
    drawn = np.sort(
        np.concatenate([_resampled(sums, tokens, rng) for _ in range(RESAMPLES // RESAMPLE_BATCH)])
    )
    ends = np.searchsorted(drawn, estimate, "left"), np.searchsorted(drawn, estimate, "right")
    below = sum(ends) / 2 / RESAMPLES
    if not 0 < below < 1:
        return float(drawn[0]), float(drawn[-1])
    bias = stats.norm.ppf(below)
    influence = (sums - estimate * tokens) / (tokens.sum() - tokens)
    spread = (influence**2).sum() ** 1.5
    skew = (influence**3).sum() / (6 * spread) if spread else 0.0
    z = bias + stats.norm.ppf([1 - level, level])
    levels = stats.norm.cdf(bias + z / (1 - skew * z))
    low, high = np.quantile(drawn, np.clip(levels, 0, 1))
    return float(low), float(high)


def _resampled(sums: Array, tokens: Array, rng: np.random.Generator) -> Array:
    count = len(tokens)
    weights = rng.multinomial(count, np.full(count, 1 / count), RESAMPLE_BATCH)
    estimates: Array = (weights @ sums) / (weights @ tokens)
    return estimates


def token_error(differences: Array) -> float:
    """Return the standard error of the mean that independent tokens would have; 0 below two."""
    if len(differences) < 2:
        return 0.0
    return float(differences.std(ddof=1) / math.sqrt(len(differences)))


def block_error(differences: Array, tokens: Array) -> float:
    """Return the standard error within these documents, from overlapping blocks: a diagnostic that
    ignores how documents differ.

    The variance of the moving-block bootstrap (Kunsch, Ann. Statist. 17, 1989) in closed form. A
    block is 512 tokens, and at most an eighth of its document.
    """
    variance, end = 0.0, 0
    for size in np.asarray(tokens).tolist():
        values = np.asarray(differences[end : end + size], np.float64)
        end += size
        block = min(BLOCK, max(1, size // 8))
        if size > block:
            steps = np.concatenate([[0.0], np.cumsum(values)])
            variance += size / block * float(np.var(steps[block:] - steps[:-block]))
    return math.sqrt(variance) / end if end else 0.0


def worst(sums: Array, tokens: Array, level: float = LEVEL) -> tuple[Array, Array]:
    """Return each document's mean, and an outlier bound from all documents, both [..., D].

    The bound is the median plus a multiple of the scaled median absolute deviation; the multiple is
    Student's t quantile of D - 1 degrees of freedom at 1 - (1 - level) / D, so that some document
    of D exceeds it with a chance of about 1 - level where documents are alike. The bound
    is wider for a document shorter than the median, since its mean scatters more.
    """
    stats = scipy_stats()
    count = tokens.shape[-1]
    means = sums / tokens
    middle = np.median(means, -1, keepdims=True)
    spread = 1.4826 * np.median(np.abs(means - middle), -1, keepdims=True)
    short = np.sqrt(np.maximum(1, np.median(tokens, -1, keepdims=True) / tokens))
    bound: Array = middle + stats.t.ppf(1 - (1 - level) / count, max(1, count - 1)) * spread * short
    return means, bound


def tail_quantile(
    values: Array, tokens: Array, share: float = 0.999, level: float = LEVEL, seed: int = SEED
) -> tuple[float, float, float]:
    """Return a high quantile over tokens and its percentile-bootstrap bounds over documents; NaN
    without a token, and for the bounds below two documents.
    """
    tokens = np.asarray(tokens, np.int64)
    if not len(values):
        return math.nan, math.nan, math.nan
    owner = np.repeat(np.arange(len(tokens)), tokens)
    estimate = float(np.quantile(values, share))
    if np.count_nonzero(tokens) < 2:
        return estimate, math.nan, math.nan
    # Only the upper end of the tokens can hold the quantile, whichever documents are drawn.
    upper = np.argsort(values)[::-1][: max(1, math.ceil(len(values) * (1 - share) * 20))]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), 400)
    ranks = (1 - share) * (weights @ tokens)
    places = [
        int((np.cumsum(row[owner[upper]]) <= rank).sum())
        for row, rank in zip(weights, ranks, strict=True)
    ]
    quantiles = values[upper][np.minimum(places, len(upper) - 1)]
    low, high = np.quantile(quantiles, [1 - level, level])
    return estimate, min(float(low), estimate), max(float(high), estimate)


def documents_needed(interval: Interval, margin: float, widening: float = 0.0) -> int | None:
    """Return about how many documents would decide, at this difference and spread; None where no
    number would.

    Args:
        interval: of some documents.
        margin: the margin that it contains.
        widening: by how much both its ends were moved outwards; a difference that is nearer to the
            margin than this stays open.
    """
    if interval.exact is not None:
        error = float(scipy_stats().norm.sf(interval.t))
        return _answers_needed(*interval.exact, margin, error)
    gap = abs(margin - interval.delta) - widening
    if not math.isfinite(interval.se) or gap <= 0:
        return None
    return max(
        interval.documents + 1,
        math.ceil(interval.documents * (interval.t * interval.se / gap) ** 2),
    )


def _answers_needed(lost: int, won: int, documents: int, margin: float, error: float) -> int | None:
    """Return about how many documents would decide at these rates of lost and won answers, up to
    `MAX_NEEDED`; ``error`` is that of each one-sided bound.
    """
    count = documents + max(1, documents // 8)
    while count < MAX_NEEDED:
        more_lost, more_won = round(lost * count / documents), round(won * count / documents)
        within = p_of_loss(more_lost, more_won, count, margin, "within")
        beyond = p_of_loss(more_lost, more_won, count, margin, "beyond")
        if min(within, beyond) <= error:
            return count
        count += max(1, count // 8)
    return None
