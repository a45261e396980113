# SPDX-License-Identifier: Apache-2.0
"""The gate: score base and candidate on the same text, compare document by document, decide."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from verifier.checkpoint import Checkpoint, local_directory, open_checkpoint
from verifier.errors import UsageError
from verifier.evaluation import GateResult, Margin
from verifier.gate.attempts import Attempts, Pair
from verifier.gate.cache import Cached
from verifier.gate.comparison import compare_runs, require_floor_run, require_top_tokens
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import drift_margin_of, kl_margin_of, kl_ratio_of, margin_of
from verifier.gate.jobs import HF, Scorer, protocol_of
from verifier.gate.measures import top_k_of
from verifier.gate.options import (
    BATCH,
    SEQ_LEN,
    GateOptions,
    KlChoice,
    PathLike,
    Say,
    ScoringOptions,
    silent,
)
from verifier.gate.run_file import Run, read_run, require_same_key
from verifier.gate.score import Strategy, apart, format_parameters, lockstep, score
from verifier.gate.scorers.lm_eval_task import task_corpus
from verifier.gate.windows import fits_twice, plan_scoring
from verifier.progress import Progress

TOP_K = 64
"""How many top tokens of both runs a lower bound of KL is computed from."""
_SCORING = frozenset({"seq_len", "batch", "device", "workers", "scorer", "progress"})


def run(
    candidate: PathLike,
    *,
    base: PathLike,
    corpus: str | None = None,
    protocol: str = "tokens",
    max_increase: str | float | None = None,
    seq_len: int = SEQ_LEN,
    documents: int | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    workers: int | None = None,
    progress: Progress | None = None,
    kl: KlChoice = "auto",
    cache: PathLike | None = None,
    drift_against: PathLike | None = None,
    max_drift: str | float | None = None,
    say: Say | None = None,
    scorer: Scorer = HF,
    metric: str | None = None,
    floor: Sequence[PathLike] = (),
    window: int | None = None,
    max_kl: str | float | None = None,
) -> GateResult:
    """Compare a candidate with its base on a corpus.

    Args:
        candidate: directory of the quantized checkpoint.
        base: directory of its reference; a quantized one is decoded.
        corpus: ``wikitext2-test``, or a file.
        protocol: ``tokens`` (windows of the model's own tokens), ``lm-eval`` (its ``wikitext``
            task), or another task of lm-eval by its name or YAML file; a task has its own documents
            and takes no ``corpus``.
        max_increase: ``8%`` of perplexity, or nats per token; by default the budget of the
            candidate's formats. For a task, points of accuracy: ``1%`` or ``0.01``; there is no
            default.
        seq_len: tokens in a window (``lm-eval``: ``max_length``), at least 2.
        documents: score only the first so many documents.
        device: where the models run.
        batch: windows at a time.
        workers: processes; by default one per CPU (at most 4), or one on another device. They
            change no bit of a result.
        progress: called with (done, total, detail) documents, of both checkpoints.
        kl: ``lockstep`` (both models in each process), ``top-k`` (a lower bound from both runs),
            ``off``; ``auto`` is lockstep where both fit in memory and there is no cache, else
            top-k.
        cache: directory for the base's run, for unfinished work, and for attempts; none by default.
        drift_against: file of an accepted run, to evaluate the drift as well.
        max_drift: its margin: a ratio of KL divergences from the base like ``1.15x``, the default,
            or a loss over the accepted run in nats; a run without top tokens, and a task, has only
            the loss, 0.003 by default.
        say: called with messages for the user.
        scorer: what turns tokens into log-probabilities, for both.
        metric: which metric of a task marks answers right or wrong; its first by default.
        floor: files of runs of the base that other engines scored: the noise floor is at least what
            they differ by.
        window: the former name of ``seq_len``.
        max_kl: the largest tolerated KL(base || candidate), nats per token; by default twice the
            default budget of the candidate's formats.

    Raises:
        UsageError: the candidate is the base, a floor run is not the base's, an option out of
            range, no such corpus, another attempt after a failed one.
        ContentError: a checkpoint cannot be scored, or their tokenizers differ.
    """
    return run_gate(
        candidate,
        base,
        gate_options(
            corpus=corpus,
            protocol=protocol,
            max_increase=max_increase,
            seq_len=seq_len,
            documents=documents,
            device=device,
            batch=batch,
            workers=workers,
            progress=progress,
            kl=kl,
            cache=cache,
            drift_against=drift_against,
            max_drift=max_drift,
            say=say,
            scorer=scorer,
            metric=metric,
            floor=floor,
            window=window,
            max_kl=max_kl,
        ),
    )


def gate_options(
    *,
    corpus: str | None = None,
    protocol: str = "tokens",
    metric: str | None = None,
    documents: int | None = None,
    say: Say | None = None,
    window: int | None = None,
    **options: Any,
) -> GateOptions:
    """Return the options that the keywords of `run` stand for, checked.

    Raises:
        UsageError: an option is out of range, or does not go with another one.
    """
    if documents is not None and documents < 1:
        raise UsageError("documents must be at least 1")
    options = renamed_window(options, window)
    scoring = {name: options.pop(name) for name in _SCORING & options.keys()}
    text = corpus_of(protocol, corpus, metric).head(documents)
    made = GateOptions(
        ScoringOptions(text, protocol_of(protocol), say=say or silent, **scoring), **options
    )
    made.check()
    return made


def renamed_window(options: dict[str, Any], window: int | None) -> dict[str, Any]:
    """Return options with ``window``, the former name of ``seq_len``, under its present name."""
    if window is None:
        return options
    warnings.warn("window is now called seq_len", DeprecationWarning, stacklevel=4)
    return options | {"seq_len": window}


def corpus_of(protocol: str, corpus: str | None, metric: str | None) -> Corpus:
    """Return the documents that a protocol scores: a corpus, or those of a task.

    Raises:
        UsageError: no corpus, or one for a task, which has its own; a metric without a task.
    """
    if protocol_of(protocol) != "task":
        if metric is not None:
            raise UsageError("--metric needs a task of lm-eval as --protocol")
        if corpus is None:
            raise UsageError(f'--corpus is required (protocol "{protocol}")')
        return load_corpus(corpus)
    if corpus is not None:
        raise UsageError(
            f"--corpus needs the protocol tokens or lm-eval, not {protocol!r}: a task of lm-eval "
            "has its own documents"
        )
    return task_corpus(protocol, metric)


def run_gate(candidate: PathLike, base: PathLike, options: GateOptions) -> GateResult:
    """Compare a candidate with its base; see `run`."""
    pair = open_pair(candidate, base, options.scoring)
    margins = margins_of(pair, options)
    accepted = accepted_run(options)
    strategy, top_k = strategy_of(pair.base, options)
    if accepted is not None and margins.kl_ratio is not None:
        top_k = max(top_k, top_k_of(accepted))
    checkpoints = (pair.candidate, pair.base)
    plan = plan_scoring(checkpoints, replace(options.scoring, top_k=top_k))
    # Everything that can be refused is, before any model runs.
    if accepted is not None:
        require_same_key(accepted.header.model, accepted.header.key, pair.candidate.uri, plan.key)
    floor_runs = _floor_runs(pair.base, plan.key, options)
    terms = terms_of(pair.base, options, accepted, floor_runs)
    attempts = Attempts(Path(options.cache)) if options.cache is not None else None
    look = attempts.look(pair, margins.decisive, terms) if attempts is not None else None
    scored = score(plan, strategy)
    candidate_run, base_run = scored.runs
    result = compare_runs(
        base_run,
        candidate_run,
        margins.loss,
        drift_against=accepted,
        drift_margin=margins.drift,
        kl=scored.kl,
        looks=look.number if look is not None else None,
        floor_runs=floor_runs,
        kl_margin=margins.kl,
        max_kl_ratio=margins.kl_ratio,
        base_record=look.base_record if look is not None else None,
    )
    if attempts is None or look is None:
        return result
    result = replace(result, notes=(*look.notes, *result.notes))
    seconds = candidate_run.header.seconds + base_run.header.seconds
    attempts.record(pair, result, seconds, margins.decisive, terms)
    return result


def open_pair(candidate: PathLike, base: PathLike, options: ScoringOptions) -> Pair:
    """Open a candidate and its base.

    Raises:
        UsageError: they are the same checkpoint, or one does not exist.
        ContentError: one is not a checkpoint.
    """
    candidate, base = local_directory(candidate), local_directory(base)
    pair = Pair(open_checkpoint(candidate), open_checkpoint(base), options)
    if _same(pair.candidate, pair.base):
        raise UsageError(f"{pair.candidate.uri}: the candidate is the base itself")
    return pair


def _same(candidate: Checkpoint, base: Checkpoint) -> bool:
    """Whether two checkpoints are one, by path or byte for byte."""
    local = "://" not in candidate.uri
    if local and Path(candidate.uri).resolve() == Path(base.uri).resolve():
        return True
    tensors, base_tensors = candidate.tensors, base.tensors
    return tensors.keys() == base_tensors.keys() and all(
        tensor.dtype == base_tensors[name].dtype
        and np.array_equal(candidate.read(tensor), base.read(base_tensors[name]))
        for name, tensor in tensors.items()
    )


@dataclass(frozen=True)
class Margins:
    """What a gate tolerates: of the loss over the base, of the drift as a loss over an accepted run
    and as a ratio of KL divergences, and of KL(base || candidate); None where it does not decide.
    """

    loss: Margin
    drift: Margin
    kl_ratio: Margin | None = None
    kl: Margin | None = None

    @property
    def decisive(self) -> list[Margin]:
        """All of them, the loss first."""
        return [self.loss, self.drift, *filter(None, (self.kl_ratio, self.kl))]


def margins_of(pair: Pair, options: GateOptions) -> Margins:
    """Return the margins of a gate: as given, or the defaults of the candidate's formats.

    Raises:
        UsageError: an option is not a margin, or has no default.
    """
    task = options.scoring.protocol == "task"
    parameters = format_parameters(pair.candidate)
    return Margins(
        margin_of(options.max_increase, parameters, task=task),
        drift_margin_of(options.max_drift, task=task),
        None if task else kl_ratio_of(options.max_drift),
        None if task else kl_margin_of(options.max_kl, parameters),
    )


def terms_of(
    base: Checkpoint, options: GateOptions, accepted: Run | None, floor_runs: Sequence[Run] = ()
) -> list[str]:
    """Return what decides a gate besides its margins: how KL is computed, and the runs that drift
    and noise are measured from. A gate without them is another look, not the same one.
    """
    runs = [accepted, *floor_runs]
    return [_kl_choice(base, options), *(run.header.weights_sha256 if run else "" for run in runs)]


def accepted_run(options: GateOptions) -> Run | None:
    """Return the run to measure drift from; None where there is none.

    Raises:
        UsageError: no such file, or a ratio of KL divergences is the margin and it has no top
            tokens.
        ContentError: it is not a run.
    """
    if options.drift_against is None:
        return None
    run = read_run(options.drift_against)
    require_top_tokens(options.max_drift, [run])
    return run


def _floor_runs(base: Checkpoint, key: dict[str, Any], options: GateOptions) -> list[Run]:
    runs = [read_run(file) for file in options.floor]
    for run in runs:
        require_floor_run(run, base.uri, base.weights_sha256, key)
    return runs


def strategy_of(base: Checkpoint, options: GateOptions) -> tuple[Strategy, int]:
    """Return how a pair is scored, and how many top tokens are kept for KL."""
    kl = _kl_choice(base, options)
    if kl == "lockstep":
        return lockstep, 0
    strategy = Cached(Path(options.cache)) if options.cache is not None else apart
    return strategy, TOP_K if kl == "top-k" else 0


def _kl_choice(base: Checkpoint, options: GateOptions) -> KlChoice:
    scoring = options.scoring
    if scoring.protocol != "tokens":
        return "off"
    if options.kl != "auto":
        return options.kl
    together = options.cache is None and scoring.scorer.name == "hf"
    fits = together and fits_twice(base, scoring.device, scoring.processes)
    return "lockstep" if fits else "top-k"
