# SPDX-License-Identifier: Apache-2.0
"""Scales that were folded into weights: a factor of each column and row, which the norm or layer
before, or the layer after, undoes (AWQ, SmoothQuant).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from verifier.decoding import Float32
from verifier.payload.cache import ResultCache
from verifier.reconstruction.blocks import (
    WeightPair,
    foreign_blocks,
    relative_error,
    rescaled_blocks,
)
from verifier.reconstruction.explanation import Explanation
from verifier.reconstruction.neighbours import Neighbours, Pair, layer_of
from verifier.reconstruction.transforms import Scaling, fit_scaling
from verifier.reconstruction.yardstick import by_max, nearest
from verifier.schemes import Module, fused_groups, role

ONE = 0.03
"""A factor of a whole weight within this of 1 is rounding."""
ROUTERS = frozenset({"gate", "router", "wg"})


class FoldedScales:
    """The factors of a checkpoint's weights, and what undoes them.

    Args:
        near: its weights next to the base's.
        results: keeps the factors of each module.
    """

    def __init__(self, near: Neighbours, results: ResultCache) -> None:
        self.near, self.results = near, results

    def scaling(self, module: Module) -> Scaling | None:
        """Return the factors of a module's rows and columns, worked out once."""
        return self.results.of_name("scaling", module.name, lambda: self._fit(module))

    def _fit(self, module: Module) -> Scaling | None:
        values = self.near.values(module)
        fit = fit_scaling(*values) if values is not None else None
        if values is None or fit is None or not (fit.intact and module.quantized):
            return fit
        scaled = np.asarray(fit.rows[:, None] * values[1] * fit.columns, np.float32)
        return replace(fit, intact=not self._has_wrong_blocks(module, values[0], scaled))

    def _has_wrong_blocks(self, module: Module, values: Float32, base: Float32) -> bool:
        """Whether some blocks are not the base's although their scales could hold it, or belong to
        a different scale, as QC517 finds them.
        """
        fmt = self.near.candidate.stored_format(module)
        if fmt is None:
            return False
        parts = {leaf: self.near.pair.payload.array(t) for leaf, t in module.parts.items()}
        pair = WeightPair(fmt, parts, values, base)
        best, encoded = nearest(base, parts, fmt), by_max(base, parts, fmt)
        if foreign_blocks(pair, best).count:
            return True
        return encoded is not None and rescaled_blocks(pair, encoded, best).count > 0

    def of_module(self, module: Module, limit: float) -> Explanation:
        """Return whether factors that something undoes explain a weight, up to a relative error."""
        fit = None if role(module.name) == "embedding" else self.scaling(module)
        if fit is None or fit.error > limit:
            return Explanation(False)
        if not fit.intact:
            return Explanation(False, fit.error, "some of its rows or blocks are not the base's")
        columns = _is_constant(fit.columns, fit.column_noise)
        if columns and _is_constant(fit.rows, fit.row_noise):
            return Explanation(False, fit.error)
        scale = self._undone_before(module, fit)
        if scale is None:
            return Explanation(False, fit.error, "nothing undoes the factors of its input channels")
        if not self._undone_after(module, fit, scale):
            against = "nothing undoes the factors of its output channels"
            return Explanation(False, fit.error, against)
        return Explanation(True, fit.error)

    def _undone_before(self, module: Module, fit: Scaling) -> float | None:
        """Return the factor that is left of all columns once a norm or the rows of the layer before
        undo the rest; None where nothing does.
        """
        scale = self._undone_by_norm(module, fit)
        if scale is not None:
            return scale
        width = len(fit.columns)
        for other in self.near.containers.get(module.name.rpartition(".")[0], ()):
            before = self.scaling(other) if other.dims and other is not module else None
            own = self._undone_by_norm(other, before) if before is not None else None
            rows = self._expanded(before.rows * own, width) if before and own is not None else None
            if rows is not None and _is_constant(fit.columns * rows, fit.column_noise):
                return _median(fit.columns * rows)
        return None

    def _undone_by_norm(self, module: Module, fit: Scaling) -> float | None:
        if _is_constant(fit.columns, fit.column_noise):
            return _median(fit.columns)
        for _, factor in self.near.norm_factors(layer_of(module.name), len(fit.columns)):
            if _is_constant(fit.columns * factor, fit.column_noise):
                return _median(fit.columns * factor)
        return None

    def _undone_after(self, module: Module, fit: Scaling, scale: float) -> bool:
        """Whether the rows have no factor, or the columns of a layer after undo it."""
        rows = np.asarray(fit.rows * np.float32(scale))
        if _is_constant(rows, fit.row_noise):
            return abs(_median(rows) - 1) <= ONE
        for other in self.near.containers.get(module.name.rpartition(".")[0], ()):
            if other is module or other.dims is None:
                continue
            wide = self._expanded(rows, other.dims[1])
            after = self.scaling(other) if wide is not None else None
            if wide is None or after is None:
                continue
            left = after.columns * wide
            if _is_constant(left, after.column_noise) and abs(_median(left) - 1) <= 2 * ONE:
                return True
        return False

    def _expanded(self, rows: Float32, width: int) -> Float32 | None:
        """Return factors of rows as factors of ``width`` columns: themselves, or repeated for the
        heads that share one key and value; None where they do not fit.
        """
        if len(rows) == width:
            return rows
        head = self.near.head_size
        if not head or len(rows) % head or width % len(rows):
            return None
        repeated = np.repeat(rows.reshape(-1, head), width // len(rows), axis=0)
        return np.asarray(repeated.reshape(-1), np.float32)

    def of_norm(self, norm: Module) -> bool:
        """Whether all layers that read a norm undo how it changed."""
        width = norm.weight.elements if norm.weight else 0
        layer = self.near.weights.get(layer_of(norm.name), [])
        readers = [m for m in layer if m.dims and m.dims[1] == width]
        factors = [f for m, f in self.near.norm_factors(layer_of(norm.name), width) if m is norm]
        return any(self._all_undo(readers, factor) for factor in factors)

    def _all_undo(self, readers: Sequence[Module], factor: Float32) -> bool:
        undo = {m.name for m in readers if self._undoes(m, factor)}
        if not undo:
            return False
        leaves = {name.rpartition(".")[2] for name in undo}
        joined = {
            n
            for _, group in fused_groups({m.name: m for m in readers})
            for n in group
            if undo & set(group)
        }
        experts = any(".experts." in name for name in undo)
        for module in readers:
            leaf = module.name.rpartition(".")[2]
            reads = leaf in leaves or module.name in joined or (experts and leaf in ROUTERS)
            if reads and module.name not in undo:
                return False
        return True

    def _undoes(self, module: Module, factor: Float32) -> bool:
        fit = self.scaling(module)
        if fit is None or _is_constant(factor, fit.column_noise):
            return False
        return _is_constant(fit.columns * factor, fit.column_noise)

    def of_bias(self, module: Module, values: Pair) -> Explanation:
        """Return whether a bias has the factors of its module's rows."""
        fit = self.scaling(module)
        scale = self._undone_before(module, fit) if fit is not None else None
        if fit is None or scale is None:
            return Explanation(False)
        error = relative_error(values[0], values[1] * fit.rows * np.float32(scale))
        return Explanation(error < 0.1, error)


def _is_constant(factors: Float32, noise: float) -> bool:
    """Whether factors are all the same, as far as they are known.

    Factors of rows and columns that are all zero are 0, and not known.
    """
    known = factors[factors != 0]
    if not known.size:
        return False
    off = np.abs(known / np.median(known) - 1)
    return bool(
        np.median(off) <= 0.01 + 2 * noise
        and np.quantile(off, 0.99) <= 0.1 + 8 * noise
        and off.max() <= 0.5 + 16 * noise
    )


def _median(factors: Float32) -> float:
    known = factors[factors != 0]
    return float(np.median(known)) if known.size else 0.0
