# SPDX-License-Identifier: Apache-2.0
"""What a gate would detect, how likely a good candidate passes, and what it costs, before it is
run.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verifier.checkpoint import open_checkpoint
from verifier.errors import UsageError
from verifier.gate.attempts import Attempts
from verifier.gate.decision import NORMALS, Margin, drift_margin_of, margin_of
from verifier.gate.gate import (
    BATCH,
    PathLike,
    check_scorer,
    corpus_of,
    formats_of,
    refuse_corpus,
    refuse_same,
    score_apart,
    series_of,
)
from verifier.gate.jobs import HF, Scorer
from verifier.gate.score import Progress
from verifier.gate.statistics import LEVEL, paired
from verifier.text import printable

FIRST = 10
POWER = 0.8


@dataclass(frozen=True)
class Plan:
    """What a gate over all documents would do; losses in nats a token.

    ``passes``: the largest true loss that passes with a chance of 80 %, None where none above zero
    does; ``fails``: the smallest that fails with it. ``normal`` is the published loss of the
    format, ``chance`` that of a pass there.
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


def plan(
    candidate: PathLike,
    *,
    base: PathLike,
    corpus: str | None = None,
    protocol: str = "tokens",
    max_increase: str | float | None = None,
    window: int = 512,
    documents: int | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    workers: int | None = None,
    progress: Progress | None = None,
    cache: PathLike | None = None,
    max_drift: str | float | None = None,
    drift_against: PathLike | None = None,
    scorer: Scorer = HF,
    metric: str | None = None,
    **_unused: object,
) -> Plan:
    """Return what a gate with these arguments would do (`run` has them).

    The spread of documents is taken from the last attempt on this base and window that the cache
    has, else from the first ten documents, which are scored.

    Raises:
        UsageError: fewer than two documents.
        ContentError: a checkpoint cannot be scored.
    """
    ckpt, reference = open_checkpoint(candidate), open_checkpoint(base)
    kind = check_scorer(scorer, protocol)
    task = kind == "task"
    refuse_corpus(protocol, corpus, metric)
    refuse_same(ckpt, reference)
    drift_margin_of(max_drift, task=task)
    formats = formats_of(ckpt)
    margin = margin_of(max_increase, formats, task=task)
    whole = corpus_of(protocol, corpus, metric).head(documents)
    if len(whole) < 2:
        raise UsageError(
            "one document has no interval; a gate on it is inconclusive whatever it costs"
        )
    known = (
        Attempts(Path(cache)).last(reference, window, series_of(kind, scorer, whole))
        if cache is not None
        else None
    )
    if known is not None:
        count, se, seen, seconds = known["scored"], known["se"], known["delta"], known["seconds"]
        source = f"the last attempt on this base ({count} documents of {known['corpus']!r})"
    else:
        few = whole.head(FIRST)
        ours, theirs = score_apart(
            ckpt, reference, few, kind, window, batch, device, workers, 0, progress, scorer
        )
        interval = paired(theirs.sums.tolist(), ours.sums.tolist(), theirs.tokens.tolist())
        count, se, seen = interval.documents, interval.se, interval.delta
        seconds, source = (
            ours.header.seconds + theirs.header.seconds,
            f"the first {len(few)} documents, scored now",
        )
        if count < 2:
            raise UsageError(f"only {count} of the first {len(few)} documents has a token to score")
    return foresee(source, count, se, seen, seconds, len(whole), margin, set() if task else formats)


def foresee(
    source: str,
    count: int,
    se: float,
    seen: float,
    seconds: float,
    documents: int,
    margin: Margin,
    formats: set[str],
) -> Plan:
    """Return the plan for ``documents`` documents from a standard error over ``count`` of them."""
    from scipy import stats  # noqa: PLC0415

    error = se * math.sqrt(count / documents)
    quantile = float(stats.t.ppf(LEVEL, documents - 1))
    reach = (quantile + float(stats.norm.ppf(POWER))) * error

    def chance(loss: float) -> float:
        if error == 0:
            return float(loss <= margin.nats)
        return float(stats.norm.cdf((margin.nats - loss) / error - quantile))

    known = [NORMALS[f] for f in formats if f in NORMALS]
    normal = max(known, default=None)
    return Plan(
        source,
        documents,
        margin,
        error,
        margin.nats - reach if margin.nats > reach else None,
        margin.nats + reach,
        seen,
        chance(seen),
        normal,
        chance(normal) if normal is not None else None,
        seconds * documents / count,
    )


def render_plan_text(found: Plan) -> str:
    """Return a plan in some lines."""
    passes = (
        "no loss above zero"
        if found.passes is None
        else f"a true loss up to {found.passes:.5f} nats"
    )
    lines = [
        f"plan     {found.documents} documents; the spread is from {found.source}",
        f"margin   {found.margin.nats:.5f} nats ({found.margin.source}); standard error about {found.se:.5f}",
        f"detects  {passes} passes with a chance of 80 %, one from {found.fails:.5f} fails with it",
        f"chance   {found.chance_seen:.0%} of a pass at the loss seen there, {found.seen:+.5f} nats",
    ]
    if found.normal is not None and found.chance is not None:
        lines.append(
            f"         {found.chance:.0%} at the published normal of the format, {found.normal:+.5f} nats"
        )
    lines.append(f"cost     about {found.seconds:,.0f} s here, loading included")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def render_plan_json(found: Plan) -> str:
    """Return a plan as one JSON object."""
    value: dict[str, Any] = {"schema_version": "1.0", **asdict(found)}
    return json.dumps(value, indent=2) + "\n"
