# SPDX-License-Identifier: Apache-2.0
"""Score a checkpoint once: jobs in, a `Run` out, with a journal to go on from."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from verifier import __version__
from verifier.checkpoint import Checkpoint
from verifier.errors import MachineError, UsageError
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.jobs import HF, Array, Job, Piece, Scorer, Sums, Unit
from verifier.gate.journal import Journal, units_in
from verifier.gate.run_file import PER_TOKEN, TOP, Run, RunHeader, sums_of
from verifier.gate.statistics import ratio
from verifier.gate.windows import Protocol, floor_units, plan_units, share, slices_of, workers_of
from verifier.gate.worker_pool import run_jobs
from verifier.layouts.expert_stacks import unstacked
from verifier.schemes import gather

_DIGEST = "_weights_sha256"
Progress = Callable[[int, int], None]


def formats_of(ckpt: Checkpoint) -> set[str]:
    """Return the algorithms that a checkpoint's tensors show."""
    return {
        m.inferred_format.algo
        for m in gather(unstacked(ckpt).tensors.values()).values()
        if m.inferred_format
    }


def weights_digest(ckpt: Checkpoint) -> str:
    """Return a SHA-256 over name, dtype, shape and bytes of every tensor, whatever the sharding."""
    # A checkpoint is immutable, and of hundreds of gigabytes: it keeps its digest.
    known: str | None = ckpt.__dict__.get(_DIGEST)
    if known is None:
        state = hashlib.sha256()
        for name in sorted(ckpt.tensors):
            t = ckpt.tensors[name]
            state.update(f"{name}\0{t.dtype}\0{list(t.shape)}\0".encode())
            state.update(ckpt.read(t).data)
        known = ckpt.__dict__[_DIGEST] = state.hexdigest()
    return known


def identity_of(scorer: Scorer) -> dict[str, Any]:
    """Return what a journal or a cached run must share with a scorer beside the protocol key."""
    if scorer == HF:
        return {}
    return {
        "scorer": [
            scorer.name,
            scorer.activations,
            scorer.python,
            scorer.endpoint,
            scorer.served,
            [*scorer.options],
        ]
    }


def score_pieces(
    jobs: list[list[Job]],
    device: str,
    workers: int | None,
    progress: Progress | None,
    journals: Sequence[Journal | None],
) -> tuple[list[dict[int, Piece]], list[dict[str, str]]]:
    """Run the jobs of all checkpoints; return the pieces of each by unit, and its environment."""
    flat = [(group, job) for group, shares in enumerate(jobs) for job in shares if job.units]
    found: list[dict[int, Piece]] = [dict(j.done) if j else {} for j in journals]
    sizes = [{u.number: len(u) for job in shares for u in job.units} for shares in jobs]
    done, total = 0, sum(chain.from_iterable(s.values() for s in sizes))

    def emit(number: int, piece: Piece) -> None:
        nonlocal done
        group = flat[number][0]
        found[group][piece.unit] = piece
        if (journal := journals[group]) is not None:
            journal.add(piece)
        done += sizes[group][piece.unit]
        if progress is not None:
            progress(done, total)

    environments: list[dict[str, str]] = [{} for _ in jobs]
    results = run_jobs(
        [job for _, job in flat],
        workers_of(device, workers, flat[0][1].scorer if flat else HF),
        emit,
    )
    for (group, _), environment in zip(flat, results, strict=True):
        environments[group] |= environment
    return found, environments


def assemble(
    units: Sequence[Unit], pieces: dict[int, Piece], documents: int, prefix: str = ""
) -> dict[str, Array]:
    """Return the arrays of a run from the pieces of all units, in corpus order.

    Raises:
        MachineError: a unit is missing, or not of its size (a journal of another program).
    """
    if any(u.number not in pieces for u in units):
        raise MachineError("a unit of work was lost")
    if units and units[0].texts:
        sums, tokens = np.zeros(documents), np.zeros(documents, np.int64)
        for unit in units:
            places = [d for d, _ in unit.texts]
            sums[places], tokens[places] = (
                pieces[unit.number].arrays["nats"],
                pieces[unit.number].arrays["words"],
            )
        return {"sums": sums, "tokens": tokens}
    owners = {place: w[1][1:] for u in units for place, w, _, _ in slices_of(u)}
    starts = np.concatenate([[0], np.cumsum([len(owners[i]) for i in range(len(owners))])]).astype(
        np.int64
    )
    total = int(starts[-1])
    names = {
        n.removeprefix(prefix): v
        for p in pieces.values()
        for n, v in p.arrays.items()
        if n.startswith(prefix)
    }
    wanted = {n: v for n, v in names.items() if n in (*PER_TOKEN, *TOP, "kl")}
    arrays = {n: np.zeros((total, *v.shape[1:]), v.dtype) for n, v in wanted.items()}
    if not total:
        arrays = {
            "nats": np.zeros(0, np.float32),
            "top1": np.zeros(0, np.int32),
            "sure": np.zeros(0, np.float32),
        }
    for unit in units:
        for place, _, begin, end in slices_of(unit):
            for name, whole in arrays.items():
                if end > begin:
                    whole[starts[place] : starts[place] + end - begin] = pieces[unit.number].arrays[
                        prefix + name
                    ][begin:end]
    owner = list(chain.from_iterable(owners[i] for i in range(len(owners))))
    arrays["tokens"] = np.bincount(np.array(owner, np.int64), minlength=documents).astype(np.int64)
    arrays["sums"] = sums_of(arrays["nats"], arrays["tokens"])
    return arrays


def score_all(
    jobs: list[list[Job]],
    documents: int,
    device: str,
    workers: int | None,
    progress: Progress | None,
) -> list[Sums]:
    """Run the jobs of all checkpoints and return one sum for each checkpoint."""
    pieces, environments = score_pieces(jobs, device, workers, progress, [None] * len(jobs))
    found = []
    for shares, part, environment in zip(jobs, pieces, environments, strict=True):
        arrays = assemble(
            sorted((u for j in shares for u in j.units), key=lambda u: u.number), part, documents
        )
        found.append(
            Sums(arrays["sums"].tolist(), arrays["tokens"].tolist(), _nonfinite(part), environment)
        )
    return found


def floor_of(
    units: Sequence[Unit], again: Sequence[Unit], pieces: dict[int, Piece], prefix: str = ""
) -> float | None:
    """Return the noise floor: the larger end, in magnitude, of the interval of one model against
    itself, nats a token.
    """
    first = {p: (u.number, a, b) for u in units for p, _, a, b in slices_of(u)}
    sums: dict[int, float] = {}
    tokens: dict[int, int] = {}
    for unit in again:
        for place, window, begin, end in slices_of(unit):
            number, a, b = first[place]
            if end == begin:
                continue
            new = pieces[unit.number].arrays[prefix + "nats"][begin:end].astype(np.float64)
            difference = new - pieces[number].arrays[prefix + "nats"][a:b]
            for document, value in zip(window[1][1:], difference.tolist(), strict=True):
                sums[document] = sums.get(document, 0.0) + value
                tokens[document] = tokens.get(document, 0) + 1
    if len(tokens) < 2:
        return None
    interval = ratio(np.array(list(sums.values())), np.array(list(tokens.values())))
    return max(abs(interval.low), abs(interval.high))


def _nonfinite(pieces: dict[int, Piece], prefix: str = "") -> list[int]:
    return sorted(
        {d for p in pieces.values() for d in (p.nonfinite_base if prefix else p.nonfinite)}
    )


def experts_of(units: Sequence[Unit], pieces: dict[int, Piece]) -> dict[str, list[int]]:
    """Return the tokens that each expert of each layer was given."""
    found: dict[str, Any] = {}
    for unit in units:
        for name, counts in pieces[unit.number].experts.items():
            found[name] = found[name] + np.array(counts) if name in found else np.array(counts)
    return {name: counts.tolist() for name, counts in found.items()}


def run_of(
    ckpt: Checkpoint,
    corpus: Corpus,
    key: dict[str, Any],
    units: Sequence[Unit],
    pieces: dict[int, Piece],
    environment: dict[str, str],
    *,
    again: Sequence[Unit] = (),
    prefix: str = "",
    seconds: float = 0.0,
) -> Run:
    """Return the run that finished units make; ``prefix`` chooses the base's arrays of a
    lockstep.
    """
    arrays = assemble(units, pieces, len(corpus), prefix)
    arrays.pop("kl", None)
    header = RunHeader(
        model=ckpt.uri,
        weights_sha256=weights_digest(ckpt),
        formats=sorted(formats_of(ckpt)),
        key=key,
        environment=environment,
        documents=[documents_digest([d])[:16] for d in corpus.ids or corpus.texts],
        sampled_from=corpus.sampled_from,
        nonfinite=_nonfinite(pieces, prefix),
        seconds=seconds,
        experts={} if prefix else experts_of(units, pieces),
        floor=floor_of(units, again, pieces, prefix),
    )
    return Run(header, arrays)


def score_run(
    ckpt: Checkpoint,
    corpus: Corpus,
    *,
    protocol: Protocol = "tokens",
    window: int = 512,
    batch: int = 8,
    device: str = "cpu",
    workers: int | None = None,
    top_k: int = 0,
    journal: Path | None = None,
    progress: Progress | None = None,
    say: Callable[[str], None] | None = None,
    ranks: tuple[int, int] | None = None,
    scorer: Scorer = HF,
) -> Run | None:
    """Score one checkpoint; None where another rank has units to finish yet.

    Args:
        ckpt: what to score.
        corpus: on what.
        protocol: ``tokens`` or ``lm-eval``.
        window: tokens in a window.
        batch: windows in a unit of work.
        device: where the model runs.
        workers: processes; they change no bit of the result.
        top_k: log-probabilities to keep a token (0: the likeliest alone).
        journal: where finished units are kept until the run is whole; a run that finds them goes on
            from there.
        progress: called with (done, total) windows or documents.
        say: called with what a person should know.
        ranks: this process's number and how many there are (torchrun): each scores its share into a
            journal of its own, and every one that finds all journals whole returns the run.
        scorer: what turns tokens into log-probabilities.

    Raises:
        UsageError: the protocol does not fit the corpus; another process is at this run.
        ContentError: the checkpoint cannot be scored.
    """
    scorer.check()
    key, units = plan_units([ckpt], corpus, protocol, window, batch, scorer)
    job = Job(
        ckpt.uri,
        device,
        protocol,
        batch,
        window,
        len(corpus),
        top_k=top_k,
        scorer=scorer,
        task=corpus.task,
    )
    started = time.monotonic()
    if journal is None:
        if ranks is not None:
            raise UsageError("ranks share their work through journals; give one")
        return _finish(ckpt, corpus, key, units, job, None, workers, progress, started)
    identity = {
        "ckptgate_journal": __version__,
        "weights_sha256": weights_digest(ckpt),
        "key": key,
        "batch": batch,
        "device": device.partition(":")[0],
        "top_k": top_k,
        "versions": {p: version(p) for p in ("torch", "transformers")},
        **identity_of(scorer),
    }
    if ranks is not None:
        return _of_ranks(
            ckpt, corpus, key, units, job, journal, identity, ranks, workers, progress, started
        )
    with Journal(journal, identity) as kept:
        if kept.restarted and say:
            say(f"{journal}: of another run or version; scoring begins anew")
        if kept.done and say:
            say(f"{journal}: {len(kept.done)} of {len(units)} units are done; going on from there")
        return _finish(ckpt, corpus, key, units, job, kept, workers, progress, started)


def _of_ranks(
    ckpt: Checkpoint,
    corpus: Corpus,
    key: dict[str, Any],
    units: list[Unit],
    job: Job,
    journal: Path,
    identity: dict[str, Any],
    ranks: tuple[int, int],
    workers: int | None,
    progress: Progress | None,
    started: float,
) -> Run | None:
    number, count = ranks
    again = floor_units(units, job.batch)
    everything = [*units, *again]
    files = [journal.with_name(f"{journal.name}.{i}-of-{count}") for i in range(count)]
    with Journal(files[number], identity) as kept:
        mine = everything[number::count]
        left = [u for u in mine if u.number not in kept.done] or everything[-1:]
        _, (environment,) = score_pieces(
            [share(job, left, workers or 1)], job.device, workers or 1, progress, [kept]
        )
    # What a rank wrote is synced before it looks: the last one to finish sees all.
    pieces = {n: p for file in files for n, p in units_in(file, identity).items()}
    if any(u.number not in pieces for u in everything):
        return None
    seconds = round(time.monotonic() - started, 3)
    return run_of(ckpt, corpus, key, units, pieces, environment, again=again, seconds=seconds)


def _finish(
    ckpt: Checkpoint,
    corpus: Corpus,
    key: dict[str, Any],
    units: list[Unit],
    job: Job,
    journal: Journal | None,
    workers: int | None,
    progress: Progress | None,
    started: float,
) -> Run:
    again = floor_units(units, job.batch)
    # The last unit is scored even where a journal has it: its environment is this process's to
    # tell.
    left = [
        u for u in (*units, *again) if journal is None or u.number not in journal.done
    ] or units[-1:]
    jobs = [share(job, left, workers_of(job.device, workers, job.scorer))]
    pieces, environments = score_pieces(jobs, job.device, workers, progress, [journal])
    seconds = round(time.monotonic() - started, 3)
    return run_of(
        ckpt, corpus, key, units, pieces[0], environments[0], again=again, seconds=seconds
    )
