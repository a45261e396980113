# SPDX-License-Identifier: Apache-2.0
"""Calibration texts: documents from files, and sequences of equal length from documents, selected
by a seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from verifier.errors import PlanError, UsageError

Ids = list[int]
Document = str | tuple[int, ...]
"""A text, or token ids."""
MAX_BYTES = 2_000_000_000


@dataclass(frozen=True)
class TextFile:
    """A file of documents: each a text, or token ids."""

    path: str
    sha256: str
    documents: tuple[Document, ...]

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a document is text."""
        return any(isinstance(d, str) for d in self.documents)


def read_texts(path: str | os.PathLike[str]) -> TextFile:
    """Return the documents of a file.

    ``.jsonl``: one document per line, ``{"text": …}`` or ``{"ids": […]}``. Any other file is UTF-8
    text: paragraphs between blank lines are documents; a text without blank lines is one document.

    Raises:
        UsageError: no such file, or larger than 2 GB.
        PlanError: not UTF-8, not such lines, or no document.
    """
    name, file = os.fspath(path), Path(path)
    if not file.is_file():
        raise UsageError(f"{name}: no such text file")
    if file.stat().st_size > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES:,} bytes")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{name}: not UTF-8 at byte {error.start}") from error
    documents: list[Document] = []
    if file.suffix == ".jsonl":
        for number, line in enumerate(text.split("\n"), 1):
            document = _document(name, number, line) if line.strip() else None
            documents += [document] if document is not None else []
    else:
        paragraphs = re.split(r"\n(?:[ \t\r]*\n)+", text)
        documents += [p.strip("\r\n") for p in paragraphs if p.strip()]
    if not documents:
        raise PlanError(f"{name}: holds no document")
    return TextFile(name, hashlib.sha256(raw).hexdigest(), tuple(documents))


def _document(name: str, number: int, line: str) -> Document | None:
    """Return a document; None for the first line of a corpus that names the model that wrote it
    (``sampled_from``).
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} line {number}: not JSON") from error
    entry: dict[str, Any] = row if isinstance(row, dict) else {}
    if number == 1 and "sampled_from" in entry and entry.keys().isdisjoint(("ids", "text")):
        return None
    ids = entry.get("ids")
    if isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return tuple(ids)
    if ids is None and isinstance(entry.get("text"), str):
        return str(entry["text"])
    raise PlanError(f"{name} line {number}: neither ids (a list of at least one integer) nor text")


def choose(
    file: TextFile, count: int, length: int, seed: str, encode: Callable[[str], Ids] | None
) -> list[Ids]:
    """Return ``count`` sequences of ``length`` tokens from the documents, in an order that the seed
    decides.

    A document of at least ``length`` tokens gives its first ``length``; shorter ones are joined
    until they fill a sequence, and the excess is dropped. If that gives too few, further sequences
    of the long documents follow, and last the remainders, shorter than ``length``. There may be
    fewer than ``count``.

    Args:
        file: the documents.
        count: sequences to return, at least 1.
        length: tokens per sequence, at least 2.
        seed: what decides the order.
        encode: text to token ids; may be None where all documents are ids.
    """
    return list(islice(_sequences(file.documents, length, seed, encode), count))


def _sequences(
    documents: Sequence[Document],
    length: int,
    seed: str,
    encode: Callable[[str], Ids] | None,
) -> Iterator[Ids]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)  # noqa: S311  (not a secret)
    joined: Ids = []
    rest: list[Ids] = []
    for i in order:
        document = documents[i]
        if not isinstance(document, str):
            ids = list(document)
        elif encode is not None:
            ids = encode(document)
        else:
            raise ValueError("text needs a tokenizer")
        if len(ids) >= length:
            yield ids[:length]
            rest.append(ids[length:])
            continue
        joined += ids
        if len(joined) >= length:
            yield joined[:length]
            joined = []
    for ids in rest:
        for start in range(0, len(ids) - length + 1, length):
            yield ids[start : start + length]
    tails = [joined, *(ids[len(ids) - len(ids) % length :] for ids in rest)]
    yield from (t for t in tails if len(t) > 1)


def batches(sequences: Sequence[Ids], size: int) -> Iterator[list[Ids]]:
    """Yield up to ``size`` sequences of one length at a time, the longest first: nothing is
    padded.
    """
    groups: dict[int, list[Ids]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    for length in sorted(groups, reverse=True):
        for start in range(0, len(groups[length]), size):
            yield groups[length][start : start + size]
