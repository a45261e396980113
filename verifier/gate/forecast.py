# SPDX-License-Identifier: Apache-2.0
"""What a gate would detect, how likely a good candidate passes, and what it costs, before it is
run.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from verifier.errors import UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Pair, Spread
from verifier.gate.clusters import clusters_of
from verifier.gate.decision import NORMALS, alpha_of
from verifier.gate.gate import Margins, accepted_run, gate_options, margins_of, open_pair, terms_of
from verifier.gate.measures import kl_ratio, top_k_of
from verifier.gate.options import PathLike
from verifier.gate.run_file import Run, require_same_key
from verifier.gate.score import formats_of, score
from verifier.gate.statistics import LEVEL, paired, scipy_stats
from verifier.gate.windows import plan_scoring
from verifier.text import printable

FIRST = 10
POWER = 0.8


@dataclass(frozen=True)
class DriftForecast:
    """What a gate over all documents would show of the drift from an accepted run; the fields are
    those of `GatePlan`, in ``unit``: of the loss, or the logarithm of a ratio of KL divergences.
    """

    margin: Margin
    se: float
    passes: float | None
    fails: float
    seen: float
    chance_seen: float
    unit: str = "nats per token"


@dataclass(frozen=True)
class GatePlan:
    """What a gate over all documents would do; losses in ``unit``.

    ``passes``: the largest true loss that passes with a chance of 80%, None where none above zero
    does; ``fails``: the smallest that fails with it. ``seen`` is the loss in ``source``, ``normal``
    the published loss of the format; ``chance_seen`` and ``chance`` are those of a pass there.
    ``seconds`` is the time of the whole gate, of which ``loading`` does not grow with the
    documents; None where it was not measured.
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
    unit: str = "nats per token"
    loading: float | None = None
    drift: DriftForecast | None = None


@dataclass
class _Clock:
    """When the first and the last unit of work were done: what is before the first is loading.

    ``marks`` are windows or documents that were done, and the seconds until then.
    """

    started: float = field(default_factory=time.monotonic)
    marks: list[tuple[int, float]] = field(default_factory=list)

    def __call__(self, size: int) -> None:
        before = self.marks[-1][0] if self.marks else 0
        self.marks.append((before + size, time.monotonic() - self.started))

    def cost(self, work: int) -> tuple[float, float | None]:
        """Return the seconds of scoring ``work`` windows or documents, and those of loading.

        With a single unit nothing can be told apart: all of it grows with the work.
        """
        if not self.marks:
            return 0.0, None
        (first, first_at), (last, last_at) = self.marks[0], self.marks[-1]
        if last == first:
            return last_at * work / max(1, last), None
        rate = (last_at - first_at) / (last - first)
        loading = max(0.0, first_at - rate * first)
        return loading + rate * work, loading


def plan(candidate: PathLike, *, base: PathLike, **options: Any) -> GatePlan:
    """Return what a gate with these options would do.

    The spread of documents is taken from the last attempt on this base and sequence length that the
    cache has, else from the first ten documents, which are scored; so they are for a task, and for
    a drift.

    Args:
        candidate: as `verifier.gate.run` takes it, as is everything else.
        base: the reference.
        options: the other keywords of `verifier.gate.run`.

    Raises:
        UsageError: fewer than two documents.
        ContentError: a checkpoint cannot be scored.
    """
    request = gate_options(**options | {"kl": "auto", "floor": ()})
    pair = open_pair(candidate, base, request.scoring)
    documents = len(request.scoring.corpus)
    if documents < 2:
        raise UsageError("one document has no interval; a gate on it is always inconclusive")
    margins = margins_of(pair, request)
    whole = plan_scoring((pair.candidate, pair.base), request.scoring)
    accepted = accepted_run(request)
    if accepted is not None:
        require_same_key(accepted.header.model, accepted.header.key, pair.candidate.uri, whole.key)
    task, spread, look = request.scoring.protocol == "task", None, None
    if request.cache is not None:
        attempts = Attempts(Path(request.cache))
        terms = terms_of(pair.base, request, accepted)
        look = attempts.look(pair, margins.decisive, terms).number
        spread = attempts.last_spread(pair) if accepted is None and not task else None
    formats = set() if task else formats_of(pair.candidate)
    if spread is not None:
        source = f"the last attempt on this base ({spread.scored} documents of {spread.corpus!r})"
        return foresee(spread, source, documents, margins.loss, formats, look=look)
    source = f"the first {min(FIRST, documents)} documents, scored now"
    clock = _Clock()
    top_k = top_k_of(accepted) if accepted is not None and margins.kl_ratio is not None else 0
    runs = _first_documents(pair, clock, top_k)
    result = foresee(_spread(*runs), source, documents, margins.loss, formats, look=look)
    drift = None
    if accepted is not None:
        drift = _foresee_drift(accepted, runs, documents, margins, look)
    seconds, loading = clock.cost(2 * sum(len(unit) for unit in whole.units))
    return replace(
        result,
        unit="of accuracy" if task else result.unit,
        seconds=seconds,
        loading=loading,
        drift=drift,
    )


def _first_documents(pair: Pair, clock: _Clock, top_k: int) -> tuple[Run, Run]:
    """Score the first documents with the candidate and the base."""
    corpus = pair.options.corpus.head(FIRST)
    first = replace(pair.options, corpus=corpus, on_unit=clock, top_k=top_k)
    candidate, base = score(plan_scoring((pair.candidate, pair.base), first)).runs
    scored = int((base.tokens > 0).sum())
    if scored < 2:
        raise UsageError(
            f"only {scored} of the first {len(first.corpus)} documents has a token to score"
        )
    return candidate, base


def _head(run: Run, documents: int) -> Run:
    """Return the sums of a run's first documents."""
    tokens = int(run.tokens[:documents].sum())
    arrays = {
        name: values[: documents if name in ("sums", "tokens") else tokens]
        for name, values in run.arrays.items()
    }
    header = run.header.model_copy(update={"documents": run.header.documents[:documents]})
    return Run(header, arrays)


def _spread(candidate: Run, base: Run) -> Spread:
    """Return how documents differ in the loss of a run over another."""
    corpus = str(base.header.key["corpus"])
    if candidate.header.key["protocol"] != "task":
        interval = paired(base.sums, candidate.sums, base.tokens)
        return Spread(
            corpus=corpus,
            scored=interval.documents,
            se=interval.se,
            delta=interval.delta,
            seconds=0.0,
        )
    count = len(base)
    lost = int((base.sums < candidate.sums).sum())
    won = int((base.sums > candidate.sums).sum())
    # Documents that all agree do not show that none would differ: one of each kind is added.
    discordant = (lost + won + 2) / (count + 2)
    se = math.sqrt(discordant / count)
    return Spread(corpus=corpus, scored=count, se=se, delta=(lost - won) / count, seconds=0.0)


def _foresee_drift(
    accepted: Run, runs: tuple[Run, Run], documents: int, margins: Margins, look: int | None
) -> DriftForecast:
    """Return the forecast of the drift from an accepted run.

    The last of the first documents may have other windows in the whole text, and is left out.
    """
    count = _same_documents(runs[0], accepted)
    candidate, base, reference = (_head(run, count) for run in (*runs, accepted))
    margin, spread = margins.drift, _spread(candidate, reference)
    unit = "of accuracy" if base.header.key["protocol"] == "task" else "nats per token"
    if margins.kl_ratio is not None:
        units = clusters_of(base.header.documents)
        ratio = kl_ratio(base, candidate, reference, units, margins.kl_ratio, LEVEL)
        if ratio is not None:
            margin, unit = margins.kl_ratio, "of the logarithm of the KL ratio"
            interval = ratio.interval
            spread = spread.model_copy(update={"se": interval.se, "delta": interval.delta})
    plan = foresee(spread, "", documents, margin, set(), look=look)
    return DriftForecast(
        margin, plan.se, plan.passes, plan.fails, plan.seen, plan.chance_seen, unit
    )


def _same_documents(run: Run, whole: Run) -> int:
    """Return how many first documents of two runs have as many tokens."""
    different = np.flatnonzero(run.tokens != whole.tokens[: len(run)])
    return int(different[0]) if len(different) else len(run)


def foresee(
    spread: Spread,
    source: str,
    documents: int,
    margin: Margin,
    formats: Iterable[str],
    *,
    look: int | None = None,
) -> GatePlan:
    """Return the plan for ``documents`` documents from how some of them differ.

    Args:
        spread: how they differ.
        source: where that is from, for the user.
        documents: how many the gate would score.
        margin: of the gate.
        formats: the candidate's.
        look: which look it would be; None where earlier attempts are not known.
    """
    stats = scipy_stats()
    error = spread.se * math.sqrt(spread.scored / documents)
    quantile = float(stats.t.ppf(1 - alpha_of(look), documents - 1))
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
    lines = [
        f"plan     {plan.documents} documents; the spread is from {plan.source}",
        *_forecast_lines(plan, plan.unit),
    ]
    if plan.normal is not None and plan.chance is not None:
        lines.append(
            f"         {plan.chance:.0%} to pass at the published normal of the format, "
            f"{plan.normal:+.5f} nats"
        )
    if plan.drift is not None:
        lines += ["drift    from the accepted run:", *_forecast_lines(plan.drift, plan.drift.unit)]
    lines.append("note     a standard error from few documents may be half or twice the real one")
    loading = "loading included"
    if plan.loading is not None:
        loading = f"{plan.loading:,.0f} s of it to load"
    lines.append(f"cost     about {plan.seconds:,.0f} s here, {loading}")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def _forecast_lines(forecast: GatePlan | DriftForecast, unit: str) -> list[str]:
    passes = "no true loss passes"
    if forecast.passes is not None:
        passes = f"true loss ≤ {forecast.passes:.5f} passes"
    return [
        f"margin   {forecast.margin.nats:.5f} {unit} ({forecast.margin.source}); expected standard "
        f"error {forecast.se:.5f}",
        f"detects  with 80% power: {passes}, ≥ {forecast.fails:.5f} fails",
        f"chance   {forecast.chance_seen:.0%} to pass at the loss seen there, "
        f"{forecast.seen:+.5f} {unit}",
    ]


def render_plan_json(plan: GatePlan) -> str:
    """Return a plan as one JSON object."""
    return json.dumps({"schema_version": "1.1", **asdict(plan)}, indent=2) + "\n"
