# SPDX-License-Identifier: Apache-2.0
"""What a gate would detect, how likely a good candidate passes, and what it costs, before it is
run.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from verifier.errors import UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Pair, Spread
from verifier.gate.decision import NORMALS, drift_margin_of, margin_of
from verifier.gate.gate import gate_options, open_pair
from verifier.gate.options import PathLike
from verifier.gate.score import formats_of, score
from verifier.gate.statistics import LEVEL, paired, scipy_stats
from verifier.gate.windows import plan_scoring
from verifier.text import printable

FIRST = 10
POWER = 0.8


@dataclass(frozen=True)
class GatePlan:
    """What a gate over all documents would do; losses in nats per token.

    ``passes``: the largest true loss that passes with a chance of 80%, None where none above zero
    does; ``fails``: the smallest that fails with it. ``seen`` is the loss in ``source``, ``normal``
    the published loss of the format; ``chance_seen`` and ``chance`` are those of a pass there.
    """

    source: str
    documents: int
    margin: Margin
    se: float
    passes: float | None
    fails: float
    seen: float
    chance_seen: float
    normal: float | None
    chance: float | None
    seconds: float


def plan(candidate: PathLike, *, base: PathLike, **options: Any) -> GatePlan:
    """Return what a gate with these options would do.

    The spread of documents is taken from the last attempt on this base and sequence length that the
    cache has, else from the first ten documents, which are scored.

    Args:
        candidate: as `verifier.gate.run` takes it, as is everything else.
        base: the reference.
        options: the other keywords of `verifier.gate.run`.

    Raises:
        UsageError: fewer than two documents.
        ContentError: a checkpoint cannot be scored.
    """
    # Nothing is compared with an accepted run, and no KL is computed.
    options = options | {"drift_against": None, "kl": "auto", "floor": ()}
    max_drift = options.pop("max_drift", None)
    request = gate_options(**options)
    task = request.scoring.protocol == "task"
    drift_margin_of(max_drift, task=task)
    pair = open_pair(candidate, base, request.scoring)
    formats = formats_of(pair.candidate)
    margin = margin_of(request.max_increase, formats, task=task)
    documents = len(request.scoring.corpus)
    if documents < 2:
        raise UsageError("one document has no interval; a gate on it is always inconclusive")
    spread = None
    if request.cache is not None:
        spread = Attempts(Path(request.cache)).last_spread(pair)
    if spread is not None:
        source = f"the last attempt on this base ({spread.scored} documents of {spread.corpus!r})"
    else:
        spread = _first_documents(pair)
        source = f"the first {min(FIRST, documents)} documents, scored now"
    return foresee(spread, source, documents, margin, set() if task else formats)


def _first_documents(pair: Pair) -> Spread:
    """Score the first documents and return how they differ."""
    first = replace(pair.options, corpus=pair.options.corpus.head(FIRST))
    candidate, base = score(plan_scoring((pair.candidate, pair.base), first)).runs
    interval = paired(base.sums, candidate.sums, base.tokens)
    if interval.documents < 2:
        raise UsageError(
            f"only {interval.documents} of the first {len(first.corpus)} documents has a token to "
            "score"
        )
    return Spread(
        corpus=first.corpus.name,
        scored=interval.documents,
        se=interval.se,
        delta=interval.delta,
        seconds=candidate.header.seconds + base.header.seconds,
    )


def foresee(
    spread: Spread, source: str, documents: int, margin: Margin, formats: Iterable[str]
) -> GatePlan:
    """Return the plan for ``documents`` documents from how some of them differ.

    Args:
        spread: how they differ.
        source: where that is from, for the user.
        documents: how many the gate would score.
        margin: of the gate.
        formats: the candidate's.
    """
    stats = scipy_stats()
    error = spread.se * math.sqrt(spread.scored / documents)
    quantile = float(stats.t.ppf(LEVEL, documents - 1))
    reach = (quantile + float(stats.norm.ppf(POWER))) * error

    def chance(loss: float) -> float:
        if error == 0:
            return float(loss <= margin.nats)
        return float(stats.norm.cdf((margin.nats - loss) / error - quantile))

    normal = max([NORMALS[name] for name in formats if name in NORMALS], default=None)
    return GatePlan(
        source,
        documents,
        margin,
        error,
        margin.nats - reach if margin.nats > reach else None,
        margin.nats + reach,
        spread.delta,
        chance(spread.delta),
        normal,
        chance(normal) if normal is not None else None,
        spread.seconds * documents / spread.scored,
    )


def render_plan_text(plan: GatePlan) -> str:
    """Return a plan as a few lines of text."""
    passes = "no true loss passes"
    if plan.passes is not None:
        passes = f"true loss ≤ {plan.passes:.5f} passes"
    lines = [
        f"plan     {plan.documents} documents; the spread is from {plan.source}",
        f"margin   {plan.margin.nats:.5f} nats ({plan.margin.source}); expected standard error "
        f"{plan.se:.5f}",
        f"detects  with 80% power: {passes}, ≥ {plan.fails:.5f} fails",
        f"chance   {plan.chance_seen:.0%} to pass at the loss seen there, {plan.seen:+.5f} nats",
    ]
    if plan.normal is not None and plan.chance is not None:
        lines.append(
            f"         {plan.chance:.0%} to pass at the published normal of the format, "
            f"{plan.normal:+.5f} nats"
        )
    lines.append(f"cost     about {plan.seconds:,.0f} s here, loading included")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def render_plan_json(plan: GatePlan) -> str:
    """Return a plan as one JSON object."""
    return json.dumps({"schema_version": "1.0", **asdict(plan)}, indent=2) + "\n"
