# SPDX-License-Identifier: Apache-2.0
"""An SQLite index beside a history file, FILE.sqlite: made from it, thrown away with it, never read
back into it.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import tempfile

from verifier.errors import MachineError, UsageError
from verifier.history.journal import Loaded, load

Path = str | os.PathLike[str]
SCHEMA = """
CREATE TABLE runs (position INTEGER PRIMARY KEY, id TEXT UNIQUE, time TEXT, kind TEXT, name TEXT, series TEXT, label TEXT,
  verdict TEXT, recipe TEXT, checkpoint TEXT, "commit" TEXT, seconds REAL, record TEXT);
CREATE TABLE measures (run TEXT REFERENCES runs (id), measure TEXT, value REAL, low REAL, high REAL, se REAL, margin REAL);
CREATE INDEX runs_of_a_series ON runs (series, position);
CREATE INDEX measures_of_a_run ON measures (measure, run);
"""


def index_of(file: Path) -> str:
    """Return where the index of a history lies."""
    return f"{os.fspath(file)}.sqlite"


def reindex(file: Path) -> Loaded:
    """Write the index anew under a temporary name and rename it; return what it was made from.

    Raises:
        UsageError: no such history, or its folder cannot be written.
        MachineError: the index could not be written; the one before is as it was.
    """
    found = load(file)
    folder = os.path.dirname(os.path.abspath(file))
    try:
        handle, temporary = tempfile.mkstemp(prefix=".ckptgate-", dir=folder)
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror or error}") from error
    os.close(handle)
    try:
        _fill(temporary, found)
        os.replace(temporary, index_of(file))
    except (sqlite3.Error, OSError) as error:
        raise MachineError(f"{index_of(file)}: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
    return found


def _fill(path: str, found: Loaded) -> None:
    with contextlib.closing(sqlite3.connect(path)) as db, db:
        db.executescript(SCHEMA)
        db.executemany(
            f"INSERT INTO runs VALUES ({','.join('?' * 13)})",  # noqa: S608  (question marks)
            [
                (
                    i,
                    r.id,
                    r.time,
                    r.kind,
                    r.name,
                    r.series,
                    r.label,
                    r.verdict,
                    r.recipe.get("sha256"),
                    r.checkpoint.get("files_sha256") or r.checkpoint.get("header_sha256"),
                    r.commit,
                    r.seconds,
                    r.model_dump_json(),
                )
                for i, r in enumerate(found.records)
            ],
        )
        db.executemany(
            "INSERT INTO measures VALUES (?,?,?,?,?,?,?)",
            [
                (r.id, n, m.value, m.low, m.high, m.se, m.margin)
                for r in found.records
                for n, m in r.measures.items()
            ],
        )
