# SPDX-License-Identifier: Apache-2.0
"""What a search for damage found."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import median

from verifier.evaluation import Interval, Outcome
from verifier.locate.sound import WeightNoise
from verifier.locate.stream import Place

EXIT_CODES: Mapping[Outcome, int] = {"passed": 0, "failed": 1, "inconclusive": 3}


@dataclass(frozen=True)
class Cell:
    """A module of a layer: how far its weights are from the base's, and what it costs.

    ``cost`` is by how many nats per token KL(base || candidate) falls when the module is put back
    to plain rounding; 0 where it is plain rounding already, None where it was not measured.
    ``activation`` is the lowest SQNR of its rounded inputs, dB.
    """

    place: Place
    name: str
    cost: float | None
    noise: tuple[WeightNoise, ...] = ()
    activation: float | None = None

    @property
    def worst(self) -> WeightNoise | None:
        """The weight that is noisiest, relative to plain rounding."""
        return max(self.noise, key=lambda n: n.loss, default=None)

    @property
    def sqnr(self) -> float | None:
        """The median SQNR of its weights, dB."""
        return median(n.sqnr for n in self.noise) if self.noise else None


@dataclass(frozen=True)
class Layer:
    """A layer: the share of tokens that go to the same experts as in the base, and what it costs,
    as in `Cell`.
    """

    stage: int
    name: str
    agreement: float | None
    cost: float | None


@dataclass(frozen=True)
class Blame:
    """A module that explains excess KL divergence: ``cost`` in nats per token, ``share`` of the
    excess.
    """

    layer: Layer
    cell: Cell
    cost: float
    share: float
    peers: float | None
    commands: tuple[str, ...]


@dataclass(frozen=True)
class LocateResult:
    """What a search for damage found.

    ``kl`` and ``reference`` are nats per token, ``ratio`` the logarithm of their ratio with its
    interval, ``margin`` that of the largest tolerated ratio. ``explained`` is the share of the
    excess that putting back the blamed modules removes. ``cost`` is in gates.
    """

    outcome: Outcome
    candidate: str
    base: str
    key: Mapping[str, str | int | bool]
    kl: float
    reference: float
    source: str
    ratio: Interval | None
    margin: float
    explained: float
    blames: tuple[Blame, ...]
    layers: tuple[Layer, ...]
    cells: tuple[Cell, ...]
    cost: float
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def excess(self) -> float:
        """By how much the divergence is above the reference, nats per token."""
        return self.kl - self.reference

    @property
    def exit_code(self) -> int:
        """What the command ends with."""
        return EXIT_CODES[self.outcome]
