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
    """Experts of one layer that the corpus reached through the candidate; the rest was not judged."""

    layer: str
    experts: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class GateResult:
    """What a gate found. ``interval`` is None where logits were not finite: then there are no statistics.

    Intervals are as they decide: widened by the noise floor where ``unlike`` names environment keys that differ. ``looks``
    counts this attempt and those before it; the level of each one-sided bound is 1 - 0.05 / looks.
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

    @property
    def unit(self) -> str:
        """What a loss is measured in."""
        return "nats a word" if self.key.get("protocol") == "lm-eval" else "nats a token"

    @property
    def collapse(self) -> float:
        """The loss over the base that a destroyed model has, in the unit of losses: twice the perplexity."""
        return math.log(2)

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_OF_OUTCOME[self.outcome]
