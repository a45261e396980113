# SPDX-License-Identifier: Apache-2.0
"""Append-only files with one record per line: lock, append, sync, repair.

A file is locked (flock) as long as it is open, so concurrent writers lose nothing. A writer that
was killed leaves a torn last line: bytes after the last newline. Whoever holds the lock knows that
nobody is still writing them, and may repair the file.
"""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import BinaryIO, NamedTuple, Self

from verifier.errors import CkptgateError, MachineError, UsageError

Path = str | os.PathLike[str]
_CHUNK = 1 << 20


class Line(NamedTuple):
    """One line: its number from 1, its bytes without the newline, and the offset of its end.

    ``terminated`` is False for a last line that has no newline.
    """

    number: int
    content: bytes
    end: int
    terminated: bool


class LineFile:
    """An open and locked file of lines. Use as a context manager, or call `close`."""

    def __init__(self, path: Path, handle: int, *, writable: bool) -> None:
        self.path, self.writable = os.fspath(path), writable
        self._handle = handle

    @classmethod
    def open(
        cls,
        path: Path,
        *,
        create: bool = False,
        wait: bool = True,
        error: type[CkptgateError] = MachineError,
    ) -> Self:
        """Open and lock a file; one that cannot be written is opened for reading.

        Args:
            path: the file.
            create: make the file, and its directory, where it does not exist.
            wait: wait for a lock that another process holds.
            error: what is raised when the file cannot be opened.

        Raises:
            BlockingIOError: another process holds the lock, and ``wait`` is False.
            UsageError: the path is not a regular file.
            OSError: the file system has no locks.
        """
        try:
            if create:
                os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
            writable = create or os.access(path, os.W_OK)
            flags = os.O_RDWR | os.O_APPEND if writable else os.O_RDONLY
            flags |= os.O_CREAT if create else 0
            handle = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        except (OSError, ValueError) as cause:
            raise error(_message(path, cause)) from cause
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise UsageError(f"{os.fspath(path)}: not a regular file")
            kind = fcntl.LOCK_EX if writable else fcntl.LOCK_SH
            fcntl.flock(handle, kind if wait else kind | fcntl.LOCK_NB)
        except BaseException:
            os.close(handle)
            raise
        return cls(path, handle, writable=writable)

    @property
    def size(self) -> int:
        """The file's bytes."""
        return os.fstat(self._handle).st_size

    def append(self, content: bytes) -> None:
        """Append a line and sync it; ``content`` has no newline.

        Raises:
            MachineError: the line could not be written; then nothing of it is left.
        """
        start, left = self.size, memoryview(content + b"\n")
        try:
            while left:
                left = left[os.write(self._handle, left) :]
            os.fsync(self._handle)
        except OSError as error:
            os.ftruncate(self._handle, start)
            raise MachineError(_message(self.path, error)) from error

    def lines(self, limit: int | None = None) -> Iterator[Line]:
        """Yield the lines; of one that is longer than ``limit``, its first ``limit + 1`` bytes.

        Raises:
            MachineError: reading failed.
        """
        try:
            with os.fdopen(os.dup(self._handle), "rb") as stream:
                stream.seek(0)
                yield from read_lines(stream, limit)
        except OSError as error:
            raise MachineError(_message(self.path, error)) from error

    def truncate(self, size: int) -> None:
        """Cut the file to its first ``size`` bytes."""
        try:
            os.ftruncate(self._handle, size)
        except OSError as error:
            raise MachineError(_message(self.path, error)) from error

    def repair(self, complete: Callable[[bytes], bool], limit: int) -> str:
        """Repair a torn last line and return what was done, '' where the file ends with a newline.

        A complete record gets its newline. Other bytes are moved to ``PATH.torn``. A file that
        cannot be written stays as it is.

        Args:
            complete: whether a line is a whole record.
            limit: the bytes of the longest line.

        Raises:
            MachineError: reading or writing failed.
        """
        try:
            size = self.size
            if not size or os.pread(self._handle, 1, size - 1) == b"\n":
                return ""
            start = max(0, size - limit - 1)
            tail = os.pread(self._handle, size - start, start)
            torn = tail[tail.rfind(b"\n") + 1 :]
            if start and len(torn) == len(tail):
                return self._terminate(f"has no newline and more than {limit:,} bytes; kept")
            if complete(torn):
                return self._terminate("had no newline; added" if self.writable else "is complete")
            if not self.writable:
                return "the last line is torn; skipped (the file is read-only)"
            self._set_aside(torn)
            os.ftruncate(self._handle, size - len(torn))
        except OSError as error:
            raise MachineError(_message(self.path, error)) from error
        return f"the last line was torn ({len(torn):,} bytes); moved to {self.path}.torn"

    def _terminate(self, state: str) -> str:
        if self.writable:
            os.write(self._handle, b"\n")
        return f"the last line {state}"

    def _set_aside(self, torn: bytes) -> None:
        with open(f"{self.path}.torn", "ab") as file:
            file.write(torn + b"\n")
            file.flush()
            os.fsync(file.fileno())

    def close(self) -> None:
        """Unlock and close the file."""
        os.close(self._handle)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def read_lines(stream: BinaryIO, limit: int | None = None) -> Iterator[Line]:
    """Yield the lines of a stream; of one that is longer than ``limit``, its first ``limit + 1``
    bytes.
    """
    end = number = 0
    while raw := stream.readline(-1 if limit is None else limit + 1):
        number += 1
        end += len(raw)
        content, last = raw.removesuffix(b"\n"), raw
        while not last.endswith(b"\n") and (last := stream.readline(_CHUNK)):
            end += len(last)
        yield Line(number, content, end, last.endswith(b"\n"))


def _message(path: Path, error: Exception) -> str:
    return f"{os.fspath(path)}: {getattr(error, 'strerror', None) or error}"
