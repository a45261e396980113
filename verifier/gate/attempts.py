# SPDX-License-Identifier: Apache-2.0
"""No re-rolls: every attempt at candidates of a base is recorded, and all looks share one error.

A gate that is repeated until it passes proves nothing. An attempt that did not pass is a look that
is spent, whatever the next one changes: the text, the sequence length, the margin, or a byte of the
candidate. Look k has its share of the 5% error (`verifier.gate.decision.alpha_of`). A later corpus
takes all documents of an earlier one or none of them: with the scores of documents at hand, a part
could be chosen.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verifier.checkpoint import Checkpoint
from verifier.errors import UsageError
from verifier.evaluation import GateResult, Margin
from verifier.gate.corpora import document_digests
from verifier.gate.identity import identity_of
from verifier.gate.options import ScoringOptions
from verifier.jsonl import LineFile
from verifier.text import counted

FILE = "attempts.jsonl"
MAX_LINE = 1 << 28
MAX_NAMED = 3


class Spread(BaseModel):
    """What an attempt showed of how documents differ: enough to plan another one on its base."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True, allow_inf_nan=False)
    corpus: str = ""
    scored: int = Field(ge=2)
    se: float
    delta: float
    seconds: float


class _Attempt(BaseModel):
    """One line of the file.

    ``family``: the base's weights and the question, which attempts share the error of. ``look`` is
    the number that it had. The entries of one run of a suite share ``suite``, and are one look at
    their question. Lines of version 0.1 have ``pair`` instead: the candidate's weights, the
    base's, the sequence length and the protocol.
    """

    model_config = ConfigDict(extra="allow", frozen=True, strict=True)
    documents: list[Any]
    outcome: Any = None
    corpus: Any = None
    pair: list[Any] = []
    family: list[str] = []
    look_key: str = ""
    look: int = 1
    seq_len: int = 0
    series: str = ""
    margin: float | None = None
    corpus_sha256: str = ""
    base_nats: float | None = None
    suite: str = ""

    @property
    def key(self) -> str:
        """What two attempts share that give the same numbers."""
        return self.look_key or json.dumps([self.pair, sorted(set(map(str, self.documents)))])

    @property
    def of(self) -> list[str]:
        """The family."""
        if self.family:
            return self.family
        return [str(self.pair[1]), _question(str(self.pair[3]))] if len(self.pair) == 4 else []

    @property
    def scoring(self) -> list[Any]:
        """Sequence length and series, on which the spread of documents depends."""
        return [self.seq_len, self.series] if self.family else self.pair[2:]


@dataclass(frozen=True)
class Look:
    """A look at candidates of a base: its number, 1 for the first, and what the user should know of
    the earlier ones.

    ``base_record`` is the base's loss on the same documents in an earlier attempt, nats per token.
    """

    number: int = 1
    notes: tuple[str, ...] = ()
    base_record: float | None = None


@dataclass(frozen=True)
class Pair:
    """A candidate, its base, and how they are scored: the question that attempts try to answer."""

    candidate: Checkpoint
    base: Checkpoint
    options: ScoringOptions

    @cached_property
    def documents(self) -> frozenset[str]:
        """The digests of the corpus' documents."""
        return frozenset(document_digests(self.options.corpus))

    @property
    def family(self) -> list[str]:
        """What attempts share that are looks at one question: the base and what is asked, not the
        candidate, which a changed byte would make a new one.
        """
        return [self.base.weights_sha256, _question(self.options.series)]

    @property
    def scoring(self) -> list[Any]:
        """Sequence length and series, on which the spread of documents depends."""
        return [self.options.seq_len, self.options.series]

    def look_key(self, margins: Sequence[Margin], terms: Sequence[str] = ()) -> str:
        """Return a digest of everything that decides the numbers of a look, of its margins, and of
        its further terms.
        """
        corpus = self.options.corpus
        parts = [
            asdict(identity_of(self.candidate)),
            asdict(identity_of(self.base)),
            self.scoring,
            corpus.digest,
            corpus.group_numbers,
            [margin.nats for margin in margins],
            list(terms),
        ]
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


class Attempts:
    """The attempts of a cache directory: one JSON line each, only ever appended to."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def look(self, pair: Pair, margins: Sequence[Margin] = (), terms: Sequence[str] = ()) -> Look:
        """Return which look this is; an attempt that gives the same numbers as an earlier one is
        that one again.

        Args:
            pair: what is scored.
            margins: all that decide, that of the loss first.
            terms: what else decides, such as the accepted run that drift is measured from.

        Raises:
            UsageError: an earlier attempt did not pass, and only some of its documents are among
                these.
        """
        key = pair.look_key(margins, terms)
        attempts = [attempt for attempt in self._attempts() if attempt.of == pair.family]
        record = self._base_record(attempts, pair)
        again = next((attempt for attempt in attempts if attempt.key == key), None)
        if again is not None:
            return Look(again.look, base_record=record)
        spent: dict[str, _Attempt] = {}
        for attempt in attempts:
            if attempt.outcome != "passed":
                self._require_all_or_none(attempt, pair)
                spent[attempt.suite or attempt.key] = attempt
        return Look(1 + len(spent), tuple(_notes(list(spent.values()), margins)), record)

    def _require_all_or_none(self, attempt: _Attempt, pair: Pair) -> None:
        earlier = frozenset(map(str, attempt.documents))
        absent = earlier - pair.documents
        if absent and absent != earlier:
            raise UsageError(
                f"a candidate of this base was {attempt.outcome} on {attempt.corpus!r}, and "
                f"{len(absent)} of those {len(earlier)} documents are not in this corpus; score a "
                f"corpus that includes all of them, or none ({self.path} lists the attempts)"
            )

    def _base_record(self, attempts: Sequence[_Attempt], pair: Pair) -> float | None:
        """Return the base's best loss on these documents so far."""
        losses = [
            attempt.base_nats
            for attempt in attempts
            if attempt.corpus_sha256 == pair.options.corpus.digest
            and attempt.scoring == pair.scoring
            and attempt.base_nats is not None
        ]
        return min(losses, default=None)

    def last_spread(self, pair: Pair) -> Spread | None:
        """Return the spread of the last attempt on a pair's base that has statistics, or None."""
        spreads = [
            _spread(attempt)
            for attempt in self._attempts()
            if attempt.of == pair.family and attempt.scoring == pair.scoring
        ]
        return next((spread for spread in reversed(spreads) if spread is not None), None)

    def record(
        self,
        pair: Pair,
        result: GateResult,
        seconds: float,
        margins: Sequence[Margin] = (),
        terms: Sequence[str] = (),
        suite: str = "",
    ) -> None:
        """Append an attempt and sync.

        Args:
            pair: what was scored.
            result: of the gate.
            seconds: of scoring both.
            margins: as for `look`.
            terms: as for `look`.
            suite: names the run of a suite that it is a part of.

        Raises:
            MachineError: it could not be written.
        """
        corpus = pair.options.corpus
        row: dict[str, Any] = {
            "family": pair.family,
            "look_key": pair.look_key(margins, terms),
            "look": result.looks or 1,
            "seq_len": pair.options.seq_len,
            "series": pair.options.series,
            "corpus": corpus.name,
            "corpus_sha256": corpus.digest,
            "margin": result.margin.nats,
            "outcome": result.outcome,
            "candidate": pair.candidate.uri,
            "base_nats": result.base_nats,
            "documents": sorted(document_digests(corpus)),
        }
        if suite:
            row["suite"] = suite
        interval = result.interval
        if interval is not None and math.isfinite(interval.se) and interval.exact is None:
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


def _notes(spent: Sequence[_Attempt], margins: Sequence[Margin]) -> list[str]:
    """Return what a verdict says of the attempts before it that did not pass."""
    if not spent:
        return []
    texts = [f"{attempt.outcome} on {attempt.corpus}" for attempt in spent[-MAX_NAMED:]]
    noun = counted(len(spent), "earlier attempt")
    notes = [f"{noun} at candidates of this base did not pass ({', '.join(texts)})"]
    earlier = [attempt.margin for attempt in spent if attempt.margin is not None]
    if margins and earlier and margins[0].nats > min(earlier):
        notes.append(
            f"the margin of {margins[0].nats:.5f} is wider than the {min(earlier):.5f} of an "
            "attempt that did not pass"
        )
    return notes


def _question(series: str) -> str:
    """Return what a series asks: perplexity, however it is computed, or one task of lm-eval."""
    protocol, _, rest = series.partition("/")
    return f"task {rest.partition('/')[0]}" if protocol == "task" else "perplexity"


def _parse(line: bytes) -> _Attempt | None:
    try:
        attempt = _Attempt.model_validate_json(line)
    except ValidationError:
        return None
    return attempt if attempt.of else None


def _spread(attempt: _Attempt) -> Spread | None:
    try:
        return Spread.model_validate(attempt.model_dump())
    except ValidationError:
        return None
