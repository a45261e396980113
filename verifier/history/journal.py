# SPDX-License-Identifier: Apache-2.0
"""The history file: JSON lines, only ever appended to.

A writer that was killed leaves a torn last line. The next one who opens the file repairs it, and a
reader reports that.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

from pydantic import ValidationError

from verifier.errors import UsageError
from verifier.history.record import Record
from verifier.jsonl import LineFile
from verifier.text import counted

MAX_LINE = 256 << 10
MAX_FILE = 512 << 20
MAX_NOTES = 20
Path = str | os.PathLike[str]


@dataclass
class History:
    """The records of a history file, in its order, and what was wrong with it; ``bad`` counts lines
    that were skipped.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    bad: int = 0


def append(file: Path, record: Record) -> None:
    """Append one line; the file and its directory are made.

    Raises:
        UsageError: the path is not a file, or cannot be written.
        MachineError: the line could not be written; then nothing of it is left.
    """
    line = record.model_dump_json().encode()
    if len(line) >= MAX_LINE:
        raise UsageError(
            f"the record has {len(line):,} bytes; a line of a history has at most {MAX_LINE:,}"
        )
    with LineFile.open(file, create=True, error=UsageError) as lines:
        lines.repair(_is_record, MAX_LINE)
        lines.append(line)


def load(file: Path) -> History:
    """Read a history file; lines that are not records are skipped and counted, and the first ones
    named.

    Raises:
        UsageError: no such file, or larger than 512 MiB.
        MachineError: reading failed.
    """
    if not os.path.lexists(file):
        raise UsageError(
            f"no history {os.fspath(file)}; start one with `ckptgate history add` or "
            "`gate --history`"
        )
    history = History([])
    with LineFile.open(file, error=UsageError) as lines:
        if lines.size > MAX_FILE:
            raise UsageError(f"{os.fspath(file)}: larger than {MAX_FILE:,} bytes")
        if repaired := lines.repair(_is_record, MAX_LINE):
            history.notes.append(repaired)
        seen: set[str] = set()
        for line in lines.lines(MAX_LINE):
            if line.content.strip():
                _add(history, seen, line.number, parse(line.content))
    if history.bad > MAX_NOTES:
        more = counted(history.bad - MAX_NOTES, "more line")
        history.notes.append(f"{more} without a record")
    del history.notes[2 * MAX_NOTES :]
    return history


def _add(history: History, seen: set[str], number: int, record: Record | str) -> None:
    if isinstance(record, str):
        history.bad += 1
        if history.bad <= MAX_NOTES:
            history.notes.append(f"line {number}: {record}; skipped")
    elif record.id in seen:
        history.notes.append(f"line {number}: a duplicate of run {record.id}; skipped")
    else:
        seen.add(record.id)
        history.records.append(record)


def parse(line: bytes) -> Record | str:
    """Return the record in a line, or what is wrong with it."""
    if len(line) > MAX_LINE:
        return f"more than {MAX_LINE:,} bytes"
    try:
        return Record.model_validate_json(line)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        field_name = ".".join(map(str, first["loc"]))[:100]
        return f"not a record: {field_name}{': ' if field_name else ''}{first['msg'][:200]}"


def _is_record(line: bytes) -> bool:
    return isinstance(parse(line), Record)


def dumps(record: Record) -> str:
    """Return a record as indented JSON."""
    return json.dumps(record.model_dump(), indent=2, ensure_ascii=True)
