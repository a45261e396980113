# SPDX-License-Identifier: Apache-2.0
"""Which windows a corpus has and in which units they are scored; fixed before any model runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, IncomparableError, MissingExtra, UsageError
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import Job, Unit, Window
from verifier.gate.options import ScoringOptions
from verifier.memory import free_memory

Encode = Callable[[str], tuple[list[int], list[int]]]
"""Text to token ids, and the position of each one's first character."""
TEXTS_IN_UNIT = 16
FLOOR_DOCUMENTS = 8
WIKITEXT_TASK = "wikitext 2.0"


@dataclass(frozen=True)
class ScoringPlan:
    """What is scored, and in which units of work; these do not depend on who does them.

    ``key`` is the protocol key, which runs must share to be compared. ``floor_units`` are windows
    of the first documents in other batches: what a model scores on them differs from what it scores
    in ``units`` only by noise. Where a candidate and its base are scored, the base comes last.
    ``model`` is what progress calls a checkpoint that is scored by itself.
    """

    checkpoints: tuple[Checkpoint, ...]
    options: ScoringOptions
    key: dict[str, Any]
    units: tuple[Unit, ...]
    floor_units: tuple[Unit, ...]
    model: str = ""

    @property
    def all_units(self) -> tuple[Unit, ...]:
        """The units, and those of the noise floor."""
        return (*self.units, *self.floor_units)

    @property
    def models(self) -> tuple[str, ...]:
        """What progress calls the checkpoints."""
        return ("candidate", "base") if len(self.checkpoints) > 1 else (self.model,)


def plan_scoring(checkpoints: Sequence[Checkpoint], options: ScoringOptions) -> ScoringPlan:
    """Return the protocol key and the units of work.

    Args:
        checkpoints: those to score; of a candidate and its base, the base comes last.
        options: how.

    Raises:
        UsageError: an option is out of range; lm-eval over token ids.
        ContentError: a checkpoint has no tokenizer, or tokenizers differ.
    """
    options.check()
    key, units = _plan(checkpoints, options)
    return ScoringPlan(
        tuple(checkpoints), options, key, tuple(units), tuple(floor_units(units, options.batch))
    )


def _plan(
    checkpoints: Sequence[Checkpoint], options: ScoringOptions
) -> tuple[dict[str, Any], list[Unit]]:
    corpus, protocol = options.corpus, options.protocol
    key: dict[str, Any] = {
        "protocol": protocol,
        "version": 1,
        "window": options.seq_len,
        "corpus": corpus.name,
        "corpus_sha256": corpus.digest,
        "documents": len(corpus),
        "document_rule": corpus.rule,
        "bos": protocol != "tokens",
        "dtype": "bfloat16",
        **options.scorer.key,
    }
    if corpus.groups:
        numbers = json.dumps(corpus.group_numbers)
        key["groups_sha256"] = hashlib.sha256(numbers.encode()).hexdigest()
    if protocol == "task" and (task := corpus.task) is not None:
        key |= {
            "task": task.name,
            "task_version": task.version,
            "num_fewshot": task.shots,
            "metric": task.metric,
            "filter": task.filter,
            "task_sha256": task.digest,
        }
        return key | {"tokenizer_sha256": _one_tokenizer(checkpoints)}, _text_units(corpus)
    if protocol == "lm-eval":
        if corpus.ids:
            raise UsageError(
                "the protocol lm-eval needs text, and this corpus is token ids; use tokens"
            )
        key |= {"task": WIKITEXT_TASK, "tokenizer_sha256": _one_tokenizer(checkpoints)}
        return key, _text_units(corpus)
    encode = None
    if not corpus.ids:
        key["tokenizer_sha256"] = _one_tokenizer(checkpoints)
        encode = _encoder(checkpoints[0])
    return key, units_of(windows_of(corpus, encode, options.seq_len), options.batch)


def windows_of(corpus: Corpus, encode: Encode | None, size: int) -> list[Window]:
    """Return the windows of a corpus: no overlap, no BOS, the last short one included.

    A corpus of ids is cut document by document. Text is one stream, documents joined by a newline;
    a token belongs to the document in which its first character lies.

    Args:
        corpus: the documents.
        encode: the tokenizer; None for a corpus of ids.
        size: tokens in a window.
    """
    if corpus.ids:
        return [
            (ids[start : start + size], (number,) * len(ids[start : start + size]))
            for number, ids in enumerate(corpus.ids)
            for start in range(0, len(ids), size)
        ]
    if encode is None:
        raise ValueError("text needs a tokenizer")
    ids, offsets = encode("\n".join(corpus.texts))
    owners = _owners(corpus.texts, offsets)
    return [
        (tuple(ids[start : start + size]), tuple(owners[start : start + size]))
        for start in range(0, len(ids), size)
    ]


def _owners(texts: Sequence[str], offsets: Sequence[int]) -> list[int]:
    """Return the document of each token, from its first character in the joined text."""
    starts, position = [], 0
    for text in texts:
        starts.append(position)
        position += len(text) + 1
    owners, document = [], 0
    for offset in offsets:
        while document + 1 < len(starts) and starts[document + 1] <= offset:
            document += 1
        owners.append(document)
    return owners


def _text_units(corpus: Corpus) -> list[Unit]:
    texts = list(enumerate(corpus.texts))
    parts = [texts[i : i + TEXTS_IN_UNIT] for i in range(0, len(texts), TEXTS_IN_UNIT)]
    return [Unit(number, texts=tuple(part)) for number, part in enumerate(parts)]


def units_of(windows: Sequence[Window], batch: int) -> list[Unit]:
    """Return batches of windows, the longest first: little padding, and the largest need of memory
    comes first.
    """
    order = sorted(range(len(windows)), key=lambda i: -len(windows[i][0]))
    return _units_in([(i, windows[i]) for i in order], batch, first=0)


def floor_units(units: Sequence[Unit], batch: int, documents: int = FLOOR_DOCUMENTS) -> list[Unit]:
    """Return the windows of the first documents in different batches and a different order.

    They are numbered on from ``units``.
    """
    placed: list[tuple[int, Window]] = []
    for unit in units:
        placed += zip(unit.places, unit.windows, strict=True)
    first = [(place, window) for place, window in placed if max(window[1], default=0) < documents]
    return _units_in(first[::-1], batch // 2 if batch > 1 else 2, first=len(units))


def _units_in(placed: Sequence[tuple[int, Window]], batch: int, first: int) -> list[Unit]:
    parts = [placed[i : i + batch] for i in range(0, len(placed), batch)]
    return [
        Unit(number, tuple(window for _, window in part), tuple(place for place, _ in part))
        for number, part in enumerate(parts, first)
    ]


def slices_of(unit: Unit) -> Iterator[tuple[int, Window, slice]]:
    """Yield the place of each window, the window, and where its scored tokens are in the unit's
    arrays.
    """
    start = 0
    for place, window in zip(unit.places, unit.windows, strict=True):
        end = start + max(0, len(window[0]) - 1)
        yield place, window, slice(start, end)
        start = end


def share(job: Job, units: Sequence[Unit], workers: int) -> list[Job]:
    """Return the job divided among some workers."""
    count = min(workers, max(1, len(units)))
    return [replace(job, units=tuple(units[i::workers])) for i in range(count)]


def tokenizer_digest(ckpt: Checkpoint) -> str:
    """Return the SHA-256 of tokenizer.json.

    Raises:
        ContentError: the checkpoint has none.
    """
    return hashlib.sha256(_tokenizer_bytes(ckpt)).hexdigest()


def _tokenizer_bytes(ckpt: Checkpoint) -> bytes:
    if "tokenizer.json" not in ckpt.files:
        raise ContentError(f"{ckpt.uri}: no tokenizer.json; text cannot be scored")
    return ckpt.source.read("tokenizer.json", 0, ckpt.files["tokenizer.json"]).tobytes()


def _one_tokenizer(checkpoints: Sequence[Checkpoint]) -> str:
    digests = {ckpt.uri: tokenizer_digest(ckpt) for ckpt in checkpoints}
    if len(set(digests.values())) > 1:
        raise IncomparableError(
            f"{' and '.join(digests)} have different tokenizers; their scores cannot be compared"
        )
    return next(iter(digests.values()))


def _encoder(ckpt: Checkpoint) -> Encode:
    try:
        from tokenizers import Tokenizer  # noqa: PLC0415  (an extra)
    except ImportError as error:
        raise MissingExtra("tokenizing", "gate") from error
    try:
        tokenizer = Tokenizer.from_buffer(_tokenizer_bytes(ckpt))
    except Exception as error:
        raise ContentError(
            f"{ckpt.uri}: tokenizer.json cannot be read: {str(error)[:200]}"
        ) from error

    def encode(text: str) -> tuple[list[int], list[int]]:
        encoding = tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, [start for start, _ in encoding.offsets]

    return encode


def fits_twice(base: Checkpoint, device: str, workers: int) -> bool:
    """Whether each worker can hold two models of the base's size, decoded to BF16, in 70% of the
    free memory.
    """
    elements = sum(t.elements * (2 if t.dtype == "U8" else 1) for t in base.tensors.values())
    return 2 * 2 * elements * workers < 0.7 * free_memory(device)
