# SPDX-License-Identifier: Apache-2.0
"""Two runs in, a verdict out; no model is loaded, so they may come from machines that never met."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from verifier.errors import IncomparableError, UsageError
from verifier.gate.decision import Margin, Outcome, documents_for, judge
from verifier.gate.jobs import Array
from verifier.gate.measures import Measures, measure
from verifier.gate.result import Accuracy, Drift, Experts, GateResult
from verifier.gate.run_file import Run, refuse_unlike, refuse_unlike_keys, unlike_environment
from verifier.gate.scorers.transformers import perplexity
from verifier.gate.statistics import Interval, accuracy_loss, p_of_loss, paired

UNLIKE_FLOOR = 0.0005
"""Nats a token that two environments may differ by where nothing was measured: BF16 and FP16 on one
engine differ by 0.0004 (ggml-org/llama.cpp#7150)."""


def compare_runs(
    base: Run,
    candidate: Run,
    margin: Margin,
    *,
    drift_against: Run | None = None,
    drift_margin: Margin | None = None,
    kl: Array | None = None,
    looks: int = 1,
    floor_runs: Sequence[Run] = (),
) -> GateResult:
    """Return the verdict on a candidate's run.

    Args:
        base: the run to judge against.
        candidate: the run to judge.
        margin: the largest tolerated loss over the base.
        drift_against: an accepted run of the same base, where the drift is judged too.
        drift_margin: the largest tolerated loss over it.
        kl: KL(base || candidate) of each token, nats, where both ran in lockstep.
        looks: this attempt and those before it on the same pair; each gets its share of the 5 %
            error.
        floor_runs: the base as other engines score it; what separates it from itself there is noise
            too.

    Raises:
        UsageError: the candidate is the base, or a floor run is not the base's.
        ContentError: the runs have different protocol keys.
    """
    if base.header.weights_sha256 == candidate.header.weights_sha256:
        raise UsageError(
            f"{candidate.header.model}: the candidate is the base itself; there is nothing to measure"
        )
    others = [base] if drift_against is None else [base, drift_against]
    for other in others:
        refuse_unlike(other.header, candidate.header)
    unlike = sorted(
        {u for other in others for u in unlike_environment(other.header, candidate.header)}
    )
    measured = [r.header.floor for r in (*others, candidate) if r.header.floor is not None]
    apart = [floor_between(base, other) for other in floor_runs]
    floor = max([*measured, *apart], default=None)
    if unlike:
        floor = max(floor or 0.0, UNLIKE_FLOOR)
    widening = floor if unlike and floor else 0.0
    level = 1 - 0.05 / looks
    bad = sorted({d for r in (*others, candidate) for d in r.header.nonfinite})
    common: dict[str, Any] = {
        "candidate": candidate.header.model,
        "base": base.header.model,
        "margin": margin,
        "key": dict(candidate.header.key),
        "environment": dict(base.header.environment),
        "nonfinite": bad,
        "unlike": tuple(unlike),
        "floor": floor,
        "documents": list(
            zip(base.sums.tolist(), candidate.sums.tolist(), base.tokens.tolist(), strict=True)
        ),
        "measures_kl": base.header.sampled_from == base.header.weights_sha256,
        "experts": experts_of(candidate),
        "looks": looks,
        "nonfinite_base": tuple(sorted({d for r in others for d in r.header.nonfinite})),
    }
    if bad:
        return GateResult(
            "failed",
            interval=None,
            perplexity_base=math.nan,
            perplexity_candidate=math.nan,
            **common,
        )
    task = candidate.header.key.get("protocol") == "task"
    interval = loss_of(base, candidate, level).widened(widening)
    drift = None
    if drift_against is not None and drift_margin is not None:
        found = loss_of(drift_against, candidate, level).widened(widening)
        drift = Drift(drift_against.header.model, drift_margin, found)
    family = [(interval, margin)] + ([(drift.interval, drift.margin)] if drift else [])
    outcome: Outcome = judge(family, floor=floor, widening=widening, alpha=1 - level)
    measures = Measures() if task else measure(base, candidate, kl, level)
    nats = (
        [math.nan] * 2
        if task
        else [perplexity(r.sums.tolist(), r.tokens.tolist()) for r in (base, candidate)]
    )
    return GateResult(
        outcome,
        interval=interval,
        perplexity_base=nats[0],
        perplexity_candidate=nats[1],
        drift=drift,
        measures=measures,
        needed=documents_for(family) if outcome == "inconclusive" else None,
        notes=(
            *(_floor_note(o, f) for o, f in zip(floor_runs, apart, strict=True)),
            *_notes(0 if task else interval.documents, measures, outcome, floor, family),
        ),
        accuracy=_accuracy(base, candidate) if task else None,
        **common,
    )


def refuse_other_floor(run: Run, model: str, weights_sha256: str, key: Mapping[str, Any]) -> None:
    """Refuse a run that is not the base's on the same text, whichever engine it is of.

    An engine rounds activations as the checkpoint declares; a base that declares no format has none
    to round.

    Raises:
        UsageError: it is a run of other weights.
        IncomparableError: a protocol key differs, which is named.
    """
    if run.header.weights_sha256 != weights_sha256:
        raise UsageError(
            f"--floor: {run.header.model} is not the base {model}: other weights; score the base by the engine"
        )
    drop = {"activations"} if not run.header.formats else set()
    ours, theirs = (
        {k: v for k, v in found.items() if k not in drop} for found in (key, run.header.key)
    )
    refuse_unlike_keys(model, ours, run.header.model, theirs)


def floor_between(base: Run, other: Run) -> float:
    """Return what separates a model from itself under another engine: the larger end of the
    interval, nats a token.

    Raises:
        UsageError: the other run is not of the same weights.
        IncomparableError: it is of other text or of another protocol, or it has logits that are not
            finite.
    """
    refuse_other_floor(other, base.header.model, base.header.weights_sha256, base.header.key)
    if base.header.documents != other.header.documents:
        raise IncomparableError(f"--floor: {other.header.model} was scored on other documents")
    if other.header.nonfinite:
        raise IncomparableError(
            f"--floor: {other.header.model} has logits that are not finite: no noise, a defect there"
        )
    found = loss_of(base, other, 0.95)
    return max(abs(found.low), abs(found.high))


def _floor_note(run: Run, floor: float) -> str:
    where = run.header.environment
    engine = where.get("engine") or f"torch {where.get('torch', 'unknown')}"
    return f"the base under {engine} on {where.get('device', 'an unknown device')} differs from itself by up to {floor:.6f}"


def loss_of(base: Run, candidate: Run, level: float) -> Interval:
    """Return the paired loss of a run over another: a mean a token, or of a task the loss of
    accuracy, exact.
    """
    if candidate.header.key.get("protocol") != "task":
        return paired(base.sums, candidate.sums, base.tokens, level)
    lost, won = _discordant(base, candidate)
    return accuracy_loss(lost, won, len(candidate), level)


def _discordant(base: Run, candidate: Run) -> tuple[int, int]:
    return int((base.sums < candidate.sums).sum()), int((base.sums > candidate.sums).sum())


def _accuracy(base: Run, candidate: Run) -> Accuracy:
    lost, won = _discordant(base, candidate)
    ours, theirs = (len(r) - round(float(r.sums.sum())) for r in (candidate, base))
    return Accuracy(theirs, ours, lost, won, p_of_loss(lost, won, len(base), 0.0, "beyond"))


def experts_of(run: Run) -> tuple[Experts, ...]:
    """Return which experts of each layer a run reached."""
    return tuple(
        Experts(layer, len(counts), tuple(i for i, n in enumerate(counts) if n == 0))
        for layer, counts in run.header.experts.items()
    )


def _notes(
    documents: int, measures: Measures, outcome: str, floor: float | None, family: list[Any]
) -> list[str]:
    found = []
    if floor is not None and any(m.nats <= floor for _, m in family) and outcome == "inconclusive":
        found.append(
            f"a margin is not above the noise floor of {floor:.6f} nats: no number of documents would show it"
        )
    if measures.beyond:
        shown = ", ".join(map(str, measures.beyond[:10]))
        found.append(
            f"{len(measures.beyond)} documents lose more than the others allow ({shown}): damage that some text meets "
            "and the mean hides, as of an expert"
        )
    if text := coverage_note(documents):
        found.append(text)
    return found


@cache
def _coverage() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(
        (Path(__file__).parent / "coverage.json").read_text(encoding="utf-8")
    )
    return found


def coverage_note(documents: int) -> str:
    """Return what the interval was measured to cover at the nearest simulated number of documents
    that is not larger.
    """
    if documents < 2:
        return ""
    table = _coverage()
    nearest = max((int(k) for k in table if int(k) <= documents), default=min(map(int, table)))
    row = table[str(nearest)]

    def span(name: str) -> str:
        low, high = math.floor(100 * row[name][0]), round(100 * row[name][1])
        return f"{low} %" if low == high else f"{low} to {high} %"

    more = " (fewer were not simulated)" if documents < nearest else ""
    return (
        f"simulated at {nearest} documents{more}, two-sided 95 % intervals (one-sided upper bounds) hold the truth in "
        f"{span('symmetric')} ({span('symmetric_high')}) where documents differ evenly, {span('skewed')} "
        f"({span('skewed_high')}) where effects are skewed, {span('rare')} ({span('rare_high')}) where few documents are "
        f"hit hard (0.2 nats); the worst-document rule sees {span('worst_found')} of samples with such a document"
    )
