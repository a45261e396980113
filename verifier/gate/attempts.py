# SPDX-License-Identifier: Apache-2.0
"""No re-rolls: every attempt of a pair is recorded, and one that follows must take the earlier
documents in.

An attempt on other text after one that did not pass would be drawn until it passes. More documents
are welcome when the earlier ones are among them; each look then has its share of the 5 % error
(Bonferroni).
"""

from __future__ import annotations

import fcntl
import json
import math
import os
from pathlib import Path
from typing import Any

from verifier.checkpoint import Checkpoint
from verifier.errors import MachineError, UsageError
from verifier.gate.corpora import Corpus, documents_digest
from verifier.gate.result import GateResult
from verifier.gate.score import weights_digest

FILE = "attempts.jsonl"


class Attempts:
    """The attempts of a cache folder: one JSON line each, appended only."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / FILE

    def looks(
        self, candidate: Checkpoint, base: Checkpoint, corpus: Corpus, window: int, protocol: str
    ) -> int:
        """Return which look this is at a pair, 1 for the first; the same documents again are no new
        look.

        Raises:
            UsageError: an earlier attempt did not pass, and its documents are not all among these.
        """
        ours = _documents(corpus)
        mine = _key(candidate, base, window, protocol)
        seen: list[frozenset[str]] = []
        for row in self._rows():
            documents = frozenset(row.get("documents", ()))
            if row.get("pair") != mine:
                continue
            if row.get("outcome") != "passed" and not documents <= ours:
                raise UsageError(
                    f"this pair was {row.get('outcome')} on {row.get('corpus')!r} before, and {len(documents - ours)} of "
                    f"those {len(documents)} documents are not in this corpus: score a corpus that holds them too "
                    f"({self.path} keeps the attempts)"
                )
            if documents != ours and documents not in seen:
                seen.append(documents)
        return 1 + len(seen)

    def last(self, base: Checkpoint, window: int, protocol: str) -> dict[str, Any] | None:
        """Return the last attempt on a base that has statistics, or None."""
        wanted = [weights_digest(base), window, protocol]
        found = [r for r in self._rows() if r["pair"][1:] == wanted and _usable(r)]
        return found[-1] if found else None

    def record(
        self,
        candidate: Checkpoint,
        base: Checkpoint,
        corpus: Corpus,
        window: int,
        protocol: str,
        result: GateResult,
        seconds: float,
    ) -> None:
        """Append an attempt and sync.

        Raises:
            MachineError: it could not be written.
        """
        row: dict[str, Any] = {
            "pair": _key(candidate, base, window, protocol),
            "corpus": corpus.name,
            "outcome": result.outcome,
            "candidate": candidate.uri,
            "documents": sorted(_documents(corpus)),
        }
        if (i := result.interval) is not None and math.isfinite(i.se):
            row |= {"scored": i.documents, "se": i.se, "delta": i.delta, "seconds": seconds}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                handle.write(json.dumps(row, sort_keys=True).encode() + b"\n")
                handle.flush()
                os.fsync(handle.fileno())
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror or error}") from error

    def _rows(self) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_bytes().splitlines()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror or error}") from error
        rows = []
        for line in lines:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                continue  # a line that a killed process tore
            if isinstance(row, dict) and all(
                isinstance(row.get(k), list) for k in ("documents", "pair")
            ):
                rows.append(row | {"documents": [str(d) for d in row["documents"]]})
        return rows


def _documents(corpus: Corpus) -> frozenset[str]:
    return frozenset(documents_digest([d])[:16] for d in corpus.ids or corpus.texts)


def _key(candidate: Checkpoint, base: Checkpoint, window: int, protocol: str) -> list[Any]:
    return [weights_digest(candidate), weights_digest(base), window, protocol]


def _usable(row: dict[str, Any]) -> bool:
    numbers = [row.get(k) for k in ("scored", "se", "delta", "seconds")]
    return all(isinstance(n, int | float) and math.isfinite(n) for n in numbers) and numbers[0] >= 2  # type: ignore[operator]
