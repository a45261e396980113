# SPDX-License-Identifier: Apache-2.0
"""The gate: score base and candidate on the same text, compare document by document, decide."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from verifier.checkpoint import Checkpoint, local_directory, open_checkpoint
from verifier.errors import UsageError
from verifier.gate.attempts import Attempts
from verifier.gate.cache import cached_run
from verifier.gate.comparison import compare_runs, refuse_other_floor
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import drift_margin_of, margin_of
from verifier.gate.jobs import HF, Array, Job, Scorer
from verifier.gate.result import GateResult
from verifier.gate.run_file import Run, read_run, refuse_unlike_keys
from verifier.gate.score import (
    Progress,
    assemble,
    formats_of,
    run_of,
    score_all,
    score_pieces,
    weights_digest,
)
from verifier.gate.scorers.lm_eval_task import is_task, kind_of, task_corpus
from verifier.gate.windows import (
    Protocol,
    fits_twice,
    floor_units,
    plan_jobs,
    plan_units,
    share,
    tokenizer_digest,
    workers_of,
)

__all__ = [
    "BATCH",
    "TOP_K",
    "GateResult",
    "KlChoice",
    "Protocol",
    "formats_of",
    "plan_jobs",
    "refuse_same",
    "run",
    "score_all",
    "score_apart",
    "tokenizer_digest",
    "weights_digest",
]
PathLike = str | os.PathLike[str]
KlChoice = Literal["auto", "lockstep", "top-k", "off"]
BATCH = 8
TOP_K = 64


def run(
    candidate: PathLike,
    *,
    base: PathLike,
    corpus: str | None = None,
    protocol: str = "tokens",
    max_increase: str | float | None = None,
    window: int = 512,
    documents: int | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    workers: int | None = None,
    progress: Progress | None = None,
    kl: KlChoice = "auto",
    cache: PathLike | None = None,
    drift_against: PathLike | None = None,
    max_drift: str | float | None = None,
    say: Callable[[str], None] | None = None,
    scorer: Scorer = HF,
    metric: str | None = None,
    floor: Sequence[PathLike] = (),
) -> GateResult:
    """Compare a candidate with its base on a corpus.

    Args:
        candidate: folder of the quantized checkpoint.
        base: folder of its reference; a quantized one is decoded.
        corpus: ``wikitext2-test``, or a file.
        protocol: ``tokens`` (windows of the model's own tokens), ``lm-eval`` (its ``wikitext``
            task), or another task of lm-eval by its name or YAML file; a task has its own documents
            and takes no ``corpus``.
        max_increase: ``8%`` of perplexity or nats a token; by default the budget of the candidate's
            formats. Of a task, points of accuracy: ``1%`` or ``0.01``; there is no default.
        window: tokens in a window (``lm-eval``: ``max_length``), at least 2.
        documents: score the first so many documents only.
        device: where the models run.
        batch: windows at a time.
        workers: processes; by default one a processor on CPU (at most 4), one elsewhere. They
            change no bit.
        progress: called with (done, total) windows or documents.
        kl: ``lockstep`` (both models in each process), ``top-k`` (a lower bound from both runs),
            ``off``; ``auto`` is lockstep where both fit in memory and there is no cache, else
            top-k.
        cache: folder for the base's run, for what is done of an interrupted one, and for attempts;
            none by default.
        drift_against: file of an accepted run, to judge the drift against as well.
        max_drift: its margin, 0.003 nats by default.
        say: called with what a person should know before the result.
        scorer: what turns tokens into log-probabilities, for both.
        metric: which metric of a task says right or wrong; its first by default.
        floor: files of runs of the base that other engines scored: the noise floor is at least what
            separates them.

    Raises:
        UsageError: the candidate is the base, a floor run is not the base's, an option out of
            range, no such corpus, another attempt after a failed one.
        ContentError: a checkpoint cannot be scored, or their tokenizers differ.
    """
    if (
        window < 2
        or batch < 1
        or (documents is not None and documents < 1)
        or (workers is not None and workers < 1)
    ):
        raise UsageError("window is at least 2, batch, documents and workers at least 1")
    kind = check_scorer(scorer, protocol)
    refuse_corpus(protocol, corpus, metric)
    if max_drift is not None and drift_against is None:
        raise UsageError("--max-drift needs --drift-against RUN")
    candidate, base = local_directory(candidate), local_directory(base)
    ckpt, reference = open_checkpoint(candidate), open_checkpoint(base)
    refuse_same(ckpt, reference)
    task = kind == "task"
    margin, drift_margin = (
        margin_of(max_increase, formats_of(ckpt), task=task),
        drift_margin_of(max_drift, task=task),
    )
    accepted = read_run(drift_against) if drift_against is not None else None
    found = corpus_of(protocol, corpus, metric).head(documents)
    key, _ = plan_units(
        [reference, ckpt], found, kind, window, batch, scorer
    )  # told before any model runs
    if accepted is not None:
        refuse_unlike_keys(accepted.header.model, accepted.header.key, ckpt.uri, key)
    floors = [read_run(file) for file in floor]
    for noise in floors:
        refuse_other_floor(noise, reference.uri, weights_digest(reference), key)
    attempts = Attempts(Path(cache)) if cache is not None else None
    looks = (
        attempts.looks(ckpt, reference, found, window, series_of(kind, scorer, found))
        if attempts
        else 1
    )
    if kl == "lockstep" and scorer.name != "hf":
        raise UsageError(
            f"--kl lockstep runs both models in one process; with --scorer {scorer.name} there is top-k"
        )
    chosen = _kl_choice(
        kl, kind, reference, device, workers, cached=cache is not None or scorer.name != "hf"
    )
    divergence: Array | None = None
    if chosen == "lockstep":
        ours, theirs, divergence = _lockstep(
            ckpt, reference, found, window, batch, device, workers, progress, scorer
        )
    else:
        top_k = TOP_K if chosen == "top-k" else 0
        if cache is None:
            ours, theirs = score_apart(
                ckpt,
                reference,
                found,
                kind,
                window,
                batch,
                device,
                workers,
                top_k,
                progress,
                scorer,
            )
        else:
            ours, theirs = (
                cached_run(
                    Path(cache),
                    c,
                    found,
                    protocol=kind,
                    window=window,
                    batch=batch,
                    device=device,
                    workers=workers,
                    top_k=top_k,
                    progress=progress,
                    say=say,
                    keep=c is reference,
                    scorer=scorer,
                )
                for c in (ckpt, reference)
            )
    result = compare_runs(
        theirs,
        ours,
        margin,
        drift_against=accepted,
        drift_margin=drift_margin,
        kl=divergence,
        looks=looks,
        floor_runs=floors,
    )
    if attempts:
        seconds = ours.header.seconds + theirs.header.seconds
        attempts.record(
            ckpt, reference, found, window, series_of(kind, scorer, found), result, seconds
        )
    return result


def series_of(protocol: str, scorer: Scorer, corpus: Corpus) -> str:
    """Return what attempts at one pair share beside the window: another rounding or task is another
    question.
    """
    task = [corpus.task.name, corpus.task.metric, corpus.task.filter] if corpus.task else []
    return "/".join([protocol, *task, *map(str, scorer.key.values())])


def corpus_of(protocol: str, corpus: str | None, metric: str | None) -> Corpus:
    """Return the documents that a protocol scores: a corpus, or those of a task.

    Raises:
        UsageError: none was given, or one for a task, which has its own; a metric for what is no
            task.
    """
    refuse_corpus(protocol, corpus, metric)
    return load_corpus(corpus) if corpus is not None else task_corpus(protocol, metric)


def refuse_corpus(protocol: str, corpus: str | None, metric: str | None) -> None:
    """Refuse a protocol, corpus and metric that do not go together.

    Raises:
        UsageError: no corpus, or one for a task, which has its own; a metric for what is no task.
    """
    if is_task(protocol):
        if corpus is not None:
            raise UsageError(
                f"no protocol {protocol!r} over a corpus: tokens or lm-eval; a task of lm-eval has its own documents, leave "
                "out --corpus"
            )
    elif metric is not None:
        raise UsageError("--metric is for a task of lm-eval")
    elif corpus is None:
        raise UsageError(f"the protocol {protocol} needs --corpus NAME|FILE")


def check_scorer(scorer: Scorer, protocol: str) -> Protocol:
    """Return the kind of a protocol, and refuse a scorer that cannot score a pair under it.

    Raises:
        UsageError: naming the option.
    """
    scorer.check()
    if scorer.name == "server":
        raise UsageError(
            "a server has one model: `ckptgate score` base and candidate, each where it is served, then `ckptgate compare`"
        )
    if scorer.name != "hf" and protocol != "tokens":
        raise UsageError(f"--scorer {scorer.name} is for the protocol tokens")
    return kind_of(protocol)


def refuse_same(candidate: Checkpoint, base: Checkpoint) -> None:
    """Refuse a candidate that is the base: by path, or byte for byte.

    Raises:
        UsageError: they are the same checkpoint.
    """
    same = "://" not in candidate.uri and Path(candidate.uri).resolve() == Path(base.uri).resolve()
    ours, theirs = candidate.tensors, base.tensors
    if not same and ours.keys() == theirs.keys():
        same = all(
            ours[n].dtype == theirs[n].dtype
            and np.array_equal(candidate.read(ours[n]), base.read(theirs[n]))
            for n in ours
        )
    if same:
        raise UsageError(
            f"{candidate.uri}: the candidate is the base itself; there is nothing to measure"
        )


def _kl_choice(
    given: KlChoice,
    protocol: Protocol,
    base: Checkpoint,
    device: str,
    workers: int | None,
    *,
    cached: bool,
) -> KlChoice:
    if given not in ("auto", "lockstep", "top-k", "off"):
        raise UsageError(f"no such way to a KL divergence: {given!r}; auto, lockstep, top-k or off")
    if protocol != "tokens":
        if given in ("lockstep", "top-k"):
            raise UsageError(
                f"--kl {given} needs the protocol tokens; {protocol} gives sums of documents only"
            )
        return "off"
    if given == "lockstep" and cached:
        raise UsageError(
            "--kl lockstep runs both models side by side and cannot use a cached run; give one of them up"
        )
    if given != "auto":
        return given
    return (
        "lockstep"
        if not cached and fits_twice(base, device, workers_of(device, workers))
        else "top-k"
    )


def _lockstep(
    ckpt: Checkpoint,
    reference: Checkpoint,
    corpus: Corpus,
    window: int,
    batch: int,
    device: str,
    workers: int | None,
    progress: Progress | None,
    scorer: Scorer,
) -> tuple[Run, Run, Array]:
    started = time.monotonic()
    key, units = plan_units([reference, ckpt], corpus, "tokens", window, batch, scorer)
    again = floor_units(units, batch)
    job = Job(
        ckpt.uri, device, "tokens", batch, window, len(corpus), base=reference.uri, scorer=scorer
    )
    shares = share(job, [*units, *again], workers_of(device, workers))
    (pieces,), (environment,) = score_pieces([shares], device, workers, progress, [None])
    seconds = round((time.monotonic() - started) / 2, 3)
    ours, theirs = (
        run_of(
            c, corpus, key, units, pieces, environment, again=again, prefix=prefix, seconds=seconds
        )
        for c, prefix in ((ckpt, ""), (reference, "base_"))
    )
    return ours, theirs, assemble(units, pieces, len(corpus)).get("kl", np.zeros(0))


def score_apart(
    ckpt: Checkpoint,
    reference: Checkpoint,
    corpus: Corpus,
    protocol: Protocol,
    window: int,
    batch: int,
    device: str,
    workers: int | None,
    top_k: int,
    progress: Progress | None,
    scorer: Scorer = HF,
) -> tuple[Run, Run]:
    """Score candidate and base in processes of their own, at the same time; return their runs in
    this order.
    """
    started = time.monotonic()
    key, units = plan_units([reference, ckpt], corpus, protocol, window, batch, scorer)
    again, slices = floor_units(units, batch), max(1, workers_of(device, workers, scorer) // 2)
    pair, given = (ckpt, reference), {"top_k": top_k, "scorer": scorer, "task": corpus.task}
    jobs = [
        share(Job(c.uri, device, protocol, batch, window, len(corpus), **given), work, slices)  # type: ignore[arg-type]
        for c, work in zip(pair, (units, [*units, *again]), strict=True)
    ]
    pieces, environments = score_pieces(jobs, device, workers, progress, [None, None])
    seconds = round((time.monotonic() - started) / 2, 3)
    ours, theirs = (
        run_of(c, corpus, key, units, p, e, again=a, seconds=seconds)
        for c, p, e, a in zip(pair, pieces, environments, ((), again), strict=True)
    )
    return ours, theirs
