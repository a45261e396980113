# SPDX-License-Identifier: Apache-2.0
"""What turns one weight into another: factors of rows and columns, a rotation, a permutation.

All functions take float32 weights [out, in] and say how much of a difference they explain. None
knows of checkpoints.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from verifier.decoding import Float32
from verifier.reconstruction.distance import block_norms2

STEPS, SETTLED = 8, 2e-3
"""Rounds of the fit of rows and columns at most, each of two passes over the weight, and the change
of a row's factor below which another round is not needed."""
PROBES = 16
"""Random inputs that a rotated weight is applied to."""
FAR, FAR_BLOCK = 0.8, 1.2
"""A row, or a block of `BLOCK` values, of which more than this relative error is left is that of a
different weight: there 1.4 is left."""
BLOCK = 32
CLOSE = 0.9
"""Correlation from which on two rows are the same row."""
MATCHED_ROWS, MATCHED_COLUMNS = 48, 2048


@dataclass(frozen=True, slots=True)
class Scaling:
    """Factors of rows and columns under which a base comes closest to a weight.

    Attributes:
        rows: [out].
        columns: [in]; only the products with ``rows`` are determined.
        error: relative error that is left.
        row_noise: standard error of a row's factor, relative.
        column_noise: that of a column's.
        intact: whether no row, column or block is left that the factors do not explain.
    """

    rows: Float32
    columns: Float32
    error: float
    row_noise: float
    column_noise: float
    intact: bool


def fit_scaling(values: Float32, base: Float32) -> Scaling | None:
    """Return the factors of rows and columns that explain a weight best, by alternating least
    squares; None where the base is all zero or something is not finite.
    """
    with np.errstate(all="ignore"):
        cross, square = values * base, base * base
        rows, columns = np.ones(len(base), np.float32), np.ones(base.shape[1], np.float32)
        for _ in range(STEPS):
            columns = _ratio(rows @ cross, (rows * rows) @ square)
            before, rows = rows, _ratio(cross @ columns, square @ (columns * columns))
            if np.abs(rows - before).max(initial=0) <= SETTLED * np.abs(rows).max(initial=0):
                break
        scale = np.median(rows[rows != 0]) if rows.any() else np.float32(0)
        if not np.isfinite(scale) or scale == 0:
            return None
        rows, columns = np.asarray(rows / scale, np.float32), np.asarray(columns * scale)
        scaled = rows[:, None] * base * columns
        left = values - scaled
        error = _relative(left, scaled)
    if not np.isfinite(error):
        return None
    positive = (rows > 0) | ~base.any(axis=1)
    positive_columns = (columns > 0) | ~base.any(axis=0)
    intact = bool(positive.all() and positive_columns.all()) and is_intact(values, scaled)
    out, width = base.shape
    return Scaling(
        rows, columns, error, error / float(np.sqrt(width)), error / float(np.sqrt(out)), intact
    )


def is_intact(values: Float32, target: Float32) -> bool:
    """Whether no row and no block of `BLOCK` values is that of a different weight."""
    width = min(BLOCK, target.shape[1])
    far, size = (block_norms2(x, width) for x in (values - target, target))
    usual = float(size.mean())
    if (far > np.float32(FAR_BLOCK**2) * np.maximum(size, np.float32(usual / 2))).any():
        return False
    return not far_rows(values, target).any()


def far_rows(values: Float32, target: Float32) -> npt.NDArray[np.bool_]:
    """Return which rows are not those of the target, [rows]."""
    far = np.square(values - target).sum(axis=1)
    size = np.square(target).sum(axis=1)
    limit = np.maximum(size, np.float32(float(size.mean()) / 16))
    result: npt.NDArray[np.bool_] = ~(far <= np.float32(FAR**2) * limit)
    return result


@dataclass(frozen=True, slots=True)
class Rotation:
    """An orthogonal matrix that turns the inputs of a model's layers.

    Attributes:
        anchors: rows of the base that the layers read, [k, n].
        turned: the same rows of the candidate, [k, n].
        matrix: base rows @ matrix = candidate rows, [n, n]; None where too few rows determine it.
    """

    anchors: Float32
    turned: Float32
    matrix: Float32 | None = None

    def input_error(self, values: Float32, base: Float32) -> tuple[float, bool]:
        """Return the relative error of a weight that reads what is turned, and whether no row is
        that of a different weight.

        A weight and its anchors turn alike, so the products of their rows stay as they were.
        """
        turned, plain = values @ self.turned.T, base @ self.anchors.T
        return _relative(turned - plain, plain), not far_rows(turned, plain).any()

    def output_error(self, values: Float32, base: Float32) -> tuple[float, bool]:
        """Return the same for a weight whose output is turned."""
        turned, plain = self.turned @ values, self.anchors @ base
        error = _relative(turned - plain, plain)
        intact = not far_rows(turned.T, plain.T).any()
        if self.matrix is None:
            return error, intact
        probes = _probes(base.shape[1])
        turned, plain = values @ probes, self.matrix.T @ (base @ probes)
        return max(error, _relative(turned - plain, plain)), intact and not (
            far_rows(turned, plain).any()
        )

    def composed_error(
        self, values: tuple[Float32, Float32], base: tuple[Float32, Float32]
    ) -> tuple[float, bool]:
        """Return the same for two weights, one after the other, with a rotation of their own
        between them: (of the first, [m, n]; of the second, [n, m]).
        """
        turned = values[1] @ (values[0] @ self.turned.T)
        plain = base[1] @ (base[0] @ self.anchors.T)
        if self.matrix is not None:
            plain = self.matrix.T @ plain
        else:
            turned, plain = self.turned @ turned, self.anchors @ plain
        return _relative(turned - plain, plain), not far_rows(turned, plain).any()


def is_rotation(base: Float32, turned: Float32) -> bool:
    """Whether the products of all pairs of rows are equal: then one rotation turns all rows."""
    plain, moved = base @ base.T, turned @ turned.T
    beside = ~np.eye(len(base), dtype=bool)
    return (
        _relative(moved - plain, plain) < 0.02
        and _relative((moved - plain)[beside], plain[beside]) < 0.1
    )


def rotation_matrix(pairs: Sequence[tuple[Float32, Float32]]) -> Float32 | None:
    """Return the orthogonal matrix that turns base rows into candidate rows, by least squares and
    one step towards the nearest orthogonal matrix; None where the rows do not determine it.

    Args:
        pairs: (rows of the base, the same rows of the candidate), each [m, n].
    """
    width = pairs[0][0].shape[1]
    if sum(len(base) for base, _ in pairs) < 2 * width:
        return None
    gram, cross = np.zeros((2, width, width), np.float32)
    for base, turned in pairs:
        gram += base.T @ base
        cross += base.T @ turned
    gram += np.float32(1e-5 * np.trace(gram) / width) * np.eye(width, dtype=np.float32)
    try:
        matrix = np.linalg.solve(gram, cross)
    except np.linalg.LinAlgError:
        return None
    for _ in range(2):
        matrix = matrix @ (1.5 * np.eye(width, dtype=np.float32) - 0.5 * (matrix.T @ matrix))
    error = _relative(matrix.T @ matrix - np.eye(width), np.eye(width))
    return np.asarray(matrix, np.float32) if error < 0.05 else None


def permuted(values: Float32, base: Float32) -> str:
    """Return ``rows`` or ``columns`` where a permutation of those explains a weight, else ''."""
    if _is_permuted(values, base):
        return "rows"
    return "columns" if _is_permuted(values.T, base.T) else ""


def _is_permuted(values: Float32, base: Float32) -> bool:
    """Whether rows of a weight are rows of the base in a different order."""
    picked = np.unique(np.linspace(0, len(values) - 1, MATCHED_ROWS).astype(int))
    own, others = values[picked, :MATCHED_COLUMNS], base[:, :MATCHED_COLUMNS]
    if own.shape[1] < 8:
        return False
    with np.errstate(all="ignore"):
        own = own / np.linalg.norm(own, axis=1, keepdims=True)
        others = others / np.linalg.norm(others, axis=1, keepdims=True)
        match = np.nan_to_num(own @ others.T)
    best = match.argmax(axis=1)
    close = match[np.arange(len(picked)), best] > CLOSE
    return bool(close.mean() > 0.9 and (best != picked).mean() > 0.5)


def _probes(width: int) -> Float32:
    """Return random inputs, [width, `PROBES`], the same on every call."""
    return np.random.default_rng(519).normal(0, 1, (width, PROBES)).astype(np.float32)


def _ratio(above: npt.NDArray[np.floating], below: npt.NDArray[np.floating]) -> Float32:
    return np.asarray(np.where(below > 0, above / below, 0), np.float32)


def _relative(left: npt.NDArray[np.floating], size: npt.NDArray[np.floating]) -> float:
    with np.errstate(all="ignore"):
        whole = float(np.sqrt(np.square(size, dtype=np.float64).sum()))
        error = float(np.sqrt(np.square(left, dtype=np.float64).sum()))
    return error / whole if whole > 0 and np.isfinite(error) else float("inf")
