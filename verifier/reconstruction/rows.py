# SPDX-License-Identifier: Apache-2.0
"""A weight and its base, some rows at a time: memory does not grow with the weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from verifier.errors import ContentError
from verifier.reconstruction.distance import PIECE, Distance, Piece, distance, peak_of
from verifier.rules.context import Context, QuantizedCheckpoint
from verifier.schemes import Format, Module

HELD = 64 << 20
"""Bytes of a remote base's weight that are kept for its second reading."""


class WeightPieces:
    """A weight and its base, some rows at a time; a remote base of moderate size is fetched
    once.
    """

    def __init__(
        self, ctx: Context, module: Module, base: QuantizedCheckpoint, source: Module
    ) -> None:
        self.ctx, self.module, self.base, self.source = ctx, module, base, source
        self.fit = source.dims == module.dims and module.dims is not None
        # The base is walked twice. What the system's cache holds is cheaper to read again than
        # fresh memory is.
        self.held: list[npt.NDArray[Any]] = []
        self.holds = (
            base.checkpoint.source.remote
            and source.weight is not None
            and source.weight.nbytes <= HELD
        )

    def __iter__(self) -> Iterator[Piece]:
        for start, stop, wanted in self._base():
            yield Piece(self.ctx.stored_rows(self.module, start, stop), wanted)

    def _base(self) -> Iterator[tuple[int, int, npt.NDArray[Any]]]:
        out, in_ = self.module.dims or (0, 0)
        count = max(1, PIECE // max(1, in_))
        count = max(128, count // 128 * 128)  # FP8's tiles have 128 rows
        for i, start in enumerate(range(0, out, count)):
            stop = min(out, start + count)
            if i < len(self.held):
                yield start, stop, self.held[i]
                continue
            rows = self.base.rows(self.source, start, stop)
            if rows is None:
                raise ContentError(f"{self.source.name}: its values cannot be decoded")
            if self.holds:
                self.held.append(rows)
            yield start, stop, rows

    def distance(self, found: Format) -> tuple[Distance, bool]:
        """Return how far the decoded weight is from the base, and whether ``max`` calibration is
        defined on it.
        """
        return distance(
            self, found.name, max((peak_of(w) for _, _, w in self._base()), default=0.0)
        )
