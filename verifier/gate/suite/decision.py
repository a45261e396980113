# SPDX-License-Identifier: Apache-2.0
"""From two runs of each entry to one decision.

A suite passes where every criterion of every entry is shown to be within its margin: all must hold,
so nothing is corrected for. It fails where Holm's procedure over all criteria of all entries shows
one to be beyond its margin. Both at the error of the look.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from verifier.evaluation import GateResult, Interval, Margin, Outcome
from verifier.gate.clusters import Clusters, clusters_of
from verifier.gate.comparison import loss_over
from verifier.gate.jobs import Array
from verifier.gate.measures import KL_STRICTER
from verifier.gate.run_file import Run
from verifier.gate.scorers.completions import CUT_OFF, END_TOKEN
from verifier.gate.statistics import (
    documents_needed,
    holm,
    log_ratio,
    p_beyond,
    scipy_stats,
)
from verifier.gate.suite.result import Criterion, EntryResult, Length, More, Recovery
from verifier.text import counted

TWO_SIDED_95 = 0.975
"""The level of each one-sided bound of a two-sided 95% interval."""
MOST_CUT_OFF = 0.5
"""Where more completions than this are cut off, their length is that of the limit."""


@dataclass(frozen=True)
class Compared:
    """Two runs of an entry and their comparison; ``max_length`` is the margin of the logarithm of
    the ratio of completion tokens.
    """

    base: Run
    candidate: Run
    gate: GateResult
    max_length: Margin
    repeats: int = 1

    @property
    def clusters(self) -> Clusters:
        """The sampling units."""
        header = self.base.header
        return clusters_of(header.documents, header.groups)

    @property
    def level(self) -> float:
        """The level of each one-sided bound."""
        return 1 - self.gate.alpha

    @property
    def generates(self) -> bool:
        """Whether both runs have the lengths of completions."""
        return "completion" in self.base.arrays and "completion" in self.candidate.arrays


def measured(name: str, compared: Compared) -> EntryResult:
    """Return an entry's measures; whether they decide is open until `decided`."""
    gate, clusters = compared.gate, compared.clusters
    task = gate.key.get("protocol") == "task"
    entry = EntryResult(
        name,
        "task" if task else "corpus",
        "inconclusive",
        gate,
        clusters.count,
        compared.repeats,
        round(compared.base.header.seconds + compared.candidate.header.seconds, 1),
    )
    if gate.interval is None:
        return replace(entry, outcome="failed", reasons=(_nonfinite(gate),))
    length, criteria = None, _gate_criteria(compared, gate.interval)
    reasons = gate.doubts
    if compared.generates:
        length = _length(compared)
        criteria += _length_criteria(compared)
        reasons += _cut_off_doubt(length)
    return replace(
        entry,
        criteria=tuple(criteria),
        recovery=_recovery(compared, task=task),
        length=length,
        reasons=reasons,
    )


def decided(entries: Sequence[EntryResult], alpha: float) -> tuple[EntryResult, ...]:
    """Return the entries with their outcomes.

    Args:
        entries: measured.
        alpha: the error of the look, which Holm's procedure divides over all criteria.
    """
    rejected = iter(holm([c.p_value for entry in entries for c in entry.criteria], alpha))
    return tuple(_decided(entry, [next(rejected) for _ in entry.criteria]) for entry in entries)


def outcome_of(entries: Sequence[EntryResult]) -> Outcome:
    """Return the outcome of the whole: failed if one entry did, passed if all did."""
    outcomes = {entry.outcome for entry in entries}
    if "failed" in outcomes:
        return "failed"
    return "passed" if outcomes == {"passed"} else "inconclusive"


def _decided(entry: EntryResult, rejected: Sequence[bool]) -> EntryResult:
    if not entry.criteria:
        return entry
    criteria = tuple(
        replace(criterion, status="beyond") if beyond else criterion
        for criterion, beyond in zip(entry.criteria, rejected, strict=True)
    )
    beyond = [criterion for criterion in criteria if criterion.status == "beyond"]
    open_ = [criterion for criterion in criteria if criterion.status == "open"]
    outcome: Outcome = "failed" if beyond else "inconclusive"
    if not (beyond or open_ or entry.reasons):
        outcome = "passed"
    texts = [f"{_in_words(entry, each)} is beyond the margin" for each in beyond]
    texts += [_open_reason(entry, each) for each in open_]
    return replace(entry, outcome=outcome, criteria=criteria, reasons=(*texts, *entry.reasons))


def _gate_criteria(compared: Compared, interval: Interval) -> list[Criterion]:
    """Return the loss and, where it has a margin, the KL divergence."""
    gate, margin = compared.gate, compared.gate.margin
    widening = gate.floor if gate.unlike and gate.floor else 0.0
    above_noise = gate.floor is None or margin.nats > gate.floor
    needed = documents_needed(interval, margin.nats, widening) if above_noise else None
    answers = _by_repeat(compared, compared.candidate.sums - compared.base.sums)
    criteria = [
        Criterion(
            "loss",
            interval,
            margin,
            p_beyond(interval, margin.nats + widening),
            "within" if interval.high <= margin.nats and above_noise else "open",
            More(needed, repeats_needed(answers, needed)),
        )
    ]
    kl = gate.measures.kl
    if kl is not None and kl.margin is not None:
        # A lower bound can show that a divergence is beyond its margin, and not that it is within.
        within = kl.mean.high <= kl.margin.nats or not kl.exact
        p_value = min(1.0, KL_STRICTER * p_beyond(kl.mean, kl.margin.nats))
        needed = documents_needed(kl.mean, kl.margin.nats)
        status: Literal["within", "open"] = "within" if within else "open"
        criteria.append(Criterion("KL", kl.mean, kl.margin, p_value, status, More(needed)))
    return criteria


def _length_criteria(compared: Compared) -> list[Criterion]:
    interval, margin = _log_length(compared, compared.level), compared.max_length
    if interval is None:
        return []
    within = max(-interval.low, interval.high) <= margin.nats
    gap = margin.nats - abs(interval.delta)
    needed = None
    if gap > 0:
        needed = math.ceil(interval.documents * (interval.t * interval.se / gap) ** 2)
        needed = max(interval.documents + 1, needed)
    residual = (
        compared.candidate.arrays["completion"]
        - interval.ratio * compared.base.arrays["completion"]
    )
    repeats = repeats_needed(_by_repeat(compared, residual), needed)
    p_value = p_outside(interval, margin.nats)
    status: Literal["within", "open"] = "within" if within else "open"
    return [Criterion("length", interval, margin, p_value, status, More(needed, repeats))]


def p_outside(interval: Interval, margin: float) -> float:
    """Return the p-value of "the mean is between -margin and margin" (Hodges and Lehmann, J. R.
    Statist. Soc. B 16, 1954).
    """
    size = abs(interval.delta)
    if interval.se == 0:
        return 0.0 if size > margin else 1.0
    t = scipy_stats().t
    ends = [(size - margin) / interval.se, (size + margin) / interval.se]
    return min(1.0, sum(float(t.sf(end, interval.freedom)) for end in ends))


def _log_length(compared: Compared, level: float) -> Interval | None:
    """Return the logarithm of the ratio of completion tokens, candidate over base."""
    clusters = compared.clusters
    candidate, base = (
        clusters.sums(run.arrays["completion"]) for run in (compared.candidate, compared.base)
    )
    return log_ratio(candidate, base, clusters.sums(compared.base.tokens), level)


def _length(compared: Compared) -> Length:
    distinct = compared.clusters.distinct
    runs = (compared.base, compared.candidate)
    tokens = [int(run.arrays["completion"][distinct].sum()) for run in runs]
    finishes = [run.arrays["finish"][distinct] for run in runs]
    cut_off = [float((finish == CUT_OFF).mean()) for finish in finishes]
    without = [float((finish != END_TOKEN).mean()) for finish in finishes]
    interval = _log_length(compared, TWO_SIDED_95)
    ends = (math.nan, math.nan)
    if interval is not None:
        ends = math.exp(interval.low), math.exp(interval.high)
    ratio = tokens[1] / tokens[0] if tokens[0] else math.nan
    return Length(
        tokens[0], tokens[1], ratio, *ends, (cut_off[0], cut_off[1]), (without[0], without[1])
    )


def _cut_off_doubt(length: Length) -> tuple[str, ...]:
    share = max(length.cut_off)
    if share <= MOST_CUT_OFF:
        return ()
    return (
        f"{share:.0%} of the completions are cut off at the task's limit, so their length shows "
        "little; raise max_gen_toks of the task",
    )


def _recovery(compared: Compared, *, task: bool) -> Recovery | None:
    """Return candidate over base with its two-sided 95% interval.

    Of a task: 1 - loss / share of right answers of the base. That share's own error is of second
    order where the loss is small.
    """
    base, candidate = compared.base, compared.candidate
    loss = loss_over(base, candidate, compared.clusters, TWO_SIDED_95)
    if not task:
        gate = compared.gate
        loss = loss.widened(gate.floor if gate.unlike and gate.floor else 0.0)
        return Recovery(*(math.exp(-value) for value in (loss.delta, loss.high, loss.low)))
    share = 1 - float(base.sums[compared.clusters.distinct].mean())
    if share <= 0:
        return None
    ends = (1 - value / share for value in (loss.delta, loss.high, loss.low))
    return Recovery(*(max(0.0, end) for end in ends))


def _by_repeat(compared: Compared, values: Array) -> Array:
    """Return values of documents as [items, repeats]."""
    return values[compared.clusters.distinct].reshape(-1, compared.repeats)


def repeats_needed(values: Array, items: int | None) -> int | None:
    """Return about how many repeats of the present items have the standard error of ``items`` items
    with the present repeats; None where no number has, or with one repeat.

    The variance between items stays whatever the repeats; that within them is divided by their
    number.

    Args:
        values: [items, repeats].
        items: None where no number would decide.
    """
    present, repeats = values.shape
    if items is None or repeats < 2 or present < 2:
        return None
    total = float(np.var(values.mean(1), ddof=1))
    within = float(np.var(values, axis=1, ddof=1).mean())
    between = max(0.0, total - within / repeats)
    left = total * present / items - between
    return math.ceil(within / left) if left > 0 else None


def _nonfinite(gate: GateResult) -> str:
    owner = "the base's" if gate.nonfinite_base else "the candidate's"
    return f"{owner} logits are not finite in {counted(len(gate.nonfinite), 'document')}"


def _open_reason(entry: EntryResult, criterion: Criterion) -> str:
    floor, margin = entry.gate.floor, criterion.margin.nats
    words = _in_words(entry, criterion)
    if criterion.measure == "loss" and floor is not None and margin <= floor:
        return f"{words}: the margin is not above the noise floor of {floor:.6f}"
    more, noun = criterion.more, "item" if entry.kind == "task" else "document"
    if more.items is None:
        return f"{words} is at the margin; no number of {noun}s would decide"
    text = f"about {counted(more.items, noun)} would decide (here {entry.items:,})"
    if more.repeats is not None:
        text += f", or {more.repeats:,} repeats of each (here {entry.repeats:,})"
    return f"{words} is open; {text}"


def _in_words(entry: EntryResult, criterion: Criterion) -> str:
    """Return a measure with its interval and its margin."""
    i, margin = criterion.interval, criterion.margin.nats
    if criterion.measure == "length":
        ends = f"{math.exp(i.low):.3f}, {math.exp(i.high):.3f}"
        limits = f"{math.exp(-margin):.3f} to {math.exp(margin):.3f}"
        return f"length ratio {i.ratio:.3f} [{ends}], margin {limits},"
    if criterion.measure == "loss" and entry.kind == "task":
        return (
            f"loss {i.delta:+.2%} of accuracy [{i.low:+.2%}, {i.high:+.2%}], margin {margin:.2%},"
        )
    unit = "nats per word" if entry.gate.key["protocol"] == "lm-eval" else "nats per token"
    name = "loss" if criterion.measure == "loss" else "KL divergence"
    return f"{name} {i.delta:+.5f} {unit} [{i.low:+.5f}, {i.high:+.5f}], margin {margin:.5f},"
