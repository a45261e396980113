# SPDX-License-Identifier: Apache-2.0
"""Finished units on disk, so that a killed run resumes and gives the same bits.

JSON lines next to the run file (``base.run.part``), each with a checksum: a header, then one line
per unit. Lines from the first damaged one on are dropped.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from verifier.errors import UsageError
from verifier.gate.jobs import Array, UnitScores
from verifier.jsonl import Line, LineFile, read_lines

_DTYPES = {"<f4", "<f8", "<i4", "<i8"}


class Journal:
    """The units that are done, and a file that gets one line for each; locked while it is open.

    ``restarted`` is True where the file held the units of another run, which are dropped.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        """Open a journal, or begin one.

        Raises:
            UsageError: another process writes it.
            MachineError: it cannot be written.
        """
        self.path, self.done = path, dict[int, UnitScores]()
        self.restarted = False
        try:
            self._file = LineFile.open(path, create=True, wait=False)
        except BlockingIOError:
            raise UsageError(f"{path}: another process is writing this run") from None
        lines = self._file.lines()
        first = next(lines, None)
        if first is not None and first.content == _line(header) and first.terminated:
            self._resume(first, lines)
        else:
            self.restarted = first is not None
            self._file.truncate(0)
            self._file.append(_line(header))

    def _resume(self, first: Line, lines: Iterator[Line]) -> None:
        end = first.end
        for line_end, scores in _units(lines):
            self.done[scores.unit] = scores
            end = line_end
        self._file.truncate(end)

    def add(self, scores: UnitScores) -> None:
        """Append a unit and sync."""
        self.done[scores.unit] = scores
        arrays = {
            name: [v.dtype.str, list(v.shape), base64.b64encode(v.tobytes()).decode()]
            for name, v in scores.arrays.items()
        }
        row = {
            "unit": scores.unit,
            "arrays": arrays,
            "nonfinite": scores.nonfinite,
            "experts": scores.experts,
        }
        self._file.append(_line(row))

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._file.close()


def units_in(path: Path, header: dict[str, Any]) -> dict[int, UnitScores]:
    """Return the complete units of another process's journal; none where it is absent or of another
    run.
    """
    try:
        with path.open("rb") as stream:
            lines = read_lines(stream)
            first = next(lines, None)
            if first is None or first.content != _line(header):
                return {}
            return {scores.unit: scores for _, scores in _units(lines)}
    except OSError:
        return {}


def _units(lines: Iterator[Line]) -> Iterator[tuple[int, UnitScores]]:
    """Yield the offset of each line's end, and the unit in it, up to the first damaged line."""
    for line in lines:
        scores = _parse(line)
        if scores is None:
            return
        yield line.end, scores


def _line(value: dict[str, Any]) -> bytes:
    body = json.dumps(value, separators=(",", ":"), sort_keys=True)
    return f"{zlib.crc32(body.encode()):08x} {body}".encode()


def _parse(line: Line) -> UnitScores | None:
    """Return the unit in a line, or None where the line is torn, damaged or of another kind."""
    try:
        if not line.terminated or int(line.content[:8], 16) != zlib.crc32(line.content[9:]):
            return None
        value = json.loads(line.content[9:])
        arrays = {str(name): _array(*array) for name, array in value["arrays"].items()}
        return UnitScores(
            int(value["unit"]), arrays, list(value["nonfinite"]), dict(value["experts"])
        )
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _array(dtype: str, shape: list[int], data: str) -> Array:
    if dtype not in _DTYPES:
        raise ValueError(dtype)
    return np.frombuffer(base64.b64decode(data, validate=True), dtype).reshape(shape)
