# SPDX-License-Identifier: Apache-2.0
"""Which modules explain the excess of a KL divergence: layers first, then their modules, then what
all others cost.

All steps share the budget of `Meter.left`; what is left of it decides how many batches each uses,
those with the largest divergence first.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from verifier.gate.jobs import Unit, UnitScores
from verifier.locate.stream import Place
from verifier.locate.tracks import Survey, Swap, Tracks

ENOUGH = 0.8
"""The share of the excess that the blamed modules explain."""
_SHARE_OF_LAYERS, _SHARE_OF_MODULES = 0.5, 0.6
"""How much of what is left of the budget goes to the layers, and then to the blamed ones'
modules."""


@dataclass
class Explanation:
    """What putting modules back does to the divergence, as shares of the whole excess.

    ``stages`` and ``places`` hold the effect of each alone; ``blamed`` are the fewest modules whose
    joint effect, ``explained``, is at least `ENOUGH`, the largest effect first.
    """

    stages: dict[int, float] = field(default_factory=dict)
    places: dict[Place, float] = field(default_factory=dict)
    blamed: list[Place] = field(default_factory=list)
    explained: float = 0.0


@dataclass(frozen=True)
class _Sample:
    """Some units, and the candidate's divergence and excess on them, nats."""

    units: tuple[Unit, ...]
    kl: float
    excess: float

    def effect(self, sums: Mapping[int, float]) -> float:
        """Return the share of the excess that is gone in a mixture."""
        return (self.kl - sum(sums.values())) / self.excess


class Search:
    """Explains the excess of a survey's divergence over a reference.

    Args:
        tracks: the models, after `Tracks.survey`.
        survey: what it found.
        ratio: the candidate's divergence over an accepted run's; None where plain rounding is the
            reference.
    """

    def __init__(self, tracks: Tracks, survey: Survey, ratio: float | None) -> None:
        self._tracks, self._survey, self._ratio = tracks, survey, ratio

    def explain(self) -> Explanation:
        """Return which modules explain the excess, as far as the budget allows."""
        result = Explanation()
        groups = {stage: swap for stage, swap in self._survey.differing.items() if swap}
        sample = self._sample(list(groups.values()), _SHARE_OF_LAYERS)
        effects = self._effects(list(groups.values()), sample)
        result.stages = dict(zip(groups, effects, strict=True))
        stages = sorted(groups, key=lambda stage: -result.stages[stage])
        first, result.explained = self._fewest([groups[stage] for stage in stages], effects, sample)
        modules = [frozenset({place}) for swap in first for place in swap]
        if len(modules) == len(first):  # one module each: they are measured already
            for swap in first:
                result.places |= dict.fromkeys(swap, result.stages[next(iter(swap)).stage])
        else:
            sample = self._sample(modules, _SHARE_OF_MODULES)
            alone = self._effects(modules, sample)
            for module, effect in zip(modules, alone, strict=True):
                result.places |= dict.fromkeys(module, effect)
            modules.sort(key=lambda module: -result.places[next(iter(module))])
            modules, result.explained = self._fewest(modules, alone, sample)
        result.blamed = [place for module in modules for place in module]
        self._others(groups, result)
        return result

    def _others(self, groups: Mapping[int, Swap], result: Explanation) -> None:
        """Measure the modules that are not yet, if the budget allows one batch."""
        others = []
        for stage, swap in groups.items():
            if len(swap) == 1:
                result.places |= dict.fromkeys(swap, result.stages[stage])
            others += [frozenset({place}) for place in swap if place not in result.places]
        if others and self._affordable(others, 1.0):
            for swap, effect in zip(
                others, self._effects(others, self._sample(others, 1.0)), strict=True
            ):
                result.places |= dict.fromkeys(swap, effect)

    def _effects(self, swaps: Sequence[Swap], sample: _Sample) -> list[float]:
        return [sample.effect(sums) for sums in self._tracks.mixtures(swaps, sample.units)]

    def _fewest(
        self, ordered: Sequence[Swap], effects: Sequence[float], sample: _Sample
    ) -> tuple[list[Swap], float]:
        """Return the fewest leading swaps whose joint effect is enough, by bisection, and that
        effect.
        """
        if max(effects) >= ENOUGH or len(ordered) == 1:
            return [ordered[0]], max(effects)
        low, high = 1, len(ordered)  # `low` is not enough; `high` is, or nothing is
        explained = self._joint(ordered, high, sample)
        while explained >= ENOUGH and high - low > 1:
            middle = (low + high) // 2
            effect = self._joint(ordered, middle, sample)
            if effect >= ENOUGH:
                high, explained = middle, effect
            else:
                low = middle
        return list(ordered[:high]), explained

    def _joint(self, ordered: Sequence[Swap], count: int, sample: _Sample) -> float:
        joint = frozenset().union(*ordered[:count])
        return self._effects([joint], sample)[0]

    def _affordable(self, swaps: Sequence[Swap], share: float) -> list[Unit]:
        """Return the units with the largest divergence that a share of the budget pays for."""
        passes = sum(self._tracks.cost(swap) for swap in swaps)
        budget = self._tracks.meter.left * share
        chosen = []
        scored = [unit for unit in self._tracks.plan.units if unit.number in self._survey.scores]
        for unit in sorted(scored, key=lambda u: -self._kl(self._survey.scores, u)):
            budget -= passes * self._tracks.inputs[unit.number][0].numel()
            if budget < 0:
                break
            chosen.append(unit)
        return chosen

    def _sample(self, swaps: Sequence[Swap], share: float) -> _Sample:
        units = tuple(self._affordable(swaps, share)) or tuple(self._most_divergent())
        kl = sum(self._kl(self._survey.scores, unit) for unit in units)
        if self._ratio is not None or self._survey.norm is None:
            reference = kl / (self._ratio or 1.0)
        else:
            reference = sum(self._kl(self._survey.norm, unit) for unit in units)
        return _Sample(units, kl, max(kl - reference, 1e-12))

    def _most_divergent(self) -> Collection[Unit]:
        """Return the unit with the largest divergence: a search uses one even where the budget is
        too small.
        """
        scored = [unit for unit in self._tracks.plan.units if unit.number in self._survey.scores]
        return [max(scored, key=lambda unit: self._kl(self._survey.scores, unit))]

    @staticmethod
    def _kl(scores: Mapping[int, UnitScores], unit: Unit) -> float:
        return float(scores[unit.number].arrays["kl"].sum())
