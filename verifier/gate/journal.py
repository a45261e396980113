# SPDX-License-Identifier: Apache-2.0
"""Finished units on disk, so that a killed run goes on where it stopped and gives the same bits.

JSON lines beside the run file (``base.run.part``): a header, then a line a unit. A last line that
is torn is dropped.
"""

from __future__ import annotations

import base64
import fcntl
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from verifier.errors import MachineError, UsageError
from verifier.gate.jobs import Array, Piece

_DTYPES = {"<f4", "<f8", "<i4", "<i8"}


class Journal:
    """Units that are done, and a file that gets one line more for each; locked while it is open."""

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open or begin a journal.

        Raises:
            UsageError: another process writes it.
            MachineError: it cannot be written.
        """
        self.path, self.done = path, dict[int, Piece]()
        self.restarted = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise MachineError(f"{path}: {error.strerror or error}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise UsageError(f"{path}: another process is at this run") from None
        except OSError as error:
            self._file.close()
            raise MachineError(f"{path}: {error.strerror or error}") from error
        self._file.seek(0)
        first = _line(header)
        if self._file.readline() == first:
            self._read()
        else:
            self.restarted = path.stat().st_size > 0
            self._file.truncate(0)
            self._append(first)

    def _read(self) -> None:
        good = self._file.tell()
        for line, piece in _pieces(self._file):
            self.done[piece.unit] = piece
            good += len(line)
        self._file.truncate(good)

    def add(self, piece: Piece) -> None:
        """Append a unit and sync."""
        self.done[piece.unit] = piece
        arrays = {
            k: [v.dtype.str, list(v.shape), base64.b64encode(v.tobytes()).decode()]
            for k, v in piece.arrays.items()
        }
        self._append(
            _line(
                {
                    "unit": piece.unit,
                    "arrays": arrays,
                    "nonfinite": piece.nonfinite,
                    "experts": piece.experts,
                }
            )
        )

    def _append(self, line: bytes) -> None:
        try:
            self._file.write(line)
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise MachineError(f"{self.path}: {error.strerror or error}") from error

    def remove(self) -> None:
        """Delete the file: the run is whole."""
        self.path.unlink(missing_ok=True)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._file.close()


def units_in(path: Path, header: dict[str, Any]) -> dict[int, Piece]:
    """Return the units of another process's journal as far as they are whole; none where it is
    absent or of another run.
    """
    try:
        with path.open("rb") as file:
            return {p.unit: p for _, p in _pieces(file)} if file.readline() == _line(header) else {}
    except OSError:
        return {}


def _pieces(file: BinaryIO) -> Iterator[tuple[bytes, Piece]]:
    for line in file:
        piece = _parse(line)
        if piece is None:
            return
        yield line, piece


def _line(value: dict[str, Any]) -> bytes:
    body = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return f"{zlib.crc32(body.encode()):08x} {body}\n".encode()


def _parse(line: bytes) -> Piece | None:
    """Return a unit, or None for a line that is torn or not ours."""
    try:
        if not line.endswith(b"\n") or int(line[:8], 16) != zlib.crc32(line[9:-1]):
            return None
        value = json.loads(line[9:])
        arrays = {str(k): _array(*v) for k, v in value["arrays"].items()}
        return Piece(int(value["unit"]), arrays, list(value["nonfinite"]), dict(value["experts"]))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _array(dtype: str, shape: list[int], data: str) -> Array:
    if dtype not in _DTYPES:
        raise ValueError(dtype)
    return np.frombuffer(base64.b64decode(data, validate=True), dtype).reshape(shape)
