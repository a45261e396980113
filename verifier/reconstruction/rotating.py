# SPDX-License-Identifier: Apache-2.0
"""Rotated weights: one orthogonal matrix turns what all layers read and write, and norms are folded
into what reads them (QuaRot, SpinQuant).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property

import numpy as np

from verifier.decoding import Float32
from verifier.payload.cache import ResultCache
from verifier.reconstruction.blocks import relative_error
from verifier.reconstruction.distance import floats
from verifier.reconstruction.explanation import EXACT, LIMIT, LOST, Explanation, all_of
from verifier.reconstruction.neighbours import Neighbours, Pair, layer_of
from verifier.reconstruction.rows import value_rows
from verifier.reconstruction.transforms import Rotation, is_rotation, rotation_matrix
from verifier.schemes import Module, role

ANCHORS = 64
"""Rows of the embedding that a weight's rows are multiplied with."""
WIDEST = 4096
"""Inputs up to which the rotation itself is worked out, once per process; it takes a minute."""


class RotatedWeights:
    """The rotation of a checkpoint's residual stream, as its embedding shows it.

    Args:
        near: its weights next to the base's.
        results: keeps what is worked out for two modules at once.
    """

    def __init__(self, near: Neighbours, results: ResultCache) -> None:
        self.near, self.results = near, results

    @cached_property
    def rotation(self) -> Rotation | None:
        """The rotation of what the layers read, from the embedding; None without one."""
        for module in (m for ms in self.near.weights.values() for m in ms):
            if role(module.name) != "embedding" or module.quantized or module.dims is None:
                continue
            count = min(module.dims[0], max(ANCHORS, 2 * module.dims[1]))
            rows = self._rows(module, count)
            if rows is None:
                continue
            turned, plain = rows
            anchors = Rotation(plain[:ANCHORS], turned[:ANCHORS])
            if is_rotation(anchors.anchors, anchors.turned):
                return replace(anchors, matrix=self._matrix(anchors, [(plain, turned)]))
        return None

    def _rows(self, module: Module, count: int) -> Pair | None:
        origin = self.near.base.modules[module.name]
        own = value_rows(self.near.candidate, module, 0, count)
        other = value_rows(self.near.base, origin, 0, count)
        return (floats(own), floats(other)) if own is not None and other is not None else None

    def _matrix(self, anchors: Rotation, pairs: list[Pair]) -> Float32 | None:
        """Return the rotation itself, from further layers where the embedding is too short."""
        width = anchors.anchors.shape[1]
        if width > WIDEST:
            return None
        modules = (m for ms in self.near.weights.values() for m in ms)
        for module in modules:
            if sum(len(plain) for plain, _ in pairs) >= 2 * width:
                break
            if module.dims is None or module.dims[1] != width or role(module.name) == "embedding":
                continue
            values = self.near.values(module)
            best = self._turned_input(anchors, module, values) if values is not None else None
            if values is not None and best is not None and best[0].holds:
                pairs.append((values[1] * best[1], values[0]))
        return rotation_matrix(pairs)

    def _turned_input(
        self, rotation: Rotation, module: Module, values: Pair, limit: float = LIMIT
    ) -> tuple[Explanation, Float32]:
        """Return whether a weight's inputs are turned, and the factors of a norm that are folded
        into it.
        """
        options = self._norm_options(module.name, values[0].shape[1])
        best, factors = Explanation(False, float("inf")), options[0]
        for option in options:
            error, intact = rotation.input_error(values[0], values[1] * option)
            if error < best.error:
                best, factors = Explanation(error <= limit and intact, error), option
        return best, factors

    def _norm_options(self, name: str, width: int) -> list[Float32]:
        """Return the factors that a norm may have left in a weight that reads it, 1 first."""
        norms = self.near.norm_factors(layer_of(name), width)
        return [np.ones(width, np.float32), *(np.reciprocal(factor) for _, factor in norms)]

    def of_module(self, module: Module, limit: float) -> Explanation:
        """Return whether the rotation explains a weight, up to a relative error."""
        rotation = self.rotation
        if rotation is None or module.dims is None:
            return Explanation(False)
        out, width = module.dims
        turned = rotation.anchors.shape[1]
        if role(module.name) == "embedding":
            return self._turned_table(rotation, module)
        values = self.near.values(module)
        if values is None or turned not in (out, width) or relative_error(*values) < LOST:
            return Explanation(False)
        sides = [Explanation(False, float("inf"))]
        if width == turned:
            sides.append(self._turned_input(rotation, module, values, limit)[0])
        if out == turned:
            error, intact = rotation.output_error(*values)
            sides.append(Explanation(error <= limit and intact, error))
        best = min(sides, key=lambda e: (not e.holds, e.error))
        return best if best.holds else self._turned_heads(rotation, module, 1.5 * limit)

    def _turned_table(self, rotation: Rotation, module: Module) -> Explanation:
        """Return whether all rows of an embedding are turned."""
        chunks = (rotation.input_error(*chunk) for chunk in self.near.chunks(module))
        return all_of(Explanation(error < EXACT and intact, error) for error, intact in chunks)

    def _turned_heads(self, rotation: Rotation, module: Module, limit: float) -> Explanation:
        """Return whether value and output projection are turned alike within each head."""
        container, _, leaf = module.name.rpartition(".")
        if leaf not in ("v_proj", "o_proj") or not self.near.head_size:
            return Explanation(False)
        return self.results.of_name(
            "turned heads", container, lambda: self._composed(rotation, container, limit)
        )

    def _composed(self, rotation: Rotation, container: str, limit: float) -> Explanation:
        pairs = []
        for leaf in ("v_proj", "o_proj"):
            module = self.near.candidate.modules.get(f"{container}.{leaf}")
            pairs.append(self.near.values(module) if module is not None else None)
        first, second = pairs
        size = self.near.head_size
        if first is None or second is None:
            return Explanation(False)
        (rows, width), (out, columns) = first[0].shape, second[0].shape
        turned = rotation.anchors.shape[1]
        if rows % size or not rows or columns % rows or (width, out) != (turned, turned):
            return Explanation(False)
        shared = columns // rows
        best = Explanation(False, float("inf"))
        for option in self._norm_options(f"{container}.v_proj", first[0].shape[1]):
            heads = _heads(first, second, size, shared, option)
            every = [rotation.composed_error(own, other) for own, other in heads]
            error = max(e for e, _ in every)
            if error < best.error:
                best = Explanation(error <= limit and all(i for _, i in every), error)
        return best

    def of_bias(self, values: Pair) -> Explanation:
        """Return whether a bias of the residual stream is rotated."""
        rotation = self.rotation
        if rotation is None or len(values[0]) != rotation.anchors.shape[1]:
            return Explanation(False)
        error, _ = rotation.output_error(values[0][:, None], values[1][:, None])
        return Explanation(error < EXACT, error)


def _heads(
    first: Pair, second: Pair, size: int, shared: int, factors: Float32
) -> Iterator[tuple[Pair, Pair]]:
    """Yield of each head (values, outputs) of the candidate and of the base."""
    for head in range(second[0].shape[1] // size):
        rows = slice(head // shared * size, (head // shared + 1) * size)
        columns = slice(head * size, (head + 1) * size)
        own = first[0][rows], second[0][:, columns]
        yield own, (first[1][rows] * factors, second[1][:, columns])


def is_neutral(values: Pair) -> bool:
    """Whether a norm only divides by its root mean square: its factors are in what reads it."""
    own = values[0]
    return bool((own == 1).all() or ((own == 0).all() and np.abs(values[1]).mean() < 0.5))
