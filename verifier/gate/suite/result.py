# SPDX-License-Identifier: Apache-2.0
"""What a suite measured: plain values."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from verifier.evaluation import EXIT_OF_OUTCOME, GateResult, Interval, LossStatus, Margin, Outcome
from verifier.gate.identity import Identity

SCHEMA_VERSION = "1.0"
CriterionMeasure = Literal["loss", "KL", "length"]


@dataclass(frozen=True)
class More:
    """About how many items in all would decide, or how many repeats of each of the present ones;
    None where no number would, or where it is not known.
    """

    items: int | None = None
    repeats: int | None = None


@dataclass(frozen=True)
class Criterion:
    """One measure of an entry that decides.

    ``interval`` and ``margin`` are of the loss, of a KL divergence, or of the logarithm of the
    ratio of completion tokens, which must be within the margin on both sides. ``p_value`` is
    one-sided, of "within the margin"; ``status`` is that of the whole suite's decision. ``more`` is
    what would decide where it is open.
    """

    measure: CriterionMeasure
    interval: Interval
    margin: Margin
    p_value: float
    status: LossStatus = "open"
    more: More = More()


@dataclass(frozen=True)
class Recovery:
    """Candidate over base, with its paired two-sided 95% interval.

    Of a corpus, the base's perplexity over the candidate's; of a task, the share of right answers.
    """

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Length:
    """The completions of a task: tokens of base and candidate, their ratio with its paired
    two-sided 95% interval (NaN where it has none), and the shares (base, candidate) of those that
    are cut off at the task's limit, and of those that end without an end token.
    """

    base_tokens: int
    candidate_tokens: int
    ratio: float
    low: float
    high: float
    cut_off: tuple[float, float]
    without_end_token: tuple[float, float]


@dataclass(frozen=True)
class EntryResult:
    """The result of one entry.

    ``gate`` is its comparison, whose own outcome does not count: the suite decides. ``items`` are
    documents, or the documents of a task without their repeats. ``seconds``: of scoring base and
    candidate. ``reasons`` say why it is not passed.
    """

    name: str
    kind: Literal["corpus", "task"]
    outcome: Outcome
    gate: GateResult
    items: int
    repeats: int
    seconds: float
    criteria: tuple[Criterion, ...] = ()
    recovery: Recovery | None = None
    length: Length | None = None
    reasons: tuple[str, ...] = ()

    @property
    def score_name(self) -> str:
        """What the two scores are."""
        if self.kind == "task":
            return str(self.gate.key.get("metric", "accuracy"))
        return "word perplexity" if self.gate.key["protocol"] == "lm-eval" else "perplexity"

    @property
    def scores(self) -> tuple[float, float]:
        """The scores of base and candidate: perplexities, or shares of right answers."""
        right, count = self.gate.accuracy, self.gate.key["documents"]
        if self.kind == "corpus":
            return self.gate.perplexity_base, self.gate.perplexity_candidate
        distinct = sum(c >= 0 for c in self.gate.clusters) or count
        if right is None:
            return math.nan, math.nan
        return right.base / distinct, right.candidate / distinct

    def criterion(self, measure: CriterionMeasure) -> Criterion | None:
        """Return the criterion of a measure, if it decides."""
        return next((c for c in self.criteria if c.measure == measure), None)


@dataclass(frozen=True)
class Scored:
    """A checkpoint that was scored: its address, its identity and its formats."""

    uri: str
    identity: Identity
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class SuiteResult:
    """The result of a suite.

    ``looks`` is which look at candidates of the base this is, None where earlier attempts are not
    known; ``alpha`` is its error, which all criteria share. ``notes`` are for the user.
    """

    name: str
    sha256: str
    outcome: Outcome
    candidate: Scored
    base: Scored
    entries: tuple[EntryResult, ...]
    looks: int | None
    alpha: float
    time: str
    seconds: float
    versions: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_OF_OUTCOME[self.outcome]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object of ``--format json``; numbers that are not finite are None."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "suite",
            "verdict": self.outcome,
            "suite": {"name": self.name, "sha256": self.sha256},
            "candidate": _checkpoint(self.candidate),
            "base": _checkpoint(self.base),
            "look": self.looks,
            "alpha": self.alpha,
            "time": self.time,
            "seconds": self.seconds,
            "versions": self.versions,
            "notes": list(self.notes),
            "entries": [_entry(entry) for entry in self.entries],
        }


def _checkpoint(scored: Scored) -> dict[str, Any]:
    identity = scored.identity
    return {
        "uri": scored.uri,
        "weights_sha256": identity.weights_sha256,
        "config_sha256": identity.config_sha256,
        "tokenizer_sha256": identity.tokenizer_sha256,
        "formats": list(scored.formats),
    }


def _entry(entry: EntryResult) -> dict[str, Any]:
    gate, (base, candidate) = entry.gate, entry.scores
    right, length = gate.accuracy, entry.length
    return {
        "name": entry.name,
        "kind": entry.kind,
        "verdict": entry.outcome,
        "reasons": list(entry.reasons),
        "notes": list(gate.notes),
        "items": entry.items,
        "repeats": entry.repeats,
        "seconds": entry.seconds,
        "score": {
            "name": entry.score_name,
            "base": _number(base),
            "candidate": _number(candidate),
        },
        "recovery": _recovery(entry.recovery),
        "discordant": None
        if right is None
        else {"base_only": right.lost, "candidate_only": right.won, "p_value": right.p_value},
        "criteria": [_criterion(criterion) for criterion in entry.criteria],
        "length": None if length is None else _length(length),
        "nonfinite": {
            "base": len(gate.nonfinite_base),
            "candidate": len(gate.nonfinite_candidate),
        },
        "key": gate.key,
        "environment": gate.environment,
    }


def _recovery(recovery: Recovery | None) -> dict[str, Any] | None:
    if recovery is None:
        return None
    low, high = _number(recovery.low), _number(recovery.high)
    return {"value": _number(recovery.value), "low": low, "high": high}


def _criterion(criterion: Criterion) -> dict[str, Any]:
    interval = criterion.interval
    return {
        "measure": criterion.measure,
        "value": _number(interval.delta),
        "se": _number(interval.se),
        "low": _number(interval.low),
        "high": _number(interval.high),
        "margin": criterion.margin.nats,
        "margin_source": criterion.margin.source,
        "p_value": criterion.p_value,
        "status": criterion.status,
        "more_items": criterion.more.items,
        "more_repeats": criterion.more.repeats,
    }


def _length(length: Length) -> dict[str, Any]:
    shares = {
        name: {"base": base, "candidate": candidate}
        for name, (base, candidate) in (
            ("cut_off", length.cut_off),
            ("without_end_token", length.without_end_token),
        )
    }
    return {
        "base_tokens": length.base_tokens,
        "candidate_tokens": length.candidate_tokens,
        "ratio": _number(length.ratio),
        "low": _number(length.low),
        "high": _number(length.high),
        **shares,
    }


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
