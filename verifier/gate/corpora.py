# SPDX-License-Identifier: Apache-2.0
"""What a gate reads: documents of text, or documents of token ids that a model itself wrote.

Documents are the clusters of the statistics. Text is split as lm-eval's document-level WikiText
does it: a new document at each line ``= Title =``; WikiText-2's test file so gives 62.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.jobs import TaskInfo

DATA_VARIABLE = "CKPTGATE_TEST_DATA"
WIKITEXT = "wikitext2-test"
WIKITEXT_FILE = "wikitext-2/wiki.test.raw"
WIKITEXT_DATASET = ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")
WIKITEXT_DIGEST = "f9e9c81fd14a66b7d2ad81ec2f409104fe5e94fe607394b23d37aac3771a1602"
"""SHA-256 of the 62 documents, whichever way they came (`documents_digest`)."""
MAX_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents to score: ``texts``, or ``ids`` (then token ids, scored document by document).

    ``sampled_from`` is the weights digest of the model that wrote the ids, where one did. ``task``:
    the texts are the documents of a task of lm-eval, as JSON.
    """

    name: str
    rule: str
    digest: str
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    sampled_from: str | None = None
    task: TaskInfo | None = None

    def __len__(self) -> int:
        return len(self.ids) or len(self.texts)

    def head(self, count: int | None) -> Corpus:
        """Return the first ``count`` documents as a corpus of their own."""
        if count is None or count >= len(self):
            return self
        texts, ids = self.texts[:count], self.ids[:count]
        found = documents_digest(ids or texts)
        return Corpus(
            f"{self.name}[:{count}]", self.rule, found, texts, ids, self.sampled_from, self.task
        )


def documents_digest(documents: Iterable[object]) -> str:
    """Return one SHA-256 over a sequence of documents."""
    state = hashlib.sha256()
    for document in documents:
        raw = (
            document.encode()
            if isinstance(document, str)
            else json.dumps(document, separators=(",", ":")).encode()
        )
        state.update(len(raw).to_bytes(8, "little") + raw)
    return state.hexdigest()


def split_documents(text: str) -> list[str]:
    """Return the documents of a WikiText file, by the rule of lm-eval's
    ``wikitext_document_level``.
    """
    found: list[str] = []
    current: list[str] = []
    for line in text.split("\n"):
        plain = line.replace("= = =", "===").replace("= =", "==").strip()
        if plain.startswith("= ") and plain.endswith(" ="):
            if "\n".join(current).strip():
                found.append("\n".join(current))
            current = []
        current.append(line)
    found.append("\n".join(current))
    return found


def load_corpus(name: str) -> Corpus:
    """Return a corpus by its name (``wikitext2-test``) or from a file (.jsonl with ``ids`` or
    ``text``; else text).

    Raises:
        UsageError: no such name or file, or WikiText is nowhere to be had.
        ContentError: the file is not what its name says, or not the documents that the name stands
            for.
    """
    if name == WIKITEXT:
        texts, how = _wikitext()
        digest = documents_digest(texts)
        if digest != WIKITEXT_DIGEST:
            raise ContentError(
                f"{how}: these are not the {WIKITEXT} documents (digest {digest[:16]}…)"
            )
        return Corpus(name, "lm-eval document level, 62", digest, texts=tuple(texts))
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"no corpus {name!r}: neither {WIKITEXT} nor a file")
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES:,} bytes")
    try:
        text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise ContentError(f"{name}: not UTF-8 at byte {error.start}") from error
    if path.suffix == ".jsonl":
        return _jsonl(path, text)
    documents = split_documents(text)
    return Corpus(
        path.name,
        f"headings, {len(documents)}",
        documents_digest(documents),
        texts=tuple(documents),
    )


def _wikitext() -> tuple[list[str], str]:
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder) / WIKITEXT_FILE if folder else None
    if path is not None and path.is_file():
        return split_documents(path.read_bytes().decode("utf-8")), str(path)
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise UsageError(_wanted())
    try:
        import datasets  # type: ignore[import-untyped]  # noqa: PLC0415  (slow, and only for the online way)
    except ImportError as error:
        raise MissingExtra(f"fetching {WIKITEXT}", "gate") from error
    try:
        rows = datasets.load_dataset(
            WIKITEXT_DATASET[0], WIKITEXT_DATASET[1], split=WIKITEXT_DATASET[2]
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise UsageError(f"{_wanted()} (online: {' '.join(str(error).split())[:120]})") from error
    return [r["page"] for r in rows], WIKITEXT_DATASET[0]


def _wanted() -> str:
    return (
        f"{WIKITEXT} is not here: set {DATA_VARIABLE} to a folder with {WIKITEXT_FILE} (wikitext-2-raw-v1, 1,290,590 "
        "bytes), or give the file itself as --corpus"
    )


def _jsonl(path: Path, text: str) -> Corpus:
    ids: list[tuple[int, ...]] = []
    texts: list[str] = []
    sampled = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _row(path, number, line)
        if number == 1 and "sampled_from" in row:
            sampled = str(row["sampled_from"])
        elif isinstance(row.get("ids"), list) and all(
            type(i) is int and i >= 0 for i in row["ids"]
        ):
            ids.append(tuple(row["ids"]))
        elif isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            raise ContentError(f"{path} line {number}: neither ids (whole numbers) nor text")
    if bool(ids) == bool(texts):
        raise ContentError(f"{path}: {'ids and text are mixed' if ids else 'no document'}")
    documents: list[Any] = list(ids) or list(texts)
    kind = "token ids" if ids else "lines"
    return Corpus(
        path.name,
        f"{kind}, {len(documents)}",
        documents_digest(documents),
        tuple(texts),
        tuple(ids),
        sampled,
    )


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{path} line {number}: not JSON") from error
    if not isinstance(row, dict):
        raise ContentError(f"{path} line {number}: not an object")
    return row
