# SPDX-License-Identifier: Apache-2.0
"""Calibration texts: documents from files, and sequences of equal length from documents, chosen by
a seed.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verifier.errors import PlanError, UsageError

Ids = list[int]
MAX_BYTES = 2_000_000_000


@dataclass(frozen=True)
class TextFile:
    """A file of documents: each a text, or token ids."""

    path: str
    sha256: str
    documents: tuple[str | tuple[int, ...], ...]

    @property
    def needs_tokenizer(self) -> bool:
        """Whether a document is text."""
        return any(isinstance(d, str) for d in self.documents)


def read_texts(path: str | os.PathLike[str]) -> TextFile:
    """Return the documents of a file.

    ``.jsonl``: one document a line, ``{"text": …}`` or ``{"ids": […]}``. Anything else is UTF-8
    text: paragraphs between blank lines are documents; a text without blank lines is one.

    Raises:
        UsageError: no such file, or larger than 2 GB.
        PlanError: not UTF-8, not such lines, or no document.
    """
    name, file = os.fspath(path), Path(path)
    if not file.is_file():
        raise UsageError(f"{name}: no such file of texts")
    if file.stat().st_size > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES:,} bytes")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise PlanError(f"{name}: not UTF-8 at byte {error.start}") from error
    found: list[str | tuple[int, ...]] = []
    if file.suffix == ".jsonl":
        rows = [(n, line) for n, line in enumerate(text.split("\n"), 1) if line.strip()]
        found += [row for n, line in rows if (row := _row(name, n, line)) is not None]
    else:
        found += [p.strip("\r\n") for p in re.split(r"\n(?:[ \t\r]*\n)+", text) if p.strip()]
    if not found:
        raise PlanError(f"{name}: holds no document")
    return TextFile(name, hashlib.sha256(raw).hexdigest(), tuple(found))


def _row(name: str, number: int, line: str) -> str | tuple[int, ...] | None:
    """Return a document, or None for the first line of a corpus that says which model wrote it
    (`sampled_from`).
    """
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise PlanError(f"{name} line {number}: not JSON") from error
    if (
        number == 1
        and isinstance(row, dict)
        and "sampled_from" in row
        and not {"ids", "text"} & row.keys()
    ):
        return None
    ids: Any = row.get("ids") if isinstance(row, dict) else None
    if isinstance(ids, list) and ids and all(type(i) is int and i >= 0 for i in ids):
        return tuple(ids)
    if ids is None and isinstance(row, dict) and isinstance(row.get("text"), str):
        return str(row["text"])
    raise PlanError(f"{name} line {number}: neither ids (whole numbers, at least one) nor text")


def choose(
    file: TextFile, count: int, length: int, seed: str, encode: Callable[[str], Ids] | None
) -> list[Ids]:
    """Return ``count`` sequences of ``length`` tokens from the documents in an order that the seed
    decides.

    A document of ``length`` tokens or more gives its first ``length``; shorter ones are joined
    until they fill a sequence, and what is over is left. If that is too little, the further windows
    of the long documents follow, and last what is left over, shorter than ``length``. There may be
    fewer than ``count``.

    Args:
        file: the documents.
        count: sequences wanted, at least 1.
        length: tokens in a sequence, at least 2.
        seed: what decides the order.
        encode: text to token ids; may be None where all documents are ids.
    """
    found: list[Ids] = []
    for sequence in _sequences(file.documents, length, seed, encode):
        found.append(sequence)
        if len(found) == count:
            break
    return found


def _sequences(
    documents: Sequence[str | tuple[int, ...]],
    length: int,
    seed: str,
    encode: Callable[[str], Ids] | None,
) -> Iterator[Ids]:
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)  # noqa: S311  (no secret)
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
    """Yield up to ``size`` sequences of one length at a time, in order of length, longest first:
    nothing is padded.
    """
    groups: dict[int, list[Ids]] = {}
    for sequence in sequences:
        groups.setdefault(len(sequence), []).append(sequence)
    for length in sorted(groups, reverse=True):
        for start in range(0, len(groups[length]), size):
            yield groups[length][start : start + size]
