# SPDX-License-Identifier: Apache-2.0
"""The gate as depth eval of a check: what it measures becomes an `Evaluation`, which rules
judge.
"""

from __future__ import annotations

import json
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, IncomparableError
from verifier.evaluation import Evaluate, Evaluation, Loss, Reach, Standing
from verifier.gate.corpora import WIKITEXT
from verifier.gate.decision import BUDGETS, Margin
from verifier.gate.gate import run
from verifier.gate.render import render_json
from verifier.gate.result import GateResult
from verifier.gate.score import formats_of
from verifier.gate.statistics import Interval


def evaluator(corpus: str | None = WIKITEXT, **options: Any) -> Evaluate:
    """Return what scores a candidate and its base for ``verifier.check(..., depth="eval",
    evaluate=...)``.

    Args:
        corpus: as `verifier.gate.gate` takes it; None for a task.
        options: the other arguments of `verifier.gate.gate`.

    What a checkpoint's contents do not allow becomes part of the `Evaluation`; other errors are
    raised when it is called.
    """

    def evaluate(candidate: Checkpoint, base: Checkpoint) -> Evaluation:
        if options.get("max_increase") is None and not formats_of(candidate) & BUDGETS.keys():
            return Evaluation(
                failure="no quantized format with a default budget; give a margin (--max-increase)"
            )
        try:
            result = run(candidate.uri, base=base.uri, corpus=corpus, **options)
        except IncomparableError as error:
            return Evaluation(incomparable=str(error))
        except ContentError as error:
            return Evaluation(failure=str(error))
        return evaluation_of(result)

    return evaluate


def evaluation_of(result: GateResult) -> Evaluation:
    """Return a gate's result as rules judge it."""
    losses: list[Loss] = []
    if (i := result.interval) is not None:
        losses.append(_loss("the base", i, result.margin, result))
    if (d := result.drift) is not None:
        losses.append(_loss("the accepted run", d.interval, d.margin, result))
    tokens = sum(t for _, _, t in result.documents)
    per_token = result.key.get("protocol") == "tokens"
    m = result.measures
    summary = json.loads(render_json(result))
    summary.pop("documents", None)
    return Evaluation(
        unit=result.unit,
        documents=len(result.documents),
        losses=tuple(losses),
        collapse=result.collapse,
        needed=result.needed,
        nonfinite=tuple(sorted(set(result.nonfinite) - set(result.nonfinite_base))),
        nonfinite_base=result.nonfinite_base,
        hit=m.beyond,
        worst=m.worst,
        reach=tuple(Reach(e.layer, e.experts, e.unreached) for e in result.experts),
        base_nats=sum(b for b, _, _ in result.documents) / tokens
        if per_token and tokens and losses
        else None,
        keys=len(result.key) + len(result.environment),
        unlike=result.unlike,
        notes=result.notes,
        summary=summary,
    )


def _loss(against: str, interval: Interval, margin: Margin, result: GateResult) -> Loss:
    standing: Standing = "open"
    if result.outcome == "failed" and interval.low > margin.nats:
        standing = "beyond"
    elif interval.high <= margin.nats and (result.floor is None or margin.nats > result.floor):
        standing = "within"
    return Loss(
        against, interval.delta, interval.low, interval.high, margin.nats, margin.source, standing
    )
