# SPDX-License-Identifier: Apache-2.0
"""What depth eval measured, as rules judge it: plain numbers. Scoring needs torch or an engine;
judging does not.

`verifier.gate.evaluator` makes what measures; `verifier.check(..., evaluate=...)` is given it, and
the rules QC701 to QC705 read the result from their context. So nothing that judges imports what
scores.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from verifier.checkpoint import Checkpoint

Standing = Literal["within", "beyond", "open"]


@dataclass(frozen=True, slots=True)
class Loss:
    """A loss against one reference: its estimate, one-sided 95 % bounds and margin, all in
    ``Evaluation.unit``.

    ``standing``: shown to be ``within`` the margin, shown to be ``beyond`` it, or ``open``.
    """

    against: str
    value: float
    low: float
    high: float
    margin: float
    source: str
    standing: Standing


@dataclass(frozen=True, slots=True)
class Reach:
    """Routed experts of one layer, and those of them that no token of the corpus reached."""

    layer: str
    experts: int
    unreached: tuple[int, ...]


@dataclass(frozen=True)
class Evaluation:
    """What candidate and base scored on the same text.

    Args:
        unit: what a loss is measured in, ``nats a token`` for example.
        documents: documents that were scored.
        losses: against the base, and against an accepted run where one was given; empty where there
            are no statistics.
        collapse: the loss over the base beyond which a model is destroyed, in ``unit``.
        needed: about how many documents would settle what is open; None where that is not known.
        nonfinite: documents in which a logit of the candidate is not finite; ``nonfinite_base`` of
            a reference.
        hit: documents that lose more than the others allow; ``worst`` is (document, its loss, its
            bound).
        reach: experts that the text reached, by layer.
        base_nats: mean loss of the base itself, nats a token; None where it is of another unit.
        keys: settings that were compared.
        unlike: environment settings in which the scores differ, each with both values.
        notes: what a person should know, the measured coverage of the intervals among it.
        summary: the whole result, JSON values.
        failure: why nothing could be scored, '' where it could.
        incomparable: why the scores cannot be compared, '' where they can.
    """

    unit: str = "nats a token"
    documents: int = 0
    losses: tuple[Loss, ...] = ()
    collapse: float = 0.0
    needed: int | None = None
    nonfinite: tuple[int, ...] = ()
    nonfinite_base: tuple[int, ...] = ()
    hit: tuple[int, ...] = ()
    worst: tuple[int, float, float] | None = None
    reach: tuple[Reach, ...] = ()
    base_nats: float | None = None
    keys: int = 0
    unlike: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    failure: str = ""
    incomparable: str = ""

    @property
    def unscored(self) -> str:
        """Why there is nothing to judge, '' where there is."""
        return self.incomparable or self.failure


Evaluate = Callable[[Checkpoint, Checkpoint], Evaluation]
"""Scores a candidate and its base."""
