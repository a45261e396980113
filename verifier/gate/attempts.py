# SPDX-License-Identifier: Apache-2.0
"""No re-rolls: every attempt at a pair is recorded, and a later one must include the earlier
documents.

An attempt on other text after one that did not pass would be drawn until it passes. More documents
are welcome when the earlier ones are among them; each look then has its share of the 5% error
(Bonferroni).
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verifier.checkpoint import Checkpoint
from verifier.errors import UsageError
from verifier.evaluation import GateResult
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.options import ScoringOptions
from verifier.jsonl import LineFile

FILE = "attempts.jsonl"
MAX_LINE = 1 << 28


class Spread(BaseModel):
    """What an attempt showed of how documents differ: enough to plan another one on its base."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)
    corpus: str = ""
    scored: int = Field(ge=2)
    se: float
    delta: float
    seconds: float


class _Attempt(BaseModel):
    """One line of the file."""

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    pair: list[Any]
    documents: list[Any]
    outcome: Any = None
    corpus: Any = None


@dataclass(frozen=True)
class Pair:
    """A candidate, its base, and how they are scored: the question that attempts try to answer."""

    candidate: Checkpoint
    base: Checkpoint
    options: ScoringOptions

    @property
    def documents(self) -> frozenset[str]:
        """The digests of the corpus' documents."""
        return _digests(self.options.corpus)

    @property
    def base_key(self) -> list[Any]:
        """What attempts at candidates of one base share."""
        return [self.base.weights_sha256, self.options.seq_len, self.options.series]

    @property
    def key(self) -> list[Any]:
        """What attempts at one pair share."""
        return [self.candidate.weights_sha256, *self.base_key]


class Attempts:
    """The attempts of a cache directory: one JSON line each, only ever appended to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def looks(self, pair: Pair) -> int:
        """Return which look this is at a pair, 1 for the first; the same documents again are not a
        new look.

        Raises:
            UsageError: an earlier attempt did not pass, and its documents are not all among these.
        """
        documents = pair.documents
        seen: list[frozenset[str]] = []
        for attempt in self._attempts():
            if attempt.pair != pair.key:
                continue
            earlier = frozenset(map(str, attempt.documents))
            if attempt.outcome != "passed" and not earlier <= documents:
                raise UsageError(
                    f"this pair was {attempt.outcome} on {attempt.corpus!r}, and "
                    f"{len(earlier - documents)} of those {len(earlier)} documents are not in this "
                    f"corpus; score a corpus that includes them ({self.path} lists the attempts)"
                )
            if earlier != documents and earlier not in seen:
                seen.append(earlier)
        return 1 + len(seen)

    def last_spread(self, pair: Pair) -> Spread | None:
        """Return the spread of the last attempt on a pair's base that has statistics, or None."""
        spreads = [
            _spread(attempt) for attempt in self._attempts() if attempt.pair[1:] == pair.base_key
        ]
        return next((spread for spread in reversed(spreads) if spread is not None), None)

    def record(self, pair: Pair, result: GateResult, seconds: float) -> None:
        """Append an attempt and sync.

        Raises:
            MachineError: it could not be written.
        """
        row: dict[str, Any] = {
            "pair": pair.key,
            "corpus": pair.options.corpus.name,
            "outcome": result.outcome,
            "candidate": pair.candidate.uri,
            "documents": sorted(pair.documents),
        }
        interval = result.interval
        if interval is not None and math.isfinite(interval.se):
            row |= {
                "scored": interval.documents,
                "se": interval.se,
                "delta": interval.delta,
                "seconds": seconds,
            }
        with LineFile.open(self.path, create=True) as file:
            file.repair(lambda line: _parse(line) is not None, MAX_LINE)
            file.append(json.dumps(row, sort_keys=True).encode())

    def _attempts(self) -> list[_Attempt]:
        """Return the attempts; damaged lines are skipped.

        Raises:
            MachineError: reading failed.
        """
        if not self.path.exists():
            return []
        with LineFile.open(self.path) as file:
            attempts = [_parse(line.content) for line in file.lines()]
        return [attempt for attempt in attempts if attempt is not None]


def _parse(line: bytes) -> _Attempt | None:
    try:
        return _Attempt.model_validate_json(line)
    except ValidationError:
        return None


def _spread(attempt: _Attempt) -> Spread | None:
    try:
        return Spread.model_validate(attempt.model_dump())
    except ValidationError:
        return None


def _digests(corpus: Corpus) -> frozenset[str]:
    return frozenset(documents_digest([document])[:16] for document in corpus.documents)
