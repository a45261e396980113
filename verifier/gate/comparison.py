# SPDX-License-Identifier: Apache-2.0
"""Compare two runs. No model is loaded, so they may come from different machines."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from verifier.errors import IncomparableError, UsageError
from verifier.evaluation import (
    Accuracy,
    Drift,
    ExpertReach,
    GateResult,
    Interval,
    Margin,
    Measures,
)
from verifier.gate.clusters import FEWEST, Clusters, clusters_of
from verifier.gate.decision import Divergence, alpha_of, documents_for, outcome_of
from verifier.gate.jobs import Array
from verifier.gate.measures import by_document, kl_of_tokens, kl_ratio, measure, top_k_of
from verifier.gate.plausibility import doubts_about
from verifier.gate.run_file import Run, require_same_key, require_same_protocol, unlike_environment
from verifier.gate.statistics import (
    LEVEL,
    accuracy_loss,
    p_beyond,
    paired,
    perplexity,
    repeated_answers_loss,
)
from verifier.text import counted

UNLIKE_FLOOR = 0.0005
"""Nats per token that two environments may differ by where nothing was measured: BF16 and FP16 on
one engine differ by 0.0004 (ggml-org/llama.cpp#7150)."""
UNKNOWN_ATTEMPTS = (
    "earlier attempts are unknown: the error is 5% only if this is the first look (--cache DIR of "
    "ckptgate gate records attempts)"
)
MAX_NAMED = 10
Losses = Sequence[tuple[Interval, Margin]]


def compare_runs(
    base: Run,
    candidate: Run,
    margin: Margin,
    *,
    drift_against: Run | None = None,
    drift_margin: Margin | None = None,
    kl: Array | None = None,
    looks: int | None = None,
    floor_runs: Sequence[Run] = (),
    base_record: float | None = None,
    kl_margin: Margin | None = None,
    max_kl_ratio: Margin | None = None,
) -> GateResult:
    """Return the result for a candidate's run.

    Args:
        base: the run to compare with.
        candidate: the run to evaluate.
        margin: the largest tolerated loss over the base.
        drift_against: an accepted run on the same text, to evaluate the drift as well.
        drift_margin: the largest tolerated loss over it.
        kl: KL(base || candidate) of each token, nats, where both ran in lockstep.
        looks: which look this is, 1 for the first; each has its share of the 5% error. None
            where earlier attempts are not known, which the result says.
        floor_runs: the base as other engines score it; what it differs by there is noise too.
        kl_margin: the largest tolerated KL(base || candidate).
        max_kl_ratio: the largest tolerated KL(base || candidate) / KL(base || accepted), as a
            logarithm (`kl_ratio_of`); where all runs have top tokens it decides the drift in place
            of the loss.
        base_record: the base's loss on these documents in an earlier attempt, nats per token.

    Raises:
        UsageError: the candidate is the base or the accepted run, or a floor run is not the base's.
        ContentError: the runs have different protocol keys, or the accepted run has logits that are
            not finite.
    """
    _require_comparable(base, candidate, drift_against)
    references = [base] if drift_against is None else [base, drift_against]
    engine_floors = [floor_between(base, run) for run in floor_runs]
    unlike = _unlike(references, candidate)
    floor = _floor([*references, candidate], engine_floors, unlike=bool(unlike))
    result = _without_statistics(base, candidate, margin, looks)
    result = replace(result, floor=floor, unlike=unlike)
    if result.nonfinite:
        return result
    pair = _Pair(
        base,
        candidate,
        clusters_of(base.header.documents, base.header.groups),
        level=1 - result.alpha,
        widening=floor if unlike and floor else 0.0,
        unlike=bool(unlike),
    )
    plain = loss_over(base, candidate, pair.clusters, pair.level)
    losses = [(plain.widened(pair.widening), margin)]
    measures = _measures(pair, kl, kl_margin)
    drift = None
    if drift_against is not None and drift_margin is not None:
        drift = _drift(pair, drift_against, drift_margin, max_kl_ratio)
        losses += [(drift.interval, drift.margin)] if drift.kl is None else []
    outcome = outcome_of(
        losses,
        floor=floor,
        widening=pair.widening,
        alpha=result.alpha,
        divergences=_divergences(measures, drift),
    )
    doubts = [
        *_few_documents(plain.documents, grouped=pair.clusters.grouped),
        *doubts_about(base, candidate, plain, pair.clusters.distinct, base_record),
    ]
    if outcome == "passed" and doubts:
        outcome = "inconclusive"
    notes = [_floor_note(run, f) for run, f in zip(floor_runs, engine_floors, strict=True)]
    if outcome == "inconclusive":
        notes += _low_margin_note(losses, floor)
    notes += _notes(pair, looks, drift, measures, plain.documents)
    return replace(
        result,
        outcome=outcome,
        interval=losses[0][0],
        perplexity_base=math.nan if pair.task else _perplexity(base, pair.clusters),
        perplexity_candidate=math.nan if pair.task else _perplexity(candidate, pair.clusters),
        drift=drift,
        measures=measures,
        needed=documents_for(losses, pair.widening) if outcome == "inconclusive" else None,
        notes=tuple(notes),
        doubts=tuple(doubts),
        kl_documents=_kl_documents(base, candidate, kl),
        accuracy=_accuracy(base, candidate, pair.clusters, plain) if pair.task else None,
    )


@dataclass(frozen=True)
class _Pair:
    """Two runs, and how they are compared: the sampling units, the level of each one-sided bound,
    and by how much intervals of losses are widened where environments are ``unlike``.
    """

    base: Run
    candidate: Run
    clusters: Clusters
    level: float
    widening: float
    unlike: bool

    @property
    def task(self) -> bool:
        """Whether right and wrong answers are compared."""
        return self.candidate.header.key.get("protocol") == "task"


def _require_comparable(base: Run, candidate: Run, accepted: Run | None) -> None:
    """Refuse runs that show nothing about each other.

    Raises:
        UsageError: the candidate is the base or the accepted run.
        IncomparableError: the protocols differ, or the accepted run has logits that are not finite.
    """
    if base.header.weights_sha256 == candidate.header.weights_sha256:
        raise UsageError(f"{candidate.header.model}: the candidate is the base itself")
    require_same_protocol(base.header, candidate.header)
    if accepted is None:
        return
    if _same_model(accepted, candidate):
        raise UsageError(
            f"{candidate.header.model}: the accepted run is of the candidate itself; a drift from "
            "itself proves nothing"
        )
    require_same_protocol(accepted.header, candidate.header)
    if accepted.header.nonfinite:
        raise IncomparableError(
            f"{accepted.header.model}: the accepted run has logits that are not finite; drift "
            "cannot be measured from it"
        )


def _without_statistics(base: Run, candidate: Run, margin: Margin, looks: int | None) -> GateResult:
    """Return the result of runs whose logits are not finite, to which others add statistics."""
    clusters = clusters_of(base.header.documents, base.header.groups)
    return GateResult(
        "failed",
        candidate=candidate.header.model,
        base=base.header.model,
        margin=margin,
        interval=None,
        perplexity_base=math.nan,
        perplexity_candidate=math.nan,
        measures_kl=base.header.sampled_from == base.header.weights_sha256,
        key=dict(candidate.header.key),
        environment=dict(base.header.environment),
        documents=_documents(base, candidate),
        nonfinite=_nonfinite([base, candidate]),
        nonfinite_base=tuple(_nonfinite([base])),
        experts=expert_reach(candidate),
        looks=looks,
        alpha=alpha_of(looks),
        clusters=clusters.numbers.tolist() if clusters.count < len(base) else [],
        weights_sha256=candidate.header.weights_sha256,
    )


def _measures(pair: _Pair, kl: Array | None, kl_margin: Margin | None) -> Measures:
    """Return the diagnostics; a KL divergence has a margin where environments add nothing to it."""
    if pair.task:
        return Measures()
    measures = measure(pair.base, pair.candidate, kl, pair.level, pair.clusters)
    if measures.kl is None or kl_margin is None or pair.unlike:
        return measures
    return replace(measures, kl=replace(measures.kl, margin=kl_margin))


def _drift(pair: _Pair, accepted: Run, margin: Margin, max_kl_ratio: Margin | None) -> Drift:
    """Return the drift from an accepted run.

    Its KL ratio decides where environments are alike: what they add to one of the divergences would
    be read as damage, or hide it.
    """
    loss = loss_over(accepted, pair.candidate, pair.clusters, pair.level)
    ratio = None
    if max_kl_ratio is not None and not pair.unlike:
        ratio = kl_ratio(
            pair.base, pair.candidate, accepted, pair.clusters, max_kl_ratio, pair.level
        )
    return Drift(accepted.header.model, margin, loss.widened(pair.widening), ratio)


def _notes(
    pair: _Pair, looks: int | None, drift: Drift | None, measures: Measures, documents: int
) -> list[str]:
    """Return what the user should know of a comparison."""
    notes = _cluster_notes(pair.clusters)
    if drift is not None and pair.candidate.header.key.get("protocol") == "tokens":
        notes += _drift_notes(drift, unlike=pair.unlike)
    if looks is None:
        notes.append(UNKNOWN_ATTEMPTS)
    notes += _outlier_note(measures)
    return notes + ([] if pair.task else _coverage_notes(documents))


def require_top_tokens(max_drift: str | float | None, runs: Sequence[Run]) -> None:
    """Refuse runs without top tokens where the margin of the drift is a ratio of KL divergences.

    Raises:
        UsageError: naming the run.
    """
    if max_drift is None or not str(max_drift).strip().endswith("x"):
        return
    for run in runs:
        if not top_k_of(run):
            raise UsageError(
                f"--max-drift {max_drift}: {run.header.model} was scored without top tokens; use "
                "`ckptgate score --top-k 64`"
            )


def _divergences(measures: Measures, drift: Drift | None) -> list[Divergence]:
    """Return the divergences that decide."""
    divergences = []
    if measures.kl is not None and measures.kl.margin is not None:
        kl = measures.kl
        divergences.append(Divergence(kl.mean, measures.kl.margin, shows_within=kl.exact))
    if drift is not None and drift.kl is not None:
        divergences.append(Divergence(drift.kl.interval, drift.kl.margin))
    return divergences


def _kl_documents(base: Run, candidate: Run, kl: Array | None) -> list[float]:
    computed = kl_of_tokens(base, candidate, kl)
    if computed is None:
        return []
    sums: list[float] = by_document(computed[0], base.tokens).tolist()
    return sums


def _same_model(run: Run, other: Run) -> bool:
    """Whether two runs are of one checkpoint; an old run that records only weights may be."""
    header, other_header = run.header, other.header
    configs = {header.config_sha256, other_header.config_sha256} - {None}
    return header.weights_sha256 == other_header.weights_sha256 and len(configs) < 2


def _few_documents(count: int, *, grouped: bool) -> list[str]:
    if count >= FEWEST:
        return []
    noun = "group" if grouped else "distinct document"
    return [
        f"{counted(count, noun)}: fewer than {FEWEST} show too little of how documents "
        "differ to pass"
    ]


def _drift_notes(drift: Drift, *, unlike: bool) -> list[str]:
    """Return what decides the drift, in a sentence each."""
    if drift.kl is None and unlike:
        return [
            "drift is decided by the loss over the accepted run: the runs are from different "
            "environments, which a KL divergence would count; score them in one"
        ]
    if drift.kl is None:
        return [
            "drift is decided by the loss over the accepted run; runs with top tokens (score "
            "--top-k 64) decide it by the KL divergence, which sees smaller damage"
        ]
    return [
        "the loss is how much worse the candidate predicts this text than its base: it can be zero "
        "although predictions changed, and decides against the margin of the format",
        "the KL ratio is how far the candidate's predictions are from the base's, relative to the "
        "accepted run's: it counts every change of a prediction, and decides the drift",
    ]


def _cluster_notes(clusters: Clusters) -> list[str]:
    notes = []
    if clusters.repeated:
        noun = counted(clusters.repeated, "document")
        verb = "repeats" if clusters.repeated == 1 else "repeat"
        notes.append(f"{noun} {verb} an earlier one and {verb.replace('repeat', 'count')} once")
    if clusters.grouped:
        notes.append(f"documents are clustered by their group: {counted(clusters.count, 'group')}")
    return notes


def _documents(base: Run, candidate: Run) -> list[tuple[float, float, int]]:
    columns = base.sums.tolist(), candidate.sums.tolist(), base.tokens.tolist()
    return list(zip(*columns, strict=True))


def _unlike(references: Sequence[Run], candidate: Run) -> tuple[str, ...]:
    differences: set[str] = set()
    for reference in references:
        differences.update(unlike_environment(reference.header, candidate.header))
    return tuple(sorted(differences))


def _floor(runs: Sequence[Run], engine_floors: Sequence[float], *, unlike: bool) -> float | None:
    measured = [run.header.floor for run in runs if run.header.floor is not None]
    floor = max([*measured, *engine_floors], default=None)
    return max(floor or 0.0, UNLIKE_FLOOR) if unlike else floor


def _nonfinite(runs: Sequence[Run]) -> list[int]:
    documents: set[int] = set()
    for run in runs:
        documents.update(run.header.nonfinite)
    return sorted(documents)


def _perplexity(run: Run, clusters: Clusters) -> float:
    distinct = clusters.distinct
    return perplexity(run.sums[distinct].tolist(), run.tokens[distinct].tolist())


def require_floor_run(run: Run, model: str, weights_sha256: str, key: Mapping[str, Any]) -> None:
    """Refuse a run that is not the base's on the same text, whichever engine it is from.

    An engine rounds activations as the checkpoint declares; a base that declares no format has none
    to round.

    Args:
        run: the run to use as a floor.
        model: the base.
        weights_sha256: of the base.
        key: the protocol key of the base.

    Raises:
        UsageError: it is a run of other weights.
        IncomparableError: a protocol key differs, which is named.
    """
    if run.header.weights_sha256 != weights_sha256:
        raise UsageError(
            f"--floor: {run.header.model} has other weights than the base {model}; score the base "
            "with the engine"
        )
    ignored = {"activations"} if not run.header.formats else set()
    keys = [
        {name: value for name, value in a_key.items() if name not in ignored}
        for a_key in (key, run.header.key)
    ]
    require_same_key(model, keys[0], run.header.model, keys[1])


def floor_between(base: Run, other: Run) -> float:
    """Return what a model differs from itself by under another engine: the larger end of the
    interval, nats per token.

    Raises:
        UsageError: the other run is not of the same weights.
        IncomparableError: it is of other text or of another protocol, or it has logits that are not
            finite.
    """
    require_floor_run(other, base.header.model, base.header.weights_sha256, base.header.key)
    if base.header.documents != other.header.documents:
        raise IncomparableError(f"--floor: {other.header.model} was scored on other documents")
    if other.header.nonfinite:
        raise IncomparableError(
            f"--floor: {other.header.model} has logits that are not finite: a defect, not noise"
        )
    clusters = clusters_of(base.header.documents, base.header.groups)
    interval = loss_over(base, other, clusters, LEVEL)
    return max(abs(interval.low), abs(interval.high))


def _floor_note(run: Run, floor: float) -> str:
    environment = run.header.environment
    engine = environment.get("engine") or f"torch {environment.get('torch', 'unknown')}"
    device = environment.get("device", "an unknown device")
    return f"under {engine} on {device} the base differs from itself by up to {floor:.6f}"


def loss_over(base: Run, candidate: Run, clusters: Clusters, level: float) -> Interval:
    """Return the paired loss of a run over another: a mean per token, or for a task the loss of
    accuracy, exact unless documents were answered several times.
    """
    task = candidate.header.key.get("protocol") == "task"
    if task and clusters.grouped and clusters.count > 1:
        difference = clusters.sums(candidate.sums - base.sums) / clusters.sums(base.tokens)
        return repeated_answers_loss(difference, level)
    if not task:
        return paired(
            clusters.sums(base.sums),
            clusters.sums(candidate.sums),
            clusters.sums(base.tokens),
            level,
        )
    lost, won = _discordant(base, candidate, clusters)
    return accuracy_loss(lost, won, int(clusters.distinct.sum()), level)


def _discordant(base: Run, candidate: Run, clusters: Clusters) -> tuple[int, int]:
    """Return how many documents only the base gets right, and how many only the candidate."""
    distinct = clusters.distinct
    wrong_base, wrong_candidate = base.sums[distinct], candidate.sums[distinct]
    lost, won = wrong_base < wrong_candidate, wrong_base > wrong_candidate
    return int(lost.sum()), int(won.sum())


def _accuracy(base: Run, candidate: Run, clusters: Clusters, loss: Interval) -> Accuracy:
    lost, won = _discordant(base, candidate, clusters)
    documents = int(clusters.distinct.sum())
    p_value = p_beyond(loss, 0.0)
    right = [
        documents - round(float(run.sums[clusters.distinct].sum())) for run in (base, candidate)
    ]
    return Accuracy(right[0], right[1], lost, won, p_value)


def expert_reach(run: Run) -> tuple[ExpertReach, ...]:
    """Return which experts of each layer a run reached."""
    return tuple(
        ExpertReach(layer, len(counts), tuple(i for i, n in enumerate(counts) if n == 0))
        for layer, counts in run.header.experts.items()
    )


def _low_margin_note(losses: Losses, floor: float | None) -> list[str]:
    if floor is None or all(margin.nats > floor for _, margin in losses):
        return []
    return [
        f"a margin is not above the noise floor of {floor:.6f} nats: no number of documents would "
        "decide"
    ]


def _outlier_note(measures: Measures) -> list[str]:
    count = len(measures.beyond)
    if not count:
        return []
    numbers = ", ".join(f"#{n}" for n in measures.beyond[:MAX_NAMED])
    more = ", …" if count > MAX_NAMED else ""
    noun = "1 outlier document" if count == 1 else f"{count} outlier documents"
    return [
        f"{noun} ({numbers}{more}): possible localized damage (e.g. a dead expert) hidden by the "
        "mean"
    ]


@cache
def _coverage() -> dict[str, dict[str, list[float]]]:
    file = Path(__file__).with_name("coverage.json")
    table: dict[str, dict[str, list[float]]] = json.loads(file.read_text(encoding="utf-8"))
    return table


def _coverage_notes(documents: int) -> list[str]:
    return [coverage_note(documents)] if documents >= 2 else []


def coverage_note(documents: int) -> str:
    """Return what intervals were measured to cover, at the nearest simulated number of documents
    that is not larger; '' for fewer than two.
    """
    if documents < 2:
        return ""
    table = _coverage()
    smaller = [int(count) for count in table if int(count) <= documents]
    nearest = max(smaller, default=min(map(int, table)))
    row = table[str(nearest)]

    def span(name: str) -> str:
        low, high = math.floor(100 * row[name][0]), round(100 * row[name][1])
        return f"{low}%" if low == high else f"{low}-{high}%"

    fewer = " (fewer were not simulated)" if documents < nearest else ""
    return (
        f"simulated coverage of the 95% interval (of its upper bound) at {nearest} "
        f"documents{fewer}: {span('symmetric')} ({span('symmetric_high')}) where documents differ "
        f"evenly, {span('skewed')} ({span('skewed_high')}) where effects are skewed, "
        f"{span('rare')} ({span('rare_high')}) where few documents are hit hard (0.2 nats); the "
        f"outlier rule finds {span('worst_found')} of samples with such a document"
    )
