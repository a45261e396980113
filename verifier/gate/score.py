# SPDX-License-Identifier: Apache-2.0
"""One road to a scored run: plan the units, score them by a strategy, put them together.

Strategies differ in who scores which units and what is kept on the way: `apart`, `lockstep`,
`Journaled`, `PerRank`, and `verifier.gate.cache.Cached`. None changes a bit of a run.
"""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from verifier import __version__
from verifier.checkpoint import Checkpoint
from verifier.errors import MachineError, UsageError
from verifier.gate.corpora import Corpus, document_digests
from verifier.gate.identity import identity_of
from verifier.gate.jobs import HF, Array, Job, Protocol, Scorer, Unit, UnitScores
from verifier.gate.journal import Journal, units_in
from verifier.gate.meter import ModelMeter, report, report_start
from verifier.gate.options import BATCH, SEQ_LEN, Say, ScoringOptions, silent
from verifier.gate.run_file import COMPLETION, PER_TOKEN, TOP, Run, RunHeader, sums_of
from verifier.gate.scorers.dispatch import score_job
from verifier.gate.statistics import ratio
from verifier.gate.windows import ScoringPlan, plan_scoring, share, slices_of
from verifier.layouts.expert_stacks import unstacked
from verifier.processes import spawned
from verifier.progress import Progress, no_progress
from verifier.quantized import config_value
from verifier.schemes import gather, role

UNQUANTIZED = "unquantized"
"""What `format_parameters` calls the linear layers without a format."""
_LINEAR = frozenset({"routed_expert", "shared_expert", "attention", "mlp"})
"""The roles whose unquantized weights count: embeddings, heads, routers and norms are not quantized
by the recipes that the budgets are from."""
_DIED = "a scoring process died ({how}); is there enough memory for the model?"


@dataclass(frozen=True)
class Scored:
    """The runs of some checkpoints, in their order; ``kl`` is KL(base || candidate) of each token,
    nats, where both were scored in lockstep.
    """

    runs: tuple[Run, ...]
    kl: Array | None = None


@dataclass(frozen=True)
class ModelJobs:
    """The jobs of one model, or of two in lockstep, and how far they are."""

    jobs: Sequence[Job]
    meter: ModelMeter


@dataclass
class JobScores:
    """The scores of one checkpoint's units, by number, and the environment of those who scored."""

    units: dict[int, UnitScores] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


Strategy = Callable[[ScoringPlan], Scored | None]
"""Scores a plan; None where another rank has units left."""


def apart(plan: ScoringPlan) -> Scored:
    """Score each checkpoint in processes of its own, all at the same time."""
    started, options = time.monotonic(), plan.options
    workers = max(1, options.processes // len(plan.checkpoints))
    # The noise floor is the base's.
    units = [plan.units] * (len(plan.checkpoints) - 1) + [plan.all_units]
    models = [
        ModelJobs(share(options.job(ckpt.uri), its_units, workers), ModelMeter(name, its_units))
        for ckpt, its_units, name in zip(plan.checkpoints, units, plan.models, strict=True)
    ]
    scores = score_jobs(models, options, options.processes)
    seconds = _since(started, len(plan.checkpoints))
    return Scored(
        tuple(
            run_of(plan, ckpt, its_scores, seconds)
            for ckpt, its_scores in zip(plan.checkpoints, scores, strict=True)
        )
    )


def lockstep(plan: ScoringPlan) -> Scored:
    """Score a candidate and its base side by side in each process, which gives the exact KL
    divergence.
    """
    started, options = time.monotonic(), plan.options
    candidate, base = plan.checkpoints
    job = options.job(candidate.uri, base=base.uri)
    jobs = share(job, plan.all_units, options.processes)
    meter = ModelMeter(" and ".join(plan.models), plan.all_units)
    (scores,) = score_jobs([ModelJobs(jobs, meter)], options, options.processes)
    seconds = _since(started, 2)
    runs = (
        run_of(plan, candidate, scores, seconds),
        run_of(plan, base, scores, seconds, prefix="base_"),
    )
    arrays = assemble(plan.units, scores.units, len(options.corpus))
    return Scored(runs, arrays.get("kl", np.zeros(0)))


@dataclass(frozen=True)
class Journaled:
    """Keep finished units in a file until the run is complete; a run that finds them resumes."""

    file: Path

    def __call__(self, plan: ScoringPlan) -> Scored:
        """Score the plan's one checkpoint.

        Raises:
            UsageError: another process is writing this run.
        """
        started, options = time.monotonic(), plan.options
        (ckpt,) = plan.checkpoints
        with Journal(self.file, _journal_header(plan, ckpt)) as journal:
            if journal.restarted:
                options.say(f"{self.file}: from another run or version; scoring from scratch")
            if journal.done:
                options.say(
                    f"{self.file}: {len(journal.done)} of {len(plan.all_units)} units are done; "
                    "resuming"
                )
            scores = _score_left(plan.all_units, plan, journal, options.processes)
        return Scored((run_of(plan, ckpt, scores, _since(started)),))


@dataclass(frozen=True)
class PerRank:
    """Score this rank's share of the units into a journal of its own (torchrun).

    Every rank that finds all journals complete returns the run.
    """

    file: Path
    rank: int
    ranks: int

    def __call__(self, plan: ScoringPlan) -> Scored | None:
        """Score this rank's share of the plan's one checkpoint; None where another rank has units
        left.
        """
        started = time.monotonic()
        (ckpt,) = plan.checkpoints
        header = _journal_header(plan, ckpt)
        files = [
            self.file.with_name(f"{self.file.name}.{rank}-of-{self.ranks}")
            for rank in range(self.ranks)
        ]
        with Journal(files[self.rank], header) as journal:
            mine = plan.all_units[self.rank :: self.ranks]
            workers = plan.options.workers or 1
            environment = _score_left(mine, plan, journal, workers).environment
        # What a rank wrote is synced before it looks: the last one to finish sees all.
        scores = JobScores(environment=environment)
        for file in files:
            scores.units |= units_in(file, header)
        if any(unit.number not in scores.units for unit in plan.all_units):
            return None
        return Scored((run_of(plan, ckpt, scores, _since(started)),))


def score(plan: ScoringPlan, strategy: Strategy = apart) -> Scored:
    """Score all of a plan.

    Args:
        plan: what is scored, from `plan_scoring`.
        strategy: who scores which units, and what is kept on the way.

    Raises:
        UsageError: another process is writing this run.
        ContentError: a checkpoint cannot be scored.
        MachineError: a process died, or a unit is missing.
    """
    scored = strategy(plan)
    if scored is None:
        raise MachineError("a unit of work was lost")
    return scored


def score_run(
    ckpt: Checkpoint,
    corpus: Corpus,
    *,
    protocol: Protocol = "tokens",
    seq_len: int = SEQ_LEN,
    batch: int = BATCH,
    device: str = "cpu",
    workers: int | None = None,
    top_k: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    say: Say | None = None,
    ranks: tuple[int, int] | None = None,
    scorer: Scorer = HF,
    window: int | None = None,
) -> Run | None:
    """Score one checkpoint; None where another rank has units left.

    Args:
        ckpt: the checkpoint.
        corpus: the documents.
        protocol: ``tokens``, ``lm-eval`` or ``task``.
        seq_len: tokens in a window.
        batch: windows in a unit of work.
        device: where the model runs.
        workers: processes; they change no bit of the result.
        top_k: log-probabilities to keep per token (0: only the top one).
        journal: where finished units are kept until the run is complete; a run that finds them
            resumes.
        progress: called with (done, total, detail) documents.
        say: called with messages for the user.
        ranks: this process's number and how many there are (torchrun): each scores its share into a
            journal of its own, and every one that finds all journals complete returns the run.
        scorer: what turns tokens into log-probabilities.
        window: the former name of ``seq_len``.

    Raises:
        UsageError: the protocol does not fit the corpus; another process is writing this run.
        ContentError: the checkpoint cannot be scored.
    """
    if window is not None:
        warnings.warn("window is now called seq_len", DeprecationWarning, stacklevel=2)
        seq_len = window
    options = ScoringOptions(
        corpus,
        protocol,
        seq_len,
        batch,
        device,
        workers,
        top_k,
        scorer,
        progress=progress,
        say=say or silent,
    )
    strategy: Strategy = apart
    if ranks is not None and journal is None:
        raise UsageError("ranks share their work through journals; give one")
    if journal is not None:
        strategy = Journaled(journal) if ranks is None else PerRank(journal, *ranks)
    scored = strategy(plan_scoring([ckpt], options))
    return scored.runs[0] if scored is not None else None


def score_jobs(
    models: Sequence[ModelJobs],
    options: ScoringOptions,
    workers: int,
    journal: Journal | None = None,
) -> list[JobScores]:
    """Run the jobs of each model, and return the scores of each.

    Args:
        models: the jobs of each.
        options: for progress.
        workers: processes at a time.
        journal: gets each unit as soon as it is scored.

    Raises:
        CkptgateError: what a scorer raised.
        MachineError: a process died.
    """
    scores = [JobScores() for _ in models]
    meters = [model.meter for model in models]
    jobs: list[Job] = []
    owners: list[int] = []
    for number, model in enumerate(models):
        with_units = [job for job in model.jobs if job.units]
        jobs += with_units
        owners += [number] * len(with_units)
    units = [{unit.number: unit for unit in job.units} for job in jobs]
    progress = options.progress or no_progress

    def on_unit(job: int, unit: UnitScores) -> None:
        scores[owners[job]].units[unit.unit] = unit
        if journal is not None:
            journal.add(unit)
        scored = units[job][unit.unit]
        options.on_unit(len(scored))
        meters[owners[job]].add(scored)
        report(meters, progress)

    report_start(meters, progress)
    environments = spawned(score_job, jobs, workers, on_unit, _DIED)
    for owner, environment in zip(owners, environments, strict=True):
        scores[owner].environment |= environment
    return scores


def _score_left(
    units: Sequence[Unit], plan: ScoringPlan, journal: Journal, workers: int
) -> JobScores:
    """Score what a journal does not have, and return all of it."""
    (ckpt,) = plan.checkpoints
    # The last unit is scored even where the journal has it: only this process can tell its
    # environment.
    left = [u for u in units if u.number not in journal.done] or plan.all_units[-1:]
    jobs = share(plan.options.job(ckpt.uri), left, workers)
    meter = ModelMeter(plan.model, units, journal.done)
    (scores,) = score_jobs([ModelJobs(jobs, meter)], plan.options, workers, journal)
    return JobScores(journal.done | scores.units, scores.environment)


def _since(started: float, checkpoints: int = 1) -> float:
    return round((time.monotonic() - started) / checkpoints, 3)


def _journal_header(plan: ScoringPlan, ckpt: Checkpoint) -> dict[str, Any]:
    """Return what a journal must share with a run that resumes from it."""
    return {
        "ckptgate_journal": __version__,
        **asdict(identity_of(ckpt)),
        "key": plan.key,
        "device": plan.options.device.partition(":")[0],
        **scoring_identity(plan.options),
    }


def scoring_identity(options: ScoringOptions) -> dict[str, Any]:
    """Return what changes the bits of a run besides weights, protocol key and device."""
    return {
        "batch": options.batch,
        "top_k": options.top_k,
        "versions": {package: version(package) for package in ("torch", "transformers")},
        **_scorer_identity(options.scorer),
    }


def _scorer_identity(scorer: Scorer) -> dict[str, Any]:
    if scorer == HF:
        return {}
    fields = [scorer.name, scorer.activations, scorer.python, scorer.endpoint, scorer.served]
    return {"scorer": [*fields, [*scorer.options]]}


def run_of(
    plan: ScoringPlan, ckpt: Checkpoint, scores: JobScores, seconds: float, prefix: str = ""
) -> Run:
    """Return the run that finished units make; ``prefix`` selects the base's arrays of a
    lockstep.

    Raises:
        MachineError: a unit is missing.
    """
    corpus = plan.options.corpus
    arrays = assemble(plan.units, scores.units, len(corpus), prefix)
    arrays.pop("kl", None)
    header = RunHeader(
        model=ckpt.uri,
        **asdict(identity_of(ckpt)),
        formats=sorted(formats_of(ckpt)),
        key=plan.key,
        environment=scores.environment,
        documents=document_digests(corpus),
        groups=list(corpus.group_numbers),
        parameters=format_parameters(ckpt),
        vocab_size=config_value(ckpt.config, "vocab_size"),
        chance=corpus.task.chance if corpus.task is not None else None,
        sampled_from=corpus.sampled_from,
        nonfinite=_nonfinite(scores.units.values(), prefix),
        seconds=seconds,
        experts={} if prefix else expert_counts(plan.units, scores.units),
        floor=floor_of(plan.units, plan.floor_units, scores.units, prefix),
    )
    return Run(header, arrays)


def formats_of(ckpt: Checkpoint) -> set[str]:
    """Return the algorithms of a checkpoint's modules, as its tensors show them."""
    modules = gather(unstacked(ckpt).tensors.values()).values()
    return {m.inferred_format.algo for m in modules if m.inferred_format}


def format_parameters(ckpt: Checkpoint) -> dict[str, int]:
    """Return how many parameters of linear layers have each format, `UNQUANTIZED` among them."""
    counts: dict[str, int] = {}
    for module in gather(unstacked(ckpt).tensors.values()).values():
        fmt, weight = module.inferred_format, module.weight
        if weight is None:
            continue
        if fmt is None and (role(module.name) not in _LINEAR or len(weight.shape) < 2):
            continue
        name = fmt.algo if fmt is not None else UNQUANTIZED
        elements = math.prod(module.dims) if module.dims else weight.elements
        counts[name] = counts.get(name, 0) + elements
    return counts


def assemble(
    units: Sequence[Unit], scores: dict[int, UnitScores], documents: int, prefix: str = ""
) -> dict[str, Array]:
    """Return the arrays of a run from the scores of all units, in corpus order.

    Args:
        units: the units of the run.
        scores: their scores, by number.
        documents: the documents of the corpus.
        prefix: of the arrays in ``scores`` to take.

    Raises:
        MachineError: a unit is missing.
    """
    if any(unit.number not in scores for unit in units):
        raise MachineError("a unit of work was lost")
    if units and units[0].texts:
        return _assemble_texts(units, scores, documents)
    return _assemble_tokens(units, scores, documents, prefix)


def _assemble_texts(
    units: Sequence[Unit], scores: dict[int, UnitScores], documents: int
) -> dict[str, Array]:
    sums, tokens = np.zeros(documents), np.zeros(documents, np.int64)
    for unit in units:
        places = [document for document, _ in unit.texts]
        sums[places] = scores[unit.number].arrays["nats"]
        tokens[places] = scores[unit.number].arrays["words"]
    arrays = {"sums": sums, "tokens": tokens}
    if units and all(COMPLETION[0] in scores[unit.number].arrays for unit in units):
        for name in COMPLETION:
            arrays[name] = np.concatenate([scores[unit.number].arrays[name] for unit in units])
    return arrays


def _assemble_tokens(
    units: Sequence[Unit], scores: dict[int, UnitScores], documents: int, prefix: str
) -> dict[str, Array]:
    # Each scored token's document, window by window: the first token of a window is not scored.
    owners = {place: window[1][1:] for unit in units for place, window, _ in slices_of(unit)}
    ordered = [owners[place] for place in range(len(owners))]
    starts = np.concatenate([[0], np.cumsum([len(o) for o in ordered])]).astype(np.int64)
    arrays = _empty_arrays(scores.values(), int(starts[-1]), prefix)
    for unit in units:
        for place, _, part in slices_of(unit):
            if part.stop == part.start:
                continue
            for name, whole in arrays.items():
                values = scores[unit.number].arrays[prefix + name]
                whole[starts[place] : starts[place + 1]] = values[part]
    owner = np.array(list(chain.from_iterable(ordered)), np.int64)
    arrays["tokens"] = np.bincount(owner, minlength=documents).astype(np.int64)
    arrays["sums"] = sums_of(arrays["nats"], arrays["tokens"])
    return arrays


def _empty_arrays(scores: Iterable[UnitScores], total: int, prefix: str) -> dict[str, Array]:
    """Return zeros for ``total`` tokens in every array that the scores have."""
    if not total:
        return {
            "nats": np.zeros(0, np.float32),
            "top1": np.zeros(0, np.int32),
            "sure": np.zeros(0, np.float32),
        }
    arrays: dict[str, Array] = {}
    for unit in scores:
        for full_name, values in unit.arrays.items():
            name = full_name.removeprefix(prefix)
            if full_name.startswith(prefix) and name in (*PER_TOKEN, *TOP, "kl"):
                arrays[name] = np.zeros((total, *values.shape[1:]), values.dtype)
    return arrays


def floor_of(
    units: Sequence[Unit],
    floor_units: Sequence[Unit],
    scores: dict[int, UnitScores],
    prefix: str = "",
) -> float | None:
    """Return the noise floor: the larger end, in magnitude, of the interval of one model against
    itself, nats per token; None where the floor units were not scored.
    """
    first = {place: (u.number, part) for u in units for place, _, part in slices_of(u)}
    sums: dict[int, float] = {}
    tokens: dict[int, int] = {}
    for unit in floor_units:
        if unit.number not in scores:
            return None
        for place, window, part in slices_of(unit):
            if part.stop == part.start:
                continue
            number, first_part = first[place]
            again = scores[unit.number].arrays[prefix + "nats"][part].astype(np.float64)
            difference = again - scores[number].arrays[prefix + "nats"][first_part]
            for document, value in zip(window[1][1:], difference.tolist(), strict=True):
                sums[document] = sums.get(document, 0.0) + value
                tokens[document] = tokens.get(document, 0) + 1
    if len(tokens) < 2:
        return None
    interval = ratio(np.array(list(sums.values())), np.array(list(tokens.values())))
    return max(abs(interval.low), abs(interval.high))


def expert_counts(units: Sequence[Unit], scores: dict[int, UnitScores]) -> dict[str, list[int]]:
    """Return the tokens that each expert of each layer was given."""
    counts: dict[str, Array] = {}
    for unit in units:
        for layer, its_counts in scores[unit.number].experts.items():
            counts[layer] = counts.get(layer, 0) + np.array(its_counts)
    return {layer: total.tolist() for layer, total in counts.items()}


def _nonfinite(scores: Iterable[UnitScores], prefix: str) -> list[int]:
    documents: set[int] = set()
    for unit in scores:
        documents.update(unit.nonfinite_base if prefix else unit.nonfinite)
    return sorted(documents)
