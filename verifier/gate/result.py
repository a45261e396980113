# SPDX-License-Identifier: Apache-2.0
"""What a gate found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from verifier.gate.decision import EXIT_OF_OUTCOME, Margin, Outcome
from verifier.gate.measures import Measures
from verifier.gate.statistics import Interval


@dataclass(frozen=True)
class Drift:
    """The loss against an accepted run on the same tokens, and its margin."""

    accepted: str
    margin: Margin
    interval: Interval


@dataclass(frozen=True)
class Experts:
    """Experts of one layer that the corpus reached through the candidate; the rest was not
    judged.
    """

    layer: str
    experts: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class Accuracy:
    """A task's right answers: of the base, of the candidate, only of the one, only of the other;
    McNemar's exact p-value.

    ``p_value`` is one-sided: of no loss.
    """

    base: int
    candidate: int
    lost: int
    won: int
    p_value: float


@dataclass(frozen=True)
class GateResult:
    """What a gate found. ``interval`` is None where logits were not finite: then there are no
    statistics.

    Intervals are as they decide: widened by the noise floor where ``unlike`` names environment keys
    that differ. ``looks`` counts this attempt and those before it; the level of each one-sided
    bound is 1 - 0.05 / looks.
    """

    outcome: Outcome
    candidate: str
    base: str
    margin: Margin
    interval: Interval | None
    perplexity_base: float
    perplexity_candidate: float
    measures_kl: bool
    key: dict[str, Any]
    environment: dict[str, str]
    documents: list[tuple[float, float, int]] = field(default_factory=list)
    nonfinite: list[int] = field(default_factory=list)
    needed: int | None = None
    drift: Drift | None = None
    measures: Measures = field(default_factory=Measures)
    experts: tuple[Experts, ...] = ()
    floor: float | None = None
    unlike: tuple[str, ...] = ()
    looks: int = 1
    notes: tuple[str, ...] = ()
    nonfinite_base: tuple[int, ...] = ()
    accuracy: Accuracy | None = None

    @property
    def unit(self) -> str:
        """What a loss is measured in."""
        units = {"lm-eval": "nats a word", "task": "of accuracy"}
        return units.get(str(self.key.get("protocol")), "nats a token")

    @property
    def collapse(self) -> float:
        """The loss over the base that a destroyed model has, in its unit: twice the perplexity,
        half the right answers.
        """
        if self.accuracy is not None:
            return max(0.5 * self.accuracy.base / max(1, len(self.documents)), self.margin.nats)
        return math.log(2)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_OF_OUTCOME[self.outcome]
