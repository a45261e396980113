# SPDX-License-Identifier: Apache-2.0
"""The history file: JSON lines, only ever added to.

A writer holds an exclusive lock (flock) while it adds its one line, so that writers at once lose
nothing. A writer that died leaves a line without an end. Reading it under the lock shows that
nobody is still writing it: a line that is whole gets its end, and the bytes of one that is not are
moved to FILE.torn; both are reported.
"""

from __future__ import annotations

import fcntl
import json
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from pydantic import ValidationError

from verifier.errors import MachineError, UsageError
from verifier.history.record import Record

MAX_LINE = 256 << 10
MAX_FILE = 512 << 20
MAX_NOTES = 20
Path = str | os.PathLike[str]


@dataclass
class Loaded:
    """The records of a history file in its order, and what was wrong with it; ``bad`` counts lines
    that were left out.
    """

    records: list[Record]
    notes: list[str] = field(default_factory=list)
    bad: int = 0


def append(file: Path, record: Record) -> None:
    """Add one line; the file and its folder are made.

    Raises:
        UsageError: the path is no file, or cannot be written.
        MachineError: the line could not be written whole; then nothing of it is left.
    """
    line = record.model_dump_json().encode() + b"\n"
    if len(line) > MAX_LINE:
        raise UsageError(
            f"the record has {len(line):,} bytes; a line of a history has at most {MAX_LINE:,}"
        )
    try:
        os.makedirs(os.path.dirname(os.path.abspath(file)), exist_ok=True)
        handle = os.open(
            file, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666
        )
    except (OSError, ValueError) as error:
        raise UsageError(
            f"history {os.fspath(file)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        _regular(handle, file)
        fcntl.flock(handle, fcntl.LOCK_EX)
        _mend(handle, file, [])
        start = os.fstat(handle).st_size
        try:
            done = 0
            while done < len(line):
                done += os.write(handle, line[done:])
            os.fsync(handle)
        except OSError:
            os.ftruncate(handle, start)
            raise
    except OSError as error:
        raise MachineError(f"history {os.fspath(file)}: {error.strerror or error}") from error
    finally:
        os.close(handle)


def load(file: Path) -> Loaded:
    """Read a history file; lines that are no record are left out, counted, and the first ones
    named.

    Raises:
        UsageError: no such file, or larger than 512 MiB.
        MachineError: reading failed.
    """
    found = Loaded([])
    seen: set[str] = set()
    with _locked(file, found.notes) as handle:
        if os.fstat(handle).st_size > MAX_FILE:
            raise UsageError(f"history {os.fspath(file)}: larger than {MAX_FILE:,} bytes")
        for number, raw in _lines(handle):
            record = parse(raw)
            if isinstance(record, str):
                found.bad += 1
                if found.bad <= MAX_NOTES:
                    found.notes.append(f"line {number}: {record}; it is left out")
            elif record.id in seen:
                found.notes.append(
                    f"line {number}: the run {record.id} stands there already; it is left out"
                )
            else:
                seen.add(record.id)
                found.records.append(record)
    if found.bad > MAX_NOTES:
        found.notes.append(f"and {found.bad - MAX_NOTES:,} more lines that are no records")
    del found.notes[2 * MAX_NOTES :]
    return found


def parse(raw: bytes) -> Record | str:
    """Return the record of a line, or what is wrong with it."""
    if len(raw) > MAX_LINE:
        return f"more than {MAX_LINE:,} bytes"
    try:
        return Record.model_validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        at = ".".join(map(str, first["loc"]))[:100]
        return f"no record: {at + ': ' if at else ''}{first['msg'][:200]}"


@contextmanager
def _locked(file: Path, notes: list[str]) -> Iterator[int]:
    """Open a history for reading, mended; where it cannot be written it is read as it is."""
    writable = os.access(file, os.W_OK)
    try:
        handle = os.open(
            file, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK
        )
    except FileNotFoundError as error:
        raise UsageError(
            f"no history {os.fspath(file)}; `ckptgate history add` or `gate --history` begin one"
        ) from error
    except (OSError, ValueError) as error:
        raise UsageError(
            f"history {os.fspath(file)}: {getattr(error, 'strerror', None) or error}"
        ) from error
    try:
        _regular(handle, file)
        fcntl.flock(handle, fcntl.LOCK_EX if writable else fcntl.LOCK_SH)
        _mend(handle, file, notes, write=writable)
        yield handle
    except OSError as error:
        raise MachineError(f"history {os.fspath(file)}: {error.strerror or error}") from error
    finally:
        os.close(handle)


def _regular(handle: int, file: Path) -> None:
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        raise UsageError(f"history {os.fspath(file)}: no regular file")


def _mend(handle: int, file: Path, notes: list[str], *, write: bool = True) -> None:
    """Give a last line without end its end where it is whole, else move its bytes to FILE.torn."""
    size = os.fstat(handle).st_size
    if not size or os.pread(handle, 1, size - 1) == b"\n":
        return
    start = max(0, size - MAX_LINE - 1)
    tail = os.pread(handle, size - start, start)
    torn = tail[tail.rfind(b"\n") + 1 :]
    if start and len(torn) == len(tail):
        notes.append(
            f"the last line has no end and more than {MAX_LINE:,} bytes; it is left as it is"
        )
        if write:
            os.lseek(handle, 0, os.SEEK_END)
            os.write(handle, b"\n")
        return
    whole = not isinstance(parse(torn), str)
    if not write:
        how = "taken" if whole else "left out"
        notes.append(f"the last line has no end; it is {how}, and the file cannot be mended here")
    elif whole:
        os.lseek(handle, 0, os.SEEK_END)
        os.write(handle, b"\n")
        notes.append("the last line had no end and is whole; its end was added")
    else:
        with open(f"{os.fspath(file)}.torn", "ab") as aside:
            aside.write(torn + b"\n")
            aside.flush()
            os.fsync(aside.fileno())
        os.ftruncate(handle, size - len(torn))
        notes.append(
            f"the last line was torn ({len(torn):,} bytes, a writer died); moved to {os.fspath(file)}.torn"
        )


def _lines(handle: int) -> Iterator[tuple[int, bytes]]:
    """Yield (number, line without its end), at most one byte more than `MAX_LINE` of it; blank
    lines are passed over.
    """
    with os.fdopen(os.dup(handle), "rb") as stream:
        stream.seek(0)
        number = 0
        while raw := stream.readline(MAX_LINE + 2):
            number += 1
            line = raw.rstrip(b"\n")
            while not raw.endswith(b"\n"):
                raw = stream.readline(1 << 20)
                if not raw:
                    break
            if line.strip():
                yield number, line


def dumps(record: Record) -> str:
    """Return a record as indented JSON."""
    return json.dumps(record.model_dump(), indent=2, ensure_ascii=True)
