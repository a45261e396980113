# SPDX-License-Identifier: Apache-2.0
"""The paired difference of two models over the same documents, with an interval that documents
cluster.

Tokens of a document are not independent: token-wise errors cover 64 to 86 % where 95 % is claimed.
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
from dataclasses import dataclass
from typing import Literal

import numpy as np

from verifier.gate.jobs import Array

LEVEL = 0.95
"""Of each one-sided bound; the interval shown is two-sided 90 %."""
RESAMPLES = 2000
SEED = 20260101
BLOCK = 512
FEW = 20
NUISANCE = 0.001


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean a token, its clustered standard error, and the two-sided interval whose ends are
    one-sided bounds.
    """

    delta: float
    se: float
    low: float
    high: float
    documents: int
    tokens: int
    t: float
    freedom: float = math.nan
    se_linear: float = math.nan
    exact: tuple[int, int, int] | None = None
    """Of right and wrong answers: documents that only the base got right, that only the candidate
    did, and all."""

    @property
    def ratio(self) -> float:
        """The perplexity ratio that ``delta`` is the logarithm of."""
        return math.exp(self.delta)

    def widened(self, by: float) -> Interval:
        """Return the interval with both ends moved outwards."""
        return Interval(
            self.delta,
            self.se,
            self.low - by,
            self.high + by,
            self.documents,
            self.tokens,
            self.t,
            self.freedom,
            self.se_linear,
            self.exact,
        )


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
    """Return a mean a token over documents.

    Args:
        sums: what each document's tokens add up to, [D].
        tokens: tokens of each document, [D]; documents without any are left out.
        level: of each one-sided bound.

    With one document, or none that was scored, the interval is infinite: nothing is known of how
    documents differ.
    """
    from scipy import stats  # noqa: PLC0415  (half a second, of use to a gate only)

    t, s = np.asarray(tokens, np.float64), np.asarray(sums, np.float64)
    s, t = s[t > 0], t[t > 0]
    total = int(t.sum())
    if len(t) < 2:
        delta = float(s.sum()) / total if total else math.nan
        return Interval(delta, math.inf, -math.inf, math.inf, len(t), total, math.inf)
    delta, se, linear, freedom = (float(x) for x in moments(s, t))
    quantile = float(stats.t.ppf(level, freedom))
    return Interval(
        delta,
        se,
        delta - quantile * se,
        delta + quantile * se,
        len(t),
        total,
        quantile,
        freedom,
        linear,
    )


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
    from scipy import stats  # noqa: PLC0415

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
    """Return the exact one-sided p-value of "accuracy is lost by at most ``margin``" (``beyond``),
    or at least (``within``).

    Given the discordant documents, those that only the base or only the candidate gets right, the
    lost ones are binomial; at margin 0 with probability 1/2, which is McNemar's exact test. At
    another margin the probability is (1 + margin / share) / 2, where share, of documents that are
    discordant, is not known: the p-value is the largest over its Clopper-Pearson interval of
    confidence 1 - `NUISANCE`, plus `NUISANCE` (Berger and Boos, JASA 89, 1994).

    Args:
        lost: documents that only the base gets right.
        won: documents that only the candidate gets right.
        documents: all of them.
        margin: of accuracy, in (-1, 1).
        side: which of both is to be shown.
    """
    from scipy import stats  # noqa: PLC0415

    discordant = lost + won
    direction: Literal["greater", "less"] = "greater" if side == "beyond" else "less"
    if margin == 0:
        return (
            float(stats.binomtest(lost, discordant, 0.5, alternative=direction).pvalue)
            if discordant
            else 1.0
        )
    shares = stats.binomtest(discordant, documents).proportion_ci(1 - NUISANCE, "exact")
    # A loss of that size needs as many discordant documents; where they cannot be as many, only one
    # side can be true.
    if shares.high < abs(margin):
        return NUISANCE if (margin > 0) == (side == "within") else 1.0
    if not discordant:
        return 1.0
    ends = [(1 + margin / max(x, abs(margin))) / 2 for x in (shares.low, shares.high)]
    worst_case = max(
        float(stats.binomtest(lost, discordant, p, alternative=direction).pvalue) for p in ends
    )
    return min(1.0, worst_case + NUISANCE)


def accuracy_loss(lost: int, won: int, documents: int, level: float = LEVEL) -> Interval:
    """Return the loss of accuracy with exact one-sided bounds (`p_of_loss` inverted); its standard
    error is for planning.
    """
    from scipy import stats  # noqa: PLC0415

    delta = (lost - won) / documents
    se = math.sqrt(max(0.0, lost + won - (lost - won) ** 2 / documents)) / documents
    low = -_bound(lambda m: p_of_loss(lost, won, documents, -m, "beyond") > 1 - level)
    high = _bound(lambda m: p_of_loss(lost, won, documents, m, "within") > 1 - level)
    quantile = float(stats.norm.ppf(level))
    return Interval(
        delta, se, low, high, documents, documents, quantile, exact=(lost, won, documents)
    )


def _bound(holds: Callable[[float], bool]) -> float:
    """Return the least margin in (-1, 1) that is not tenable, to 1e-6; tenable ones are below
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

    A cross-check that takes another road than `ratio`; it never decides.
    """
    from scipy import stats  # noqa: PLC0415

    t, s = np.asarray(tokens, np.float64), np.asarray(sums, np.float64)
    s, t = s[t > 0], t[t > 0]
    count = len(t)
    if count < 3:
        return None
    estimate = s.sum() / t.sum()
    rng = np.random.default_rng(seed)
    drawn = np.concatenate(
        [_resampled(s, t, rng, min(250, RESAMPLES - i)) for i in range(0, RESAMPLES, 250)]
    )
    drawn.sort()
    below = (
        (np.searchsorted(drawn, estimate, "left") + np.searchsorted(drawn, estimate, "right"))
        / 2
        / RESAMPLES
    )
    if not 0 < below < 1:
        return float(drawn[0]), float(drawn[-1])
    bias = stats.norm.ppf(below)
    influence = (s - estimate * t) / (t.sum() - t)
    spread = (influence**2).sum() ** 1.5
    skew = (influence**3).sum() / (6 * spread) if spread else 0.0
    z = bias + stats.norm.ppf([1 - level, level])
    ends = stats.norm.cdf(bias + z / (1 - skew * z))
    low, high = np.quantile(drawn, np.clip(ends, 0, 1))
    return float(low), float(high)


def _resampled(s: Array, t: Array, rng: np.random.Generator, count: int) -> Array:
    weights = rng.multinomial(len(t), np.full(len(t), 1 / len(t)), count)
    found: Array = (weights @ s) / (weights @ t)
    return found


def token_error(differences: Array) -> float:
    """Return the standard error of the mean that independent tokens would have; 0 below two."""
    return (
        float(differences.std(ddof=1) / math.sqrt(len(differences)))
        if len(differences) > 1
        else 0.0
    )


def block_error(differences: Array, tokens: Array) -> float:
    """Return the standard error within these documents, from overlapping blocks: a diagnostic,
    blind to other documents.

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
    """Return each document's mean and the bound that a robust reading of all of them sets, [..., D]
    both.

    The bound is the median plus a multiple of the scaled median absolute deviation; the multiple is
    Student's t quantile of D - 1 degrees of freedom at 1 - (1 - level) / D, so that some document
    of D exceeds it with a chance of about 1 - level where documents are alike. A document shorter
    than the median is allowed the more, as its mean scatters.
    """
    from scipy import stats  # noqa: PLC0415

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
    without a token.
    """
    tokens = np.asarray(tokens, np.int64)
    if not len(values):
        return math.nan, math.nan, math.nan
    owner = np.repeat(np.arange(len(tokens)), tokens)
    # Only the upper end of the tokens can hold the quantile, whatever documents are drawn.
    keep = np.argsort(values)[::-1][: max(1, math.ceil(len(values) * (1 - share) * 20))]
    rng = np.random.default_rng(seed)
    weights = rng.multinomial(len(tokens), np.full(len(tokens), 1 / len(tokens)), 400)
    ranks = (1 - share) * (weights @ tokens)
    place = [
        int((np.cumsum(w[owner[keep]]) <= rank).sum())
        for w, rank in zip(weights, ranks, strict=True)
    ]
    low, high = np.quantile(values[keep][np.minimum(place, len(keep) - 1)], [1 - level, level])
    return float(np.quantile(values, share)), float(low), float(high)


def documents_needed(interval: Interval, margin: float) -> int | None:
    """Return about how many documents would decide, at this difference and spread; None where no
    number would.
    """
    if interval.exact is not None:
        return _answers_needed(*interval.exact, margin)
    gap = abs(margin - interval.delta)
    if not math.isfinite(interval.se) or gap == 0:
        return None
    return max(
        interval.documents + 1,
        math.ceil(interval.documents * (interval.t * interval.se / gap) ** 2),
    )


def _answers_needed(lost: int, won: int, documents: int, margin: float) -> int | None:
    """Return about how many documents would decide at these rates of lost and won answers, up to
    ten million.
    """
    count = documents
    while (count := count + max(1, count // 8)) < 10_000_000:
        a, b = (round(x * count / documents) for x in (lost, won))
        if (
            min(p_of_loss(a, b, count, margin, "within"), p_of_loss(a, b, count, margin, "beyond"))
            <= 1 - LEVEL
        ):
            return count
    return None
