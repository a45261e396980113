# SPDX-License-Identifier: Apache-2.0
"""Which windows a corpus has, in which units they are scored, and who scores which; all fixed
before any model runs.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Literal

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, IncomparableError, MissingExtra, UsageError
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import HF, Job, Scorer, Unit, Window
from verifier.gate.scorers.transformers import windows_of
from verifier.memory import free_memory

Protocol = Literal["tokens", "lm-eval", "task"]
TEXTS_IN_UNIT = 16
FLOOR_DOCUMENTS = 8


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
    key, units = plan_units(checkpoints, corpus, protocol, window, batch)
    slices = max(1, workers_of(device, workers) // len(checkpoints))
    return key, [
        share(Job(c.uri, device, protocol, batch, window, len(corpus)), units, slices)
        for c in checkpoints
    ]


def plan_units(
    checkpoints: Sequence[Checkpoint],
    corpus: Corpus,
    protocol: Protocol,
    window: int,
    batch: int,
    scorer: Scorer = HF,
) -> tuple[dict[str, Any], list[Unit]]:
    """Return the protocol key and the units of work, which do not depend on who does them.

    Raises:
        UsageError: lm-eval over token ids.
        ContentError: the checkpoints' tokenizers differ.
    """
    key: dict[str, Any] = {
        "protocol": protocol,
        "version": 1,
        "window": window,
        "corpus": corpus.name,
        "corpus_sha256": corpus.digest,
        "documents": len(corpus),
        "document_rule": corpus.rule,
        "bos": protocol != "tokens",
        "dtype": "bfloat16",
        **scorer.key,
    }
    if protocol == "task" and corpus.task is not None:
        t = corpus.task
        key |= {
            "task": t.name,
            "task_version": t.version,
            "num_fewshot": t.shots,
            "metric": t.metric,
            "filter": t.filter,
        }
        return key | {"tokenizer_sha256": _one_tokenizer(checkpoints)}, _texts_units(corpus)
    if protocol == "lm-eval":
        if corpus.ids:
            raise UsageError(
                "the protocol lm-eval needs text; this corpus is token ids (use tokens)"
            )
        key |= {"task": "wikitext 2.0", "tokenizer_sha256": _one_tokenizer(checkpoints)}
        return key, _texts_units(corpus)
    encode = None
    if not corpus.ids:
        key["tokenizer_sha256"] = _one_tokenizer(checkpoints)
        encode = _encoder(checkpoints[0])
    return key, units_of(windows_of(corpus, encode, window), batch)


def _texts_units(corpus: Corpus) -> list[Unit]:
    texts = list(enumerate(corpus.texts))
    parts = [texts[i : i + TEXTS_IN_UNIT] for i in range(0, len(texts), TEXTS_IN_UNIT)]
    return [Unit(n, texts=tuple(part)) for n, part in enumerate(parts)]


def units_of(windows: Sequence[Window], batch: int) -> list[Unit]:
    """Return batches of windows, the longest first: little padding, and the largest need of memory
    comes first.
    """
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
    parts = [order[i : i + batch] for i in range(0, len(order), batch)]
    return [Unit(n, tuple(windows[i] for i in part), tuple(part)) for n, part in enumerate(parts)]


def floor_units(units: Sequence[Unit], batch: int, documents: int = FLOOR_DOCUMENTS) -> list[Unit]:
    """Return the windows of the first documents in other batches and another order, numbered on
    from ``units``.

    What the base scores on them beside what it scores in ``units`` is the noise floor.
    """
    pairs = [
        (p, w)
        for u in units
        for p, w in zip(u.places, u.windows, strict=True)
        if max(w[1], default=0) < documents
    ]
    pairs.reverse()
    other = batch // 2 if batch > 1 else 2
    parts = [pairs[i : i + other] for i in range(0, len(pairs), other)]
    return [
        Unit(len(units) + n, tuple(w for _, w in part), tuple(p for p, _ in part))
        for n, part in enumerate(parts)
    ]


def slices_of(unit: Unit) -> Iterator[tuple[int, Window, int, int]]:
    """Yield the place of each window, the window, and where its scored tokens begin and end in the
    unit's arrays.
    """
    at = 0
    for place, window in zip(unit.places, unit.windows, strict=True):
        size = max(0, len(window[0]) - 1)
        yield place, window, at, at + size
        at += size


def share(job: Job, units: Sequence[Unit], slices: int) -> list[Job]:
    """Return the job cut for some workers."""
    return [
        replace(job, units=tuple(units[i::slices])) for i in range(min(slices, max(1, len(units))))
    ]


def workers_of(device: str, workers: int | None, scorer: Scorer = HF) -> int:
    """Return how many processes score; an engine is one."""
    if scorer.name != "hf":
        return 1
    return workers or (min(4, os.cpu_count() or 1) if device == "cpu" else 1)


def tokenizer_digest(ckpt: Checkpoint) -> str:
    """Return the SHA-256 of tokenizer.json.

    Raises:
        ContentError: the checkpoint has none.
    """
    if "tokenizer.json" not in ckpt.files:
        raise ContentError(f"{ckpt.uri}: has no tokenizer.json; text cannot be scored")
    return hashlib.sha256(
        ckpt.source.read("tokenizer.json", 0, ckpt.files["tokenizer.json"]).tobytes()
    ).hexdigest()


def _one_tokenizer(checkpoints: Sequence[Checkpoint]) -> str:
    digests = {c.uri: tokenizer_digest(c) for c in checkpoints}
    if len(set(digests.values())) > 1:
        raise IncomparableError(
            f"{' and '.join(digests)} have different tokenizers; their scores cannot be compared"
        )
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
        raise ContentError(
            f"{ckpt.uri}: tokenizer.json cannot be read: {str(error)[:200]}"
        ) from error

    def encode(text: str) -> tuple[list[int], list[int]]:
        found = tokenizer.encode(text, add_special_tokens=False)
        return found.ids, [start for start, _ in found.offsets]

    return encode


def fits_twice(base: Checkpoint, device: str, workers: int) -> bool:
    """Whether each worker can hold two models of the base's size, decoded to BF16, in 70 % of the
    memory that is free.
    """
    elements = sum(t.elements * (2 if t.dtype == "U8" else 1) for t in base.tensors.values())
    return 2 * 2 * elements * workers < 0.7 * free_memory(device)
