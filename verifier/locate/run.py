# SPDX-License-Identifier: Apache-2.0
"""Which layer and module of a candidate explain its KL divergence from its base."""

from __future__ import annotations

import math
import shlex
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np

from verifier.errors import ContentError, UsageError
from verifier.evaluation import Interval, Outcome
from verifier.gate.attempts import Pair
from verifier.gate.clusters import FEWEST, clusters_of
from verifier.gate.corpora import document_digests
from verifier.gate.decision import kl_ratio_of
from verifier.gate.gate import open_pair
from verifier.gate.jobs import Array, UnitScores
from verifier.gate.measures import by_document, kl_level, kl_ratio, top_k_of
from verifier.gate.options import PathLike
from verifier.gate.run_file import Run, read_run, require_same_key
from verifier.gate.score import JobScores, assemble, run_of
from verifier.gate.scorers.transformers import environment
from verifier.gate.statistics import LEVEL, log_ratio
from verifier.gate.windows import ScoringPlan, plan_scoring
from verifier.locate.options import LIMIT, LocateOptions
from verifier.locate.result import Blame, Cell, Layer, LocateResult
from verifier.locate.search import ENOUGH, Explanation, Search
from verifier.locate.sound import WeightNoise
from verifier.locate.stream import Place
from verifier.locate.tracks import Survey, Tracks

NOTHING = "every weight is that of plain rounding: there is no excess to explain"
ELSEWHERE = (
    "every weight is that of plain rounding: the excess is from what is not in the weights "
    "(config.json), or the accepted run has better scales"
)
UNEXPLAINED = (
    "putting back all modules that differ explains {:.0%} of the excess, which is not enough: it "
    "may be from what is not in the weights (config.json), or the weights were changed before they "
    "were rounded"
)
MAX_COMMANDS = 3


@dataclass(frozen=True)
class _Measured:
    """The candidate's divergence and the reference, nats per token; their ratio."""

    kl: float
    reference: float
    source: str
    ratio: Interval | None


def locate(candidate: PathLike, base: PathLike, options: LocateOptions) -> LocateResult:
    """Return which modules explain the excess of KL(base || candidate) over what plain rounding to
    the candidate's formats gives, or over an accepted run.

    Args:
        candidate: directory of the quantized checkpoint.
        base: directory of its reference; a quantized one is decoded.
        options: how.

    Raises:
        UsageError: the candidate is the base, an option out of range, no such run.
        ContentError: a checkpoint cannot be run layer by layer, or the base's logits are not
            finite.
    """
    margin = kl_ratio_of(options.max_ratio)
    if margin is None:
        raise UsageError(f"--max-ratio {options.max_ratio}: give a ratio above 1 like 1.15x")
    accepted = read_run(options.drift_against) if options.drift_against is not None else None
    if accepted is not None and not top_k_of(accepted):
        raise UsageError(
            f"{accepted.header.model} was scored without top tokens; use `ckptgate score --top-k "
            "64`"
        )
    scoring = options.scoring(top_k_of(accepted) if accepted is not None else 0)
    scoring.check()
    pair = open_pair(candidate, base, scoring)
    plan = replace(plan_scoring((pair.candidate, pair.base), scoring), floor_units=())
    if accepted is not None:
        require_same_key(accepted.header.model, accepted.header.key, pair.candidate.uri, plan.key)
    with _scratch(options) as local:
        tracks = Tracks(pair, plan, local, norm=accepted is None)
        with tracks.rounded():
            return _Locator(pair, tracks, accepted, margin.nats).result()


@contextmanager
def _scratch(options: LocateOptions) -> Iterator[LocateOptions]:
    """Give hidden states a folder of their own in the scratch directory, while the context is
    open.
    """
    if options.scratch is None:
        yield options
        return
    if not options.scratch.is_dir():
        raise UsageError(f"--scratch {options.scratch}: no such directory")
    with tempfile.TemporaryDirectory(prefix="ckptgate-locate-", dir=options.scratch) as folder:
        yield replace(options, scratch=Path(folder))


@dataclass
class _Locator:
    """One search."""

    pair: Pair
    tracks: Tracks
    accepted: Run | None
    margin: float

    @property
    def plan(self) -> ScoringPlan:
        """What is scored."""
        return self.tracks.plan

    def result(self) -> LocateResult:
        """Run all layers once, then search where there is an excess."""
        survey = self.tracks.survey()
        broken = self._nonfinite(survey)
        measured = self._measured(survey)
        outcome, notes = self._outcome(survey, measured)
        found = Explanation()
        excess = measured.kl - measured.reference
        differs = any(survey.differing.values())
        if broken is not None:
            found, outcome = self._broken(survey, broken), "failed"
            notes.append(f"hidden states are not finite after {_layer_name(broken, self.head)}")
        elif outcome != "passed" and excess > 0 and differs:
            ratio = measured.ratio.ratio if self.accepted is not None and measured.ratio else None
            found = Search(self.tracks, survey, ratio).explain()
            if outcome == "failed" and found.explained < ENOUGH:
                outcome = "inconclusive"
                notes.append(UNEXPLAINED.format(found.explained))
        elif outcome == "failed":
            outcome = "inconclusive"
            notes.append(ELSEWHERE)
        if self.tracks.meter.gates > LIMIT:
            notes.append("too few windows to stay within the budget; give more documents")
        cells, layers = self._cells(survey, found, excess), self._layers(survey, found, excess)
        return LocateResult(
            outcome,
            self.pair.candidate.uri,
            self.pair.base.uri,
            self.plan.key,
            measured.kl,
            measured.reference,
            measured.source,
            measured.ratio,
            self.margin,
            found.explained,
            self._blames(found, cells, layers, excess),
            layers,
            cells,
            round(self.tracks.meter.gates, 3),
            tuple(notes),
            environment(self.tracks.candidate.model),
        )

    @property
    def head(self) -> int:
        """The number of the last stage."""
        return self.tracks.head

    def _nonfinite(self, survey: Survey) -> int | None:
        """Return the stage after which the candidate is not finite, None where it is.

        Raises:
            ContentError: the base is not finite either.
        """
        if any(scores.nonfinite_base for scores in survey.scores.values()):
            raise ContentError(f"{self.pair.base.uri}: the base's logits are not finite")
        if any(scores.nonfinite for scores in survey.scores.values()):
            return self.head if survey.nonfinite is None else survey.nonfinite
        return None

    def _measured(self, survey: Survey) -> _Measured:
        arrays = self._assembled(survey.scores)
        clusters = clusters_of(document_digests(self.plan.options.corpus), self._groups())
        tokens = clusters.sums(arrays["tokens"])
        total = max(float(tokens.sum()), 1.0)
        sums = clusters.sums(by_document(arrays["kl"], arrays["tokens"]))
        if self.accepted is None:
            norm = self._assembled(survey.norm or {})
            plain = clusters.sums(by_document(norm["kl"], norm["tokens"]))
            ratio = log_ratio(sums, plain, tokens, kl_level(LEVEL))
            source = "plain rounding of the base to the candidate's formats"
            means = float(sums.sum()) / total, float(plain.sum()) / total
            return _Measured(*means, source, ratio)
        scores = JobScores(survey.scores, environment(self.tracks.candidate.model))
        runs = (
            run_of(self.plan, self.pair.base, scores, 0.0, prefix="base_"),
            run_of(self.plan, self.pair.candidate, scores, 0.0),
        )
        margin = kl_ratio_of(None)
        of_runs = kl_ratio(*runs, self.accepted, clusters, margin, LEVEL) if margin else None
        kl = float(sums.sum()) / total
        if of_runs is None:
            raise ContentError(f"{self.accepted.header.model}: does not differ from the base")
        return _Measured(
            kl,
            kl / of_runs.interval.ratio,
            f"the accepted run of {self.accepted.header.model}",
            of_runs.interval,
        )

    def _groups(self) -> Sequence[int]:
        return self.plan.options.corpus.group_numbers

    def _assembled(self, scores: dict[int, UnitScores]) -> dict[str, Array]:
        empty = {
            unit.number: UnitScores(unit.number, {})
            for unit in self.plan.units
            if unit.number not in scores
        }
        arrays = assemble(self.plan.units, scores | empty, len(self.plan.options.corpus))
        return {"kl": np.zeros(0)} | arrays

    def _outcome(self, survey: Survey, measured: _Measured) -> tuple[Outcome, list[str]]:
        ratio = measured.ratio
        if not any(survey.differing.values()) and measured.kl == measured.reference:
            return "passed", [NOTHING]
        if ratio is None or ratio.documents < FEWEST:
            count = ratio.documents if ratio is not None else 0
            return "inconclusive", [
                f"{count} documents: fewer than {FEWEST} show too little of how documents differ"
            ]
        if ratio.low > self.margin:
            return "failed", []
        return ("passed", []) if ratio.high <= self.margin else ("inconclusive", [])

    def _broken(self, survey: Survey, stage: int) -> Explanation:
        """Blame the modules of a stage with weights that are not finite, or all that differ."""
        by_place = self._noise()
        differing = sorted(survey.differing[stage], key=lambda place: place.module)
        bad = [p for p in differing if any(n.sqnr == -math.inf for n in by_place.get(p, ()))]
        return Explanation(blamed=bad or differing, explained=math.nan)

    def _noise(self) -> Mapping[Place, tuple[WeightNoise, ...]]:
        places = self.tracks.sound.places()
        by_place: dict[Place, tuple[WeightNoise, ...]] = {}
        for name, noise in self.tracks.sound_weights.noise.items():
            if name in places:
                place = places[name]
                by_place[place] = (*by_place.get(place, ()), noise)
        return by_place

    def _cells(self, survey: Survey, found: Explanation, excess: float) -> tuple[Cell, ...]:
        places = self.tracks.sound.places()
        noise = self._noise()
        inputs: dict[Place, float] = {}
        for name, decibels in self.tracks.activation_noise().items():
            if name in places:
                inputs[places[name]] = min(decibels, inputs.get(places[name], math.inf))
        differing = frozenset().union(*survey.differing.values())
        cells = []
        for place in sorted(set(places.values()), key=lambda p: (p.stage, p.module)):
            effect = found.places.get(place, None if place in differing else 0.0)
            cost = effect * excess if effect is not None else None
            cells.append(
                Cell(place, module_name(place), cost, noise.get(place, ()), inputs.get(place))
            )
        return tuple(cells)

    def _layers(self, survey: Survey, found: Explanation, excess: float) -> tuple[Layer, ...]:
        layers = []
        for stage, swap in survey.differing.items():
            effect = found.stages.get(stage, None if swap else 0.0)
            cost = effect * excess if effect is not None else None
            name = _layer_name(stage, self.head)
            layers.append(Layer(stage, name, survey.agreement.get(stage), cost))
        return tuple(layers)

    def _blames(
        self,
        found: Explanation,
        cells: Sequence[Cell],
        layers: Sequence[Layer],
        excess: float,
    ) -> tuple[Blame, ...]:
        by_place = {cell.place: cell for cell in cells}
        by_stage = {layer.stage: layer for layer in layers}
        blames = []
        for place in found.blamed:
            cell, share = by_place[place], found.places.get(place, math.nan)
            others = [
                c.sqnr
                for c in cells
                if c.place.module == place.module and c.place != place and c.sqnr is not None
            ]
            blames.append(
                Blame(
                    by_stage[place.stage],
                    cell,
                    share * excess,
                    share,
                    median(others) if others else None,
                    tuple(self._commands(cell)),
                )
            )
        return tuple(blames)

    def _commands(self, cell: Cell) -> Iterator[str]:
        """Yield commands that show the blocks whose error is largest."""
        worst = sorted(cell.noise, key=lambda noise: -noise.loss)
        for noise in [n for n in worst if n.sqnr < n.expected][:MAX_COMMANDS]:
            words = [
                "ckptgate",
                "show",
                self.pair.candidate.uri,
                noise.tensor,
                "--row",
                str(noise.row),
                "--block",
                str(noise.block),
                "--base",
                self.pair.base.uri,
            ]
            yield shlex.join(words)


def _layer_name(stage: int, head: int) -> str:
    if not 0 < stage < head:
        return "head" if stage else "embeddings"
    return f"layer {stage - 1}"


def module_name(place: Place) -> str:
    """Return a module's readable name: ``experts``, ``router``, ``attention q_proj``."""
    path = place.module
    if path in ("mlp.gate", "mlp.router", "block_sparse_moe.gate"):
        return "router"
    for prefix, word in _WORDS:
        if path == prefix or path.startswith(f"{prefix}."):
            return f"{word}{path.removeprefix(prefix).replace('.', ' ')}".strip()
    return path.rpartition(".")[2].replace("embed_tokens", "embeddings") or "itself"


_WORDS = (
    ("mlp.experts", "experts"),
    ("block_sparse_moe.experts", "experts"),
    ("mlp.shared_experts", "shared experts"),
    ("mlp.shared_expert", "shared expert"),
    ("self_attn", "attention"),
    ("mlp", "mlp"),
)
