# SPDX-License-Identifier: Apache-2.0
"""Forward passes of a base, its candidate and mixtures of both, one layer at a time, and what they
cost.

Mixtures are the candidate with some modules put back to what plain rounding of the base gives. They
start from the candidate's hidden states at the first layer that differs, and all mixtures advance
together: a layer is loaded once for all of them.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from verifier.errors import ContentError
from verifier.gate.attempts import Pair
from verifier.gate.jobs import Unit, UnitScores
from verifier.gate.scorers.expert_counts import ExpertCounter
from verifier.gate.scorers.transformers import padded, score_windows
from verifier.gate.windows import ScoringPlan
from verifier.load.activations import declared_activations, roundings
from verifier.load.rounding import Rounding
from verifier.locate.options import LIMIT, LocateOptions
from verifier.locate.sound import SoundWeights, decibels
from verifier.locate.stream import Place, StreamedModel

Swap = frozenset[Place]
"""The modules that are put back."""


class Shelf:
    """Keeps hidden states: in memory, or each in a file of a directory that is read as needed."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._kept: dict[tuple[str, int, int], torch.Tensor] = {}

    def put(self, track: str, stage: int, unit: int, hidden: torch.Tensor) -> None:
        """Keep the hidden states before a stage, BF16 [windows, tokens, width]."""
        key = (track, stage, unit)
        if self._folder is None or not hidden.numel():
            self._kept[key] = hidden
            return
        file = self._folder / f"{track}-{stage}-{unit}.hidden"
        raw = hidden.contiguous().view(torch.int16).numpy()
        mapped = np.memmap(file, np.int16, "w+", shape=raw.shape)
        mapped[...] = raw
        mapped.flush()
        self._kept[key] = torch.from_numpy(mapped).view(torch.bfloat16)

    def get(self, track: str, stage: int, unit: int) -> torch.Tensor:
        """Return what was kept."""
        return self._kept[track, stage, unit]

    def drop(self, track: str, stage: int, unit: int) -> None:
        """Forget hidden states that are not needed again."""
        self._kept.pop((track, stage, unit), None)
        if self._folder is not None:
            (self._folder / f"{track}-{stage}-{unit}.hidden").unlink(missing_ok=True)


@dataclass
class Meter:
    """Counts the work in gates: a gate is two models on all tokens, L layers and a head each."""

    gate: int
    spent: int = 0

    @property
    def gates(self) -> float:
        """What was spent, in gates."""
        return self.spent / self.gate

    @property
    def left(self) -> float:
        """How many layer passes of a token `LIMIT` leaves."""
        return LIMIT * self.gate - self.spent


@dataclass(frozen=True, slots=True)
class MeasuredRounding(Rounding):
    """A rounding that adds up the powers of its input and of what it changes, in ``powers``, while
    ``metering`` is not empty; it rounds only where ``applied``.
    """

    applied: bool = False
    metering: list[bool] = field(default_factory=list)
    powers: list[float] = field(default_factory=lambda: [0.0, 0.0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, rounded where it is applied."""
        if not self.applied and not self.metering:
            return x
        rounded = Rounding.__call__(self, x)
        if self.metering:
            wide = x.double()
            self.powers[0] += float(wide.square().sum())
            self.powers[1] += float((rounded.double() - wide).square().sum())
        return rounded if self.applied else x


@dataclass
class Survey:
    """What one pass of all layers shows.

    ``scores`` and ``norm`` are those of the candidate and of the plainly rounded base (None where
    an accepted run is the reference), both in lockstep with the base. ``agreement``: by stage, the
    share of tokens for which base and candidate choose the same experts. ``nonfinite``: the first
    stage after which the candidate's hidden states are not finite.
    """

    scores: dict[int, UnitScores] = field(default_factory=dict)
    norm: dict[int, UnitScores] | None = None
    differing: dict[int, Swap] = field(default_factory=dict)
    agreement: dict[int, float] = field(default_factory=dict)
    nonfinite: int | None = None


class Tracks:
    """The three models of a search, their hidden states, and the work done so far."""

    def __init__(
        self, pair: Pair, plan: ScoringPlan, options: LocateOptions, *, norm: bool
    ) -> None:
        self.plan, self.options = plan, options
        self._with_norm = norm
        candidate, base = pair.candidate, pair.base
        self.sound_weights = SoundWeights(base, candidate)
        device = options.device
        self.base = StreamedModel(base, device=device)
        self.candidate = StreamedModel(candidate, device=device)
        self.sound = StreamedModel(
            base,
            device=device,
            change=self.sound_weights,
            without_float32=self.sound_weights.rounded,
        )
        if len(self.base.layers) != len(self.candidate.layers):
            raise ContentError(
                f"{candidate.uri} has {len(self.candidate.layers)} layers, its base "
                f"{len(self.base.layers)}"
            )
        self.shelf = Shelf(options.scratch)
        self.inputs = {unit.number: _inputs(unit) for unit in plan.units}
        tokens = sum(ids.numel() for ids, _ in self.inputs.values())
        self.meter = Meter(2 * self.base.head * tokens)
        self.activations: dict[str, MeasuredRounding] = {}
        self._metering: list[bool] = []
        self._choices: dict[tuple[int, int], torch.Tensor] = {}

    @property
    def head(self) -> int:
        """The number of the last stage."""
        return self.base.head

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Round activations as the options say while the context is open, and measure what the
        candidate's declared rounding does.
        """
        applied = self.options.activations != "bf16"
        shared = self.options.activations == "shared"
        candidate, base = self.candidate.checkpoint, self.base.checkpoint
        try:
            declared = roundings(candidate)
        except ContentError:
            if applied:
                raise
            declared = {}
        self.activations = {
            name: MeasuredRounding(rounding.kind, rounding.scale, applied, self._metering)
            for name, rounding in declared.items()
        }
        of_base = roundings(base) if applied else {}
        of_sound = declared if applied else {}
        with ExitStack() as stack, torch.inference_mode():
            for model, source, by_module in (
                (self.base, base, of_base),
                (self.sound, candidate, of_sound),
                (self.candidate, candidate, self.activations),
            ):
                stack.enter_context(
                    declared_activations(model.model, source, shared=shared, by_module=by_module)
                )
            yield

    def survey(self) -> Survey:
        """Run base, candidate and the plainly rounded base through all layers."""
        survey = Survey()
        tracks = {"base": self.base, "candidate": self.candidate}
        if self._with_norm:
            tracks["norm"] = self.sound
        self._metering.append(True)
        for stage in range(self.head):
            with self.base.loaded(stage), self.candidate.loaded(stage), self.sound.loaded(stage):
                survey.differing[stage] = self._differing(stage)
                same = [self._advance(tracks, stage, unit, survey) for unit in self.plan.units]
            counted = [pair for pair in same if pair is not None]
            if counted:
                survey.agreement[stage] = sum(a for a, _ in counted) / sum(n for _, n in counted)
        self._metering.clear()
        survey.differing[self.head] = self._differing(self.head)
        survey.scores = self._scored("candidate", self.candidate)
        if self._with_norm:
            survey.norm = self._scored("norm", self.sound)
        return survey

    def _advance(
        self, tracks: Mapping[str, StreamedModel], stage: int, unit: Unit, survey: Survey
    ) -> tuple[int, int] | None:
        """Run a stage on a unit in each track; return how many tokens have the same experts in base
        and candidate, and how many there are.
        """
        ids, real = self.inputs[unit.number]
        if not ids.numel():
            return None
        for name, model in tracks.items():
            before = self.shelf.get(name, stage, unit.number) if stage else torch.zeros(0)
            hidden = self._run(model, stage, ids, before)
            self.shelf.put(name, stage + 1, unit.number, hidden)
            if name != "candidate":
                self.shelf.drop(name, stage, unit.number)
            elif survey.nonfinite is None and not torch.isfinite(hidden[real]).all():
                survey.nonfinite = stage
        choices = self.base.chosen, self.candidate.chosen
        return _same_experts(*choices, real) if choices[0] is not None else None

    def _run(
        self, model: StreamedModel, stage: int, ids: torch.Tensor, hidden: torch.Tensor
    ) -> torch.Tensor:
        if stage:
            self.meter.spent += ids.numel()
        if self.options.progress is not None:
            total = int(LIMIT * self.meter.gate)
            self.options.progress(min(self.meter.spent, total), total)
        return model.run(stage, ids, hidden)

    def _scored(self, track: str, model: StreamedModel) -> dict[int, UnitScores]:
        return {
            unit.number: self._score(unit, model, self.shelf.get(track, self.head, unit.number))
            for unit in self.plan.units
            if self.inputs[unit.number][0].numel()
        }

    def _score(self, unit: Unit, model: StreamedModel, hidden: torch.Tensor) -> UnitScores:
        """Return the scores of hidden states before the head, in lockstep with the base."""
        base_hidden = self.shelf.get("base", self.head, unit.number)

        def head_of(which: StreamedModel, before: torch.Tensor) -> Any:
            def forward(input_ids: torch.Tensor, **_: Any) -> Any:
                return SimpleNamespace(logits=self._run(which, self.head, input_ids, before))

            return forward

        job = self.plan.options.job(model.checkpoint.uri)
        heads = head_of(model, hidden), head_of(self.base, base_hidden)
        return score_windows(*heads, job, unit, ExpertCounter())

    def _differing(self, stage: int) -> Swap:
        """Return the modules of a loaded stage whose weights are not those of plain rounding."""
        places = {p for p in self.sound.places().values() if p.stage == stage}
        return frozenset(p for p in places if not self._is_same(p))

    def _is_same(self, place: Place) -> bool:
        mine, plain = (_own(_module(m, place)) for m in (self.candidate, self.sound))
        return mine.keys() == plain.keys() and all(
            value.dtype == plain[name].dtype and torch.equal(value, plain[name])
            for name, value in mine.items()
        )

    def cost(self, swap: Swap) -> int:
        """Return how many layer passes a mixture needs for a token: from its first layer to the
        head, and the base's head.
        """
        first = max(1, min(place.stage for place in swap))
        return self.head - first + 2

    def mixtures(self, swaps: Sequence[Swap], units: Collection[Unit]) -> list[dict[int, float]]:
        """Return the sum of KL(base || mixture) over each unit's tokens, nats, for every swap."""
        if not swaps:
            return []
        states: dict[tuple[int, int], torch.Tensor] = {}
        firsts = [min(place.stage for place in swap) for swap in swaps]
        for stage in range(min(firsts), self.head):
            with self.candidate.loaded(stage), self._sound_if_needed(stage, swaps):
                for number, swap in enumerate(swaps):
                    if stage >= firsts[number]:
                        self._advance_mixture(states, (number, swap), stage, units)
        sums = []
        for number, swap in enumerate(swaps):
            with self._put_back(swap, self.head):
                sums.append(
                    {
                        unit.number: float(self._mixture_kl(states, number, unit).sum())
                        for unit in units
                    }
                )
        return sums

    def _sound_if_needed(self, stage: int, swaps: Sequence[Swap]) -> Any:
        needed = any(place.stage == stage for swap in swaps for place in swap)
        return self.sound.loaded(stage) if needed else ExitStack()

    def _advance_mixture(
        self,
        states: dict[tuple[int, int], torch.Tensor],
        numbered: tuple[int, Swap],
        stage: int,
        units: Collection[Unit],
    ) -> None:
        number, swap = numbered
        with self._put_back(swap, stage):
            for unit in units:
                key = (number, unit.number)
                hidden = states.get(key)
                if hidden is None and stage:
                    hidden = self.shelf.get("candidate", stage, unit.number)
                ids, _ = self.inputs[unit.number]
                before = torch.zeros(0) if hidden is None else hidden
                states[key] = self._run(self.candidate, stage, ids, before)

    def _mixture_kl(
        self, states: Mapping[tuple[int, int], torch.Tensor], number: int, unit: Unit
    ) -> Any:
        hidden = states.get((number, unit.number))
        if hidden is None:
            hidden = self.shelf.get("candidate", self.head, unit.number)
        return self._score(unit, self.candidate, hidden).arrays["kl"]

    @contextmanager
    def _put_back(self, swap: Swap, stage: int) -> Iterator[None]:
        """Give the candidate's modules of a stage the plainly rounded weights of the base."""
        before = []
        for place in swap:
            if place.stage == stage:
                mine, plain = _module(self.candidate, place), _module(self.sound, place)
                before.append((mine, dict(mine._parameters), dict(mine._buffers)))
                mine._parameters.update(plain._parameters)
                mine._buffers.update(plain._buffers)
        try:
            yield
        finally:
            for module, parameters, buffers in before:
                module._parameters.update(parameters)
                module._buffers.update(buffers)

    def activation_noise(self) -> dict[str, float]:
        """Return the SQNR, dB, of the declared rounding of each module's input that the text
        reached, by hub name. Modules that share an input are measured once.
        """
        return {
            name: decibels(*rounding.powers)
            for name, rounding in self.activations.items()
            if rounding.powers[0] > 0 and math.isfinite(rounding.powers[0])
        }


def _inputs(unit: Unit) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a unit's token ids, int64 [windows, tokens], and which are not padding."""
    windows = [window for window in unit.windows if len(window[0]) > 1]
    return padded(windows, "cpu") if windows else (torch.zeros((0, 0)), torch.zeros((0, 0)))


def _module(model: StreamedModel, place: Place) -> Any:
    return model.root(place.stage).get_submodule(place.module)


def _own(module: Any) -> dict[str, torch.Tensor]:
    """Return a module's own parameters and buffers."""
    return {
        name: value
        for name, value in (*module._parameters.items(), *module._buffers.items())
        if value is not None
    }


def _same_experts(
    base: torch.Tensor | None, candidate: torch.Tensor | None, real: torch.Tensor
) -> tuple[int, int] | None:
    """Return how many tokens have the same set of experts, and how many there are."""
    if base is None or candidate is None or base.shape != candidate.shape:
        return None
    if base.shape[0] != real.numel():
        return None
    kept = real.reshape(-1)
    same = (base.sort(-1).values == candidate.sort(-1).values).all(-1)[kept]
    return int(same.sum()), int(kept.sum())
