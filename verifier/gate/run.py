# SPDX-License-Identifier: Apache-2.0
"""The gate: score base and candidate on the same text, compare document by document, decide."""

from __future__ import annotations

import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import EXIT_OF_OUTCOME, Margin, Outcome, decide, margin_of
from verifier.gate.jobs import Job, Sums
from verifier.gate.scorer import perplexity, windows_of
from verifier.gate.statistics import Interval, documents_needed, paired
from verifier.gate.workers import run_jobs
from verifier.schemes import gather

PathLike = str | os.PathLike[str]
Protocol = Literal["tokens", "lm-eval"]
BATCH = 8


@dataclass(frozen=True)
class GateResult:
    """What a gate found. ``interval`` is None where logits were not finite: then there are no statistics."""

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

    @property
    def exit_code(self) -> int:
        """0 passed, 1 failed, 3 inconclusive."""
        return EXIT_OF_OUTCOME[self.outcome]


def run(
    candidate: PathLike,
    *,
    base: PathLike,
    corpus: str,
    protocol: Protocol = "tokens",
    max_increase: str | float | None = None,
    window: int = 512,
    documents: int | None = None,
    device: str = "cpu",
    batch: int = BATCH,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> GateResult:
    """Compare a candidate with its base on a corpus.

    Args:
        candidate: folder of the quantized checkpoint.
        base: folder of its reference; a quantized one is decoded.
        corpus: ``wikitext2-test``, or a file.
        protocol: ``tokens`` (windows of the model's own tokens) or ``lm-eval`` (its ``wikitext`` task).
        max_increase: ``8%`` of perplexity or nats a token; by default the budget of the candidate's formats.
        window: tokens in a window (``lm-eval``: ``max_length``), at least 2.
        documents: score the first so many documents only.
        device: where the models run.
        batch: windows at a time.
        workers: processes; by default one a processor on CPU (at most 4), one elsewhere.
        progress: called with (done, total) windows or documents.

    Raises:
        UsageError: the candidate is the base, an option out of range, no such corpus.
        ContentError: a checkpoint cannot be scored, or their tokenizers differ.
    """
    if protocol not in ("tokens", "lm-eval"):
        raise UsageError(f"no protocol {protocol!r}; tokens or lm-eval")
    if window < 2 or batch < 1 or (documents is not None and documents < 1) or (workers is not None and workers < 1):
        raise UsageError("window is at least 2, batch, documents and workers at least 1")
    ckpt, reference = open_checkpoint(candidate), open_checkpoint(base)
    refuse_same(ckpt, reference)
    margin = margin_of(max_increase, formats_of(ckpt))
    found = load_corpus(corpus).head(documents)
    key, jobs = plan_jobs([reference, ckpt], found, protocol, window, batch, device, workers)
    sums = score_all(jobs, len(found), device, workers, progress)
    return compare(ckpt, reference, sums, margin, key, found)


def formats_of(ckpt: Checkpoint) -> set[str]:
    """Return the algorithms that a checkpoint's tensors show."""
    return {m.shown.algo for m in gather(ckpt.tensors.values()).values() if m.shown}


def refuse_same(candidate: Checkpoint, base: Checkpoint) -> None:
    """Refuse a candidate that is the base: by path, or byte for byte.

    Raises:
        UsageError: they are the same checkpoint.
    """
    same = "://" not in candidate.uri and Path(candidate.uri).resolve() == Path(base.uri).resolve()
    ours, theirs = candidate.tensors, base.tensors
    if not same and ours.keys() == theirs.keys():
        same = all(
            ours[n].dtype == theirs[n].dtype and np.array_equal(candidate.read(ours[n]), base.read(theirs[n])) for n in ours
        )
    if same:
        raise UsageError(f"{candidate.uri}: the candidate is the base itself; there is nothing to measure")


def tokenizer_digest(ckpt: Checkpoint) -> str:
    """Return the SHA-256 of tokenizer.json.

    Raises:
        ContentError: the checkpoint has none.
    """
    if "tokenizer.json" not in ckpt.files:
        raise ContentError(f"{ckpt.uri}: has no tokenizer.json; text cannot be scored")
    return hashlib.sha256(ckpt.source.read("tokenizer.json", 0, ckpt.files["tokenizer.json"]).tobytes()).hexdigest()


def plan_jobs(
    checkpoints: list[Checkpoint],
    corpus: Corpus,
    protocol: Protocol,
    window: int,
    batch: int,
    device: str,
    workers: int | None,
) -> tuple[dict[str, Any], list[list[Job]]]:
    """Return the protocol key, and the jobs of each checkpoint.

    Raises:
        UsageError: lm-eval over token ids.
        ContentError: the checkpoints' tokenizers differ.
    """
    key: dict[str, Any] = {
        "protocol": protocol, "version": 1, "window": window, "corpus": corpus.name, "corpus_sha256": corpus.digest,
        "documents": len(corpus), "document_rule": corpus.rule, "bos": protocol == "lm-eval", "dtype": "bfloat16",
    }  # fmt: skip
    slices = max(1, _workers(device, workers) // len(checkpoints))
    if protocol == "lm-eval":
        if corpus.ids:
            raise UsageError("the protocol lm-eval needs text; this corpus is token ids (use tokens)")
        key |= {"task": "wikitext 2.0", "tokenizer_sha256": _one_tokenizer(checkpoints)}
        texts = list(enumerate(corpus.texts))
        shares: list[dict[str, Any]] = [{"texts": tuple(texts[i::slices])} for i in range(slices)]
    else:
        encode = None
        if not corpus.ids:
            key["tokenizer_sha256"] = _one_tokenizer(checkpoints)
            encode = _encoder(checkpoints[0])
        windows = windows_of(corpus, encode, window)
        shares = [{"windows": tuple(windows[i::slices])} for i in range(slices)]
    jobs = [
        [Job(c.uri, device, protocol, batch, window, len(corpus), **share) for share in shares] for c in checkpoints
    ]
    return key, jobs


def _workers(device: str, workers: int | None) -> int:
    return workers or (min(4, os.cpu_count() or 1) if device == "cpu" else 1)


def _one_tokenizer(checkpoints: list[Checkpoint]) -> str:
    digests = {c.uri: tokenizer_digest(c) for c in checkpoints}
    if len(set(digests.values())) > 1:
        raise ContentError(f"{' and '.join(digests)} have different tokenizers; their scores cannot be compared")
    return next(iter(digests.values()))


def _encoder(ckpt: Checkpoint) -> Callable[[str], tuple[list[int], list[int]]]:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingExtra("tokenizing", "gate") from error
    raw = ckpt.source.read("tokenizer.json", 0, ckpt.files["tokenizer.json"]).tobytes()
    try:
        tokenizer = Tokenizer.from_buffer(raw)
    except Exception as error:
        raise ContentError(f"{ckpt.uri}: tokenizer.json cannot be read: {str(error)[:200]}") from error

    def encode(text: str) -> tuple[list[int], list[int]]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    return encode


def score_all(
    jobs: list[list[Job]], documents: int, device: str, workers: int | None, progress: Callable[[int, int], None] | None
) -> list[Sums]:
    """Run the jobs of all checkpoints and return one sum for each checkpoint."""
    flat = [j for group in jobs for j in group]
    total = sum(len(j.windows) + len(j.texts) for j in flat)
    done = 0

    def count(n: int) -> None:
        nonlocal done
        done += n
        if progress is not None:
            progress(done, total)

    results = iter(run_jobs(flat, _workers(device, workers), count))
    found = []
    for group in jobs:
        whole = Sums([0.0] * documents, [0] * documents)
        for _ in group:
            whole.add(next(results))
        found.append(whole)
    return found


def weights_digest(ckpt: Checkpoint) -> str:
    """Return a SHA-256 over name, dtype, shape and bytes of every tensor, whatever the sharding."""
    state = hashlib.sha256()
    for name in sorted(ckpt.tensors):
        t = ckpt.tensors[name]
        state.update(f"{name}\0{t.dtype}\0{list(t.shape)}\0".encode())
        state.update(ckpt.read(t).data)
    return state.hexdigest()


def compare(
    candidate: Checkpoint, base: Checkpoint, sums: list[Sums], margin: Margin, key: dict[str, Any], corpus: Corpus
) -> GateResult:
    """Return the result of two scores over the same documents."""
    ours, theirs = sums[1], sums[0]
    bad = sorted({*ours.nonfinite, *theirs.nonfinite})
    interval = None if bad else paired(theirs.nats, ours.nats, theirs.tokens)
    outcome: Outcome = "failed" if interval is None else decide(interval, margin)
    measures_kl = corpus.sampled_from is not None and corpus.sampled_from == weights_digest(base)
    return GateResult(
        outcome, candidate.uri, base.uri, margin, interval,
        math.nan if bad else perplexity(theirs.nats, theirs.tokens),
        math.nan if bad else perplexity(ours.nats, ours.tokens), measures_kl, key, theirs.environment,
        list(zip(theirs.nats, ours.nats, theirs.tokens, strict=True)), bad,
        documents_needed(interval, margin.nats) if interval is not None and outcome == "inconclusive" else None,
    )  # fmt: skip
