# SPDX-License-Identifier: Apache-2.0
"""The documents that a gate scores: text, or token ids that were sampled from a model.

Documents are the clusters of the statistics. Text is split as lm-eval's document-level WikiText is:
a new document at each line ``= Title =``, which gives 62 for WikiText-2's test file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.jobs import TaskInfo

DATA_VARIABLE = "CKPTGATE_TEST_DATA"
WIKITEXT = "wikitext2-test"
WIKITEXT_FILE = "wikitext-2/wiki.test.raw"
WIKITEXT_DATASET = ("EleutherAI/wikitext_document_level", "wikitext-2-raw-v1", "test")
WIKITEXT_DIGEST = "f9e9c81fd14a66b7d2ad81ec2f409104fe5e94fe607394b23d37aac3771a1602"
"""SHA-256 of the 62 documents (`documents_digest`), wherever they come from."""
MAX_BYTES = 2_000_000_000


@dataclass(frozen=True)
class Corpus:
    """Documents to score: ``texts``, or ``ids`` (token ids, scored document by document).

    ``sampled_from`` is the weights digest of the model that the ids were sampled from. ``groups``
    names the group of each document, such as a book whose chapters are documents; empty where each
    is its own. ``task``: the texts are the documents of a task of lm-eval, as JSON.
    """

    name: str
    rule: str
    digest: str
    texts: tuple[str, ...] = ()
    ids: tuple[tuple[int, ...], ...] = ()
    sampled_from: str | None = None
    task: TaskInfo | None = None
    groups: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.documents)

    @property
    def documents(self) -> tuple[str, ...] | tuple[tuple[int, ...], ...]:
        """The documents, as ids or as text."""
        return self.ids or self.texts

    @property
    def group_numbers(self) -> tuple[int, ...]:
        """The number of each document's group, in the order in which groups appear."""
        numbers = {name: number for number, name in enumerate(dict.fromkeys(self.groups))}
        return tuple(numbers[name] for name in self.groups)

    def head(self, count: int | None) -> Corpus:
        """Return a corpus of the first ``count`` documents."""
        if count is None or count >= len(self):
            return self
        texts, ids = self.texts[:count], self.ids[:count]
        return replace(
            self,
            name=f"{self.name}[:{count}]",
            digest=documents_digest(ids or texts),
            texts=texts,
            ids=ids,
            groups=self.groups[:count],
        )


def documents_digest(documents: Iterable[str | Sequence[int]]) -> str:
    """Return one SHA-256 over a sequence of documents."""
    state = hashlib.sha256()
    for document in documents:
        text = document
        if not isinstance(text, str):
            text = json.dumps(text, separators=(",", ":"))
        raw = text.encode()
        state.update(len(raw).to_bytes(8, "little") + raw)
    return state.hexdigest()


def document_digests(corpus: Corpus) -> list[str]:
    """Return a short digest of each document, in order."""
    return [documents_digest([document])[:16] for document in corpus.documents]


def split_documents(text: str) -> list[str]:
    """Return the documents of a WikiText file, by the rule of lm-eval's
    ``wikitext_document_level``.
    """
    documents: list[str] = []
    current: list[str] = []
    for line in text.split("\n"):
        plain = line.replace("= = =", "===").replace("= =", "==").strip()
        if plain.startswith("= ") and plain.endswith(" ="):
            if "\n".join(current).strip():
                documents.append("\n".join(current))
            current = []
        current.append(line)
    documents.append("\n".join(current))
    return documents


def load_corpus(name: str) -> Corpus:
    """Return a corpus by its name (``wikitext2-test``) or from a file (.jsonl with ``ids`` or
    ``text``, and ``group`` where documents belong together; else text).

    Raises:
        UsageError: no such name or file, or WikiText cannot be found.
        ContentError: the file is not of its kind, or does not hold the documents of that name.
    """
    if name == WIKITEXT:
        texts, source = _wikitext()
        digest = documents_digest(texts)
        if digest != WIKITEXT_DIGEST:
            raise ContentError(
                f"{source}: not the {WIKITEXT} documents (unexpected digest {digest[:16]}…)"
            )
        return Corpus(name, "lm-eval document level, 62", digest, texts=tuple(texts))
    path = Path(name)
    if not path.is_file():
        raise UsageError(f"no corpus {name!r}: not a file, and the only named corpus is {WIKITEXT}")
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
    """Return the documents of WikiText-2's test split, and where they are from."""
    folder = os.environ.get(DATA_VARIABLE)
    path = Path(folder) / WIKITEXT_FILE if folder else None
    if path is not None and path.is_file():
        return split_documents(path.read_bytes().decode("utf-8")), str(path)
    if os.environ.get("HF_HUB_OFFLINE") == "1" or os.environ.get("HF_DATASETS_OFFLINE") == "1":
        raise UsageError(_missing_wikitext())
    try:
        import datasets  # type: ignore[import-untyped]  # noqa: PLC0415  (slow, and an extra)
    except ImportError as error:
        raise MissingExtra(f"fetching {WIKITEXT}", "gate") from error
    try:
        name, config, split = WIKITEXT_DATASET
        rows = datasets.load_dataset(name, config, split=split)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UsageError(f"{_missing_wikitext()} (online: {reason})") from error
    return [row["page"] for row in rows], name


def _missing_wikitext() -> str:
    return (
        f"{WIKITEXT} not found: set {DATA_VARIABLE} to a directory with {WIKITEXT_FILE} "
        "(wikitext-2-raw-v1, 1,290,590 bytes), or give the file itself as --corpus"
    )


def _jsonl(path: Path, text: str) -> Corpus:
    ids: list[tuple[int, ...]] = []
    texts: list[str] = []
    groups: list[str] = []
    sampled = None
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        row = _row(path, number, line)
        if number == 1 and "sampled_from" in row:
            sampled = str(row["sampled_from"])
            continue
        if isinstance(row.get("group"), str | int):
            groups.append(str(row["group"]))
        if _is_ids(row.get("ids")):
            ids.append(tuple(row["ids"]))
        elif isinstance(row.get("text"), str):
            texts.append(row["text"])
        else:
            raise ContentError(f"{path} line {number}: neither ids (whole numbers) nor text")
    if bool(ids) == bool(texts):
        raise ContentError(f"{path}: {'ids and text are mixed' if ids else 'no document'}")
    documents: list[Any] = list(ids) or list(texts)
    if groups and len(groups) != len(documents):
        raise ContentError(
            f"{path}: {len(groups)} of {len(documents)} documents have a group (a text or a whole "
            "number); give all of them one, or none"
        )
    kind = "token ids" if ids else "lines"
    return Corpus(
        path.name,
        f"{kind}, {len(documents)}",
        documents_digest(documents),
        tuple(texts),
        tuple(ids),
        sampled,
        groups=tuple(groups),
    )


def _is_ids(value: object) -> bool:
    return isinstance(value, list) and all(type(i) is int and i >= 0 for i in value)


def _row(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{path} line {number}: not JSON") from error
    if not isinstance(row, dict):
        raise ContentError(f"{path} line {number}: not an object")
    return row
