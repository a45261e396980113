# SPDX-License-Identifier: Apache-2.0
"""What a gate measured: plain values, without anything that scores.

`verifier.gate` makes a `GateResult`. History, goldens and report pages keep and show it, and the
rules QC701 to QC705 read it at depth eval, so nothing that evaluates a result imports torch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Any, Literal

from verifier.errors import ContentError

if TYPE_CHECKING:
    from verifier.checkpoint import Checkpoint

Outcome = Literal["passed", "failed", "inconclusive"]
LossMeasure = Literal["loss", "KL", "KL ratio"]
LossStatus = Literal["within", "beyond", "open"]
EXACT_KL = "lockstep"
"""The kind of a KL divergence over the whole vocabulary."""
EXIT_OF_OUTCOME: dict[Outcome, int] = {"passed": 0, "failed": 1, "inconclusive": 3}
SCHEMA_VERSION = "1.2"


class _NullIsNan:
    """JSON has no NaN and no infinity: such a number is written as null, and null is read as
    NaN.
    """

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        # Only what reads a file needs pydantic.
        from pydantic_core import core_schema  # noqa: PLC0415

        def read(value: Any, number: Callable[[Any], float]) -> float:
            return math.nan if value is None else number(value)

        return core_schema.no_info_wrap_validator_function(read, handler(source))


Number = Annotated[float, _NullIsNan()]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean, its standard error clustered by document, and its one-sided bounds.

    ``delta`` is per token (lm-eval: per word; a task: the loss of accuracy). ``low`` and ``high``
    together are a two-sided interval. ``t`` is Student's quantile, with ``freedom`` degrees of
    freedom; ``se_linear`` is the linearized standard error. ``exact``, of right and wrong answers:
    documents that only the base gets right, that only the candidate does, and all.
    """

    delta: Number
    se: Number
    low: Number
    high: Number
    documents: int
    tokens: int
    t: Number
    freedom: Number = math.nan
    se_linear: Number = math.nan
    exact: tuple[int, int, int] | None = None

    @property
    def ratio(self) -> float:
        """The perplexity ratio that ``delta`` is the logarithm of."""
        return math.exp(self.delta)

    def widened(self, by: float) -> Interval:
        """Return the interval with both ends moved outwards."""
        return replace(self, low=self.low - by, high=self.high + by)


@dataclass(frozen=True, slots=True)
class Margin:
    """The largest tolerated loss, in nats per token (a task: of accuracy), and where it comes
    from.
    """

    nats: float
    source: str


@dataclass(frozen=True)
class KlRatio:
    """How far the candidate's predictions are from the base's, relative to an accepted run's:
    KL(base || candidate) / KL(base || accepted).

    ``kind`` says how both were computed, alike. ``candidate`` and ``accepted`` are the means, nats
    per token. ``interval`` and ``margin`` are of the logarithm of the ratio, with 1 - alpha / 5
    bounds, since KL is skewed.
    """

    kind: str
    candidate: float
    accepted: float
    interval: Interval
    margin: Margin


@dataclass(frozen=True)
class Drift:
    """The loss over an accepted run on the same tokens, and its margin.

    Where ``kl`` is given, its ratio decides, and the loss is information.
    """

    accepted: str
    margin: Margin
    interval: Interval
    kl: KlRatio | None = None


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss over one reference.

    ``status``: shown to be ``within`` the margin, shown to be ``beyond`` it, or ``open``.
    ``measure`` is what the interval and the margin are of: a loss, a KL divergence in nats per
    token, or the logarithm of a ratio of two.
    """

    over: str
    interval: Interval
    margin: Margin
    status: LossStatus
    measure: LossMeasure = "loss"

    @property
    def title(self) -> str:
        """What was measured, for messages."""
        if self.measure == "loss":
            return f"loss increase over {self.over}"
        if self.measure == "KL":
            return f"KL divergence from {self.over}"
        return f"KL divergence from the base relative to {self.over}"


@dataclass(frozen=True, slots=True)
class ExpertReach:
    """The number of routed experts of one layer, and those that no token of the corpus reached."""

    layer: str
    experts: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class Accuracy:
    """Right answers of a task: the base's, the candidate's, the base's alone, the candidate's
    alone.

    ``p_value`` is McNemar's exact one, one-sided, of no loss; of documents in groups, that of
    Student's t over the groups.
    """

    base: int
    candidate: int
    lost: int
    won: int
    p_value: float


@dataclass(frozen=True)
class Kl:
    """Mean KL(base || candidate), and its 99.9% quantile over tokens with bounds, in nats; ``kind``
    says how it was computed.

    ``mean`` has 1 - alpha / 5 bounds, since KL is skewed. ``margin`` is the largest tolerated mean;
    None where there is none.
    """

    kind: str
    mean: Interval
    tail: tuple[Number, Number, Number]
    margin: Margin | None = None

    @property
    def exact(self) -> bool:
        """Whether it is the divergence itself, and not a lower bound of it."""
        return self.kind == EXACT_KL


@dataclass(frozen=True)
class Measures:
    """Diagnostics of a comparison. Those that need tokens are None where a run has only sums
    (lm-eval).

    ``design_effect`` is the square of the clustered over the token-wise standard error.
    ``se_blocks`` is given below 20 documents and never decides. ``worst`` is (document, its mean,
    its bound) of the document furthest beyond its bound, or nearest to it; ``beyond`` are the
    documents beyond theirs. ``flips`` of ``sure`` tokens: those where the base was confident and
    the candidate's top token differs.
    """

    bootstrap: tuple[float, float] | None = None
    se_tokens: float | None = None
    design_effect: float | None = None
    se_blocks: float | None = None
    kl: Kl | None = None
    top1: Interval | None = None
    flips: int | None = None
    sure: int | None = None
    worst: tuple[int, float, float] | None = None
    beyond: tuple[int, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """The result of a gate.

    ``interval`` is None where logits were not finite: then there are no statistics. Intervals are
    those that decide: widened by the noise floor where ``unlike`` names environment keys that
    differ. ``documents`` holds the base's nats, the candidate's nats and the tokens of each;
    ``clusters`` the sampling unit of each, -1 for one that repeats an earlier one, and is empty
    where every document is its own; ``kl_documents`` the sum of KL(base || candidate) of each,
    where it was computed. ``nonfinite`` are the documents in which a logit of either run
    is not finite, ``nonfinite_base`` those of the base. ``needed`` is about how many documents
    would decide. ``looks`` counts this attempt and those before it, None where they are not known;
    ``alpha`` is the error of each one-sided bound. ``doubts`` are reasons why the result is not
    passed whatever the intervals show. ``weights_sha256`` is the digest of the candidate's weights,
    '' in files of earlier versions.
    """

    outcome: Outcome
    candidate: str
    base: str
    margin: Margin
    interval: Interval | None
    perplexity_base: Number
    perplexity_candidate: Number
    measures_kl: bool
    key: dict[str, Any]
    environment: dict[str, str]
    documents: list[tuple[float, float, int]] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    needed: int | None = None
    drift: Drift | None = None
    measures: Measures = field(default_factory=Measures)
    experts: tuple[ExpertReach, ...] = ()
    floor: float | None = None
    unlike: tuple[str, ...] = ()
    looks: int | None = None
    alpha: float = 0.05
    notes: tuple[str, ...] = ()
    nonfinite_base: tuple[int, ...] = ()
    accuracy: Accuracy | None = None
    doubts: tuple[str, ...] = ()
    clusters: list[int] = field(default_factory=list)
    kl_documents: list[float] = field(default_factory=list)
    weights_sha256: str = ""

    @property
    def unit(self) -> str:
        """The unit of a loss."""
        units = {"lm-eval": "nats per word", "task": "of accuracy"}
        return units.get(str(self.key.get("protocol")), "nats per token")

    @property
    def nonfinite_candidate(self) -> tuple[int, ...]:
        """The documents in which only the candidate has a logit that is not finite."""
        return tuple(sorted(set(self.nonfinite) - set(self.nonfinite_base)))

    @property
    def losses(self) -> tuple[Loss, ...]:
        """What decides, the loss over the base first: then the KL divergence from it where that
        has a margin, and the drift from an accepted run; empty without statistics.
        """
        losses = []
        if self.interval is not None:
            losses.append(self._loss("the base", self.interval, self.margin))
        kl = self.measures.kl
        if kl is not None and kl.margin is not None:
            losses.append(self._loss("the base", kl.mean, kl.margin, "KL"))
        if self.drift is not None:
            ratio = self.drift.kl
            if ratio is not None:
                losses.append(
                    self._loss("the accepted run", ratio.interval, ratio.margin, "KL ratio")
                )
            else:
                loss = self.drift.interval, self.drift.margin
                losses.append(self._loss("the accepted run", *loss))
        return tuple(losses)

    def _loss(
        self, over: str, interval: Interval, margin: Margin, measure: LossMeasure = "loss"
    ) -> Loss:
        status: LossStatus = "open"
        above_noise = measure != "loss" or self.floor is None or margin.nats > self.floor
        if self.outcome == "failed" and interval.low > margin.nats:
            status = "beyond"
        elif interval.high <= margin.nats and above_noise:
            status = "within"
        return Loss(over, interval, margin, status, measure)

    @property
    def collapse(self) -> float:
        """The loss over the base of a destroyed model, in `unit`: twice the perplexity, half the
        right answers.
        """
        if self.accuracy is not None:
            return max(0.5 * self.accuracy.base / max(1, len(self.documents)), self.margin.nats)
        return math.log(2)

    @property
    def base_nats(self) -> float | None:
        """The base's own mean loss, nats per token; None in another unit or without statistics."""
        tokens = sum(tokens for _, _, tokens in self.documents)
        if self.key.get("protocol") != "tokens" or not tokens or not self.losses:
            return None
        return sum(base for base, _, _ in self.documents) / tokens

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_OF_OUTCOME[self.outcome]

    def as_json(self) -> dict[str, Any]:
        """Return the JSON object that `ckptgate gate --format json` prints; numbers that are not
        finite are None.
        """
        fields: Any = _finite(asdict(self))
        return {"schema_version": SCHEMA_VERSION, "verdict": self.outcome, **fields}


@dataclass(frozen=True)
class NotScored:
    """Why nothing was measured: the scores cannot be compared, or a checkpoint cannot be scored."""

    reason: str
    incomparable: bool = False


Evaluation = GateResult | NotScored
Evaluate = Callable[["Checkpoint", "Checkpoint"], Evaluation]
"""Scores a candidate and its base."""


def evaluation_json(evaluation: Evaluation) -> dict[str, Any]:
    """Return an evaluation as a report's JSON holds it: without the sums of documents, {} where
    nothing was scored.
    """
    if isinstance(evaluation, NotScored):
        return {}
    without = ("documents", "clusters", "kl_documents")
    return {k: v for k, v in evaluation.as_json().items() if k not in without}


def evaluation_of(value: Mapping[str, Any]) -> Evaluation:
    """Return the evaluation that a report's JSON holds; see `evaluation_json`.

    Raises:
        ContentError: a field is missing or has a wrong type.
    """
    return gate_result_of(value) if value else NotScored("nothing was scored")


def gate_result_of(value: Mapping[str, Any]) -> GateResult:
    """Return the result that a JSON object of `ckptgate gate` holds.

    Raises:
        ContentError: a field is missing or has a wrong type.
    """
    from pydantic import TypeAdapter, ValidationError  # noqa: PLC0415  (only to read files)

    try:
        return TypeAdapter(GateResult).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        name = ".".join(map(str, first["loc"]))[:100]
        raise ContentError(f"{name}: {first['msg'][:200]}") from error


def why_unscored(evaluation: Evaluation | None) -> str:
    """Return why there is no result, '' where there is one."""
    if evaluation is None:
        return "nothing was scored"
    return evaluation.reason if isinstance(evaluation, NotScored) else ""


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value
