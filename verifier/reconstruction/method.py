# SPDX-License-Identifier: Apache-2.0
"""Whether a method moved the weights of a checkpoint on purpose, and whether what it did explains
a single weight.

``folded``: every column and row has a factor, and a norm or the layer before or after undoes it
(AWQ, SmoothQuant). ``rotated``: one orthogonal matrix turns what all layers read and write (QuaRot,
SpinQuant). ``moved``: values differ a little everywhere (GPTQ, AutoRound, quantization-aware
training). A sample of modules decides for the checkpoint; each weight is then tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar, get_args

import numpy as np

from verifier.checkpoint import Tensor
from verifier.reconstruction.blocks import relative_error
from verifier.reconstruction.cause import BIAS, CheckpointPair, Reconstruction, reconstruct
from verifier.reconstruction.distance import along, norm2
from verifier.reconstruction.explanation import (
    EXACT,
    FACTOR,
    LIMIT,
    LOST,
    Explanation,
    all_of,
)
from verifier.reconstruction.folding import FoldedScales
from verifier.reconstruction.neighbours import Neighbours, Pair, layer_of
from verifier.reconstruction.rotating import RotatedWeights, is_neutral
from verifier.reconstruction.transforms import is_intact, permuted
from verifier.schemes import Module

Method = Literal["moved", "rotated", "folded"]
METHODS: tuple[Method, ...] = get_args(Method)
DIFFERENT = ("lost", "part", "weak", "moved")
"""Causes of `Reconstruction` that a method may explain."""
MODULES, PER_KIND = 24, 4
"""Modules that decide about the checkpoint; of each kind (last part of the name)."""
TENSORS = 16
DIFFERS = "differs from its source"
"""The kind of result that says of a pass-through tensor whether its bytes differ."""
HEAD_BYTES = 1 << 16
"""Of a larger pass-through tensor the beginning decides whether it differs."""
SHARE = 0.25
"""A method that moves weights moves at least this share of the modules."""
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Survey:
    """What a sample of a checkpoint's weights shows.

    Attributes:
        method: that explains most of the differing ones; '' where weights are as in the base, or no
            method explains how they differ.
        stated: the method that the user states, '' for none.
        modules: quantized modules in the sample.
        different: those that differ from the base by more than their format leaves.
        explained: those of them that the method explains.
        tensors: pass-through tensors in the sample.
        different_tensors: those that differ.
        explained_tensors: those of them that the method explains.
        error: median relative error that the explanation leaves.
        first: name of the first differing tensor.
        permuted: ``rows`` or ``columns`` where a permutation of those explains most.
    """

    method: Method | Literal[""] = ""
    stated: str = ""
    modules: int = 0
    different: int = 0
    explained: int = 0
    tensors: int = 0
    different_tensors: int = 0
    explained_tensors: int = 0
    error: float = 0.0
    first: str = ""
    permuted: str = ""

    @property
    def is_rounding(self) -> bool:
        """Whether only quantized values moved, which needs no statement."""
        return self.method == "moved" and not self.different_tensors


class WeightMethod:
    """How the weights of a checkpoint relate to its base's.

    Args:
        pair: the whole candidate and its base.
        stated: the method that the user states, '' for none.
    """

    def __init__(self, pair: CheckpointPair, stated: str) -> None:
        self.pair, self.stated = pair, stated
        self.near = Neighbours(pair)
        self.folded = FoldedScales(self.near, pair.payload.results)
        self.rotated = RotatedWeights(self.near, pair.payload.results)

    @cached_property
    def survey(self) -> Survey:
        """What a sample of the weights shows."""
        modules, tensors = self._sampled_modules(), self._sampled_tensors()
        results = {m.name: (m, self.compared(m)) for m in modules}
        moved = [m for m, r in results.values() if r.cause in DIFFERENT]
        changed = [(own, other) for own, other in tensors if self._differs(own, other)]
        names = [m.weight.name for m in moved if m.weight] + [own.name for own, _ in changed]
        seen = Survey(
            stated=self.stated,
            modules=len(modules),
            different=len(moved),
            tensors=len(tensors),
            different_tensors=len(changed),
            first=min(names, default=""),
        )
        many = len(moved) >= SHARE * len(modules) or 0 < len(tensors) <= 2 * len(changed)
        if not names or not (many or self.stated):
            return seen
        methods: list[Method] = ["folded", "rotated", "moved"]
        methods.sort(key=lambda m: m != self.stated)
        tried = [t for t in (self._tried(seen, m, moved, changed) for m in methods) if t]
        if tried:
            return max(tried, key=lambda t: t.explained + t.explained_tensors)
        return replace(seen, permuted=self._permuted(moved))

    def _tried(
        self,
        seen: Survey,
        method: Method,
        moved: Sequence[Module],
        changed: Sequence[tuple[Tensor, Tensor]],
    ) -> Survey | None:
        """Return the survey where a method explains most of what differs, else None."""
        if method == "moved" and self.stated != "moved" and not self._is_moved(moved, changed):
            return None
        by_module = [self.of_module(m, method) for m in moved]
        by_tensor = [self.of_tensor(*pair, method) for pair in changed]
        explained = [e for e in by_module if e.holds]
        count, tensors = len(explained), sum(e.holds for e in by_tensor)
        if 2 * (count + tensors) < len(moved) + len(changed):
            return None
        errors = [e.error for e in explained or by_tensor]
        return replace(
            seen,
            method=method,
            explained=count,
            explained_tensors=tensors,
            error=float(np.median(errors)),
        )

    def _is_moved(self, moved: Sequence[Module], changed: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """Whether weights moved all over a checkpoint without a statement: quantized values in
        both directions, or most pass-through tensors too.
        """
        if changed:
            return len(changed) >= 4
        both_ways = sum(self.compared(m).cause == "moved" for m in moved)
        return both_ways * 4 >= 3 * len(moved)

    def compared(self, module: Module) -> Reconstruction:
        """Return the plain comparison of a module with its base, made once."""
        return self.pair.payload.results.of_name(
            "reconstruction", module.name, lambda: reconstruct(self.pair, module)
        )

    def of_module(self, module: Module, method: Method) -> Explanation:
        """Return whether a method explains how a quantized weight differs."""
        return self.pair.payload.results.of_name(
            f"explained {method}", module.name, lambda: self._of_module(module, method)
        )

    @np.errstate(all="ignore")  # whatever a file holds
    def _of_module(self, module: Module, method: Method) -> Explanation:
        if module.name not in self.pair.base.modules or module.dims is None:
            return Explanation(False)
        limit = min(LOST, max(LIMIT, FACTOR * self.compared(module).by_max))
        if method == "folded":
            return self.folded.of_module(module, limit)
        if method == "rotated":
            return self.rotated.of_module(module, limit)
        values = self.near.values(module)
        return _moved(values, check_bias=True) if values else Explanation(False)

    def of_tensor(self, own: Tensor, other: Tensor, method: Method) -> Explanation:
        """Return whether a method explains how a pass-through tensor differs from its source."""
        return self.pair.payload.results.of_name(
            f"explained {method}", own.name, lambda: self._of_tensor(own, other, method)
        )

    @np.errstate(all="ignore")  # whatever a file holds
    def _of_tensor(self, own: Tensor, other: Tensor, method: Method) -> Explanation:
        name, _, leaf = own.name.rpartition(".")
        module = self.pair.candidate.modules.get(name)
        if module is not None and leaf == "weight" and module.dims == own.shape:
            if method == "moved":
                return all_of(_moved(chunk) for chunk in self.near.chunks(module))
            explainer = self.folded if method == "folded" else self.rotated
            return explainer.of_module(module, EXACT)
        values = self.near.tensor_values(own, other)
        if values is None or not np.isfinite(values[0]).all():
            return Explanation(False)
        if method == "moved":
            error = relative_error(*values)
            return Explanation(error < LOST, error)
        if module is None:
            return Explanation(False)
        if leaf == "bias" and module.dims is not None:
            folded = method == "folded"
            return self.folded.of_bias(module, values) if folded else self.rotated.of_bias(values)
        if module in self.near.norms.get(layer_of(name), ()):
            holds = self.folded.of_norm(module) if method == "folded" else is_neutral(values)
            return Explanation(holds)
        return Explanation(False)

    def _sampled_modules(self) -> list[Module]:
        known = (m for ms in self.near.weights.values() for m in ms if m.quantized)
        return _spread(((m.name.rpartition(".")[2], m) for m in known), PER_KIND)[:MODULES]

    def _sampled_tensors(self) -> list[tuple[Tensor, Tensor]]:
        passing = self.pair.payload.pass_through
        if passing is None or passing.source is not self.pair.base:
            return []
        pairs = (
            (a, b)
            for a, b in passing.pairs(self.pair.candidate.modules.values())
            if (a.dtype, a.shape) == (b.dtype, b.shape)
        )
        kinds = ((a.name.rpartition(".")[0].rpartition(".")[2], (a, b)) for a, b in pairs)
        return _spread(kinds, 2)[:TENSORS]

    def _differs(self, own: Tensor, other: Tensor) -> bool:
        """Whether a pass-through tensor differs from its source: QC605 knows it where it ran."""
        return self.pair.payload.results.of_name(
            DIFFERS, own.name, lambda: self._starts_differently(own, other)
        )

    def _starts_differently(self, own: Tensor, other: Tensor) -> bool:
        size = min(own.nbytes, HEAD_BYTES)
        mine = self.pair.candidate.checkpoint.read_range(own, 0, size)
        return not np.array_equal(mine, self.pair.base.checkpoint.read_range(other, 0, size))

    @np.errstate(all="ignore")  # whatever a file holds
    def _permuted(self, moved: Sequence[Module]) -> str:
        """Return what was permuted in most of the modules that differ."""
        kinds = []
        for module in moved[:PER_KIND]:
            values = self.near.values(module)
            kinds.append(permuted(*values) if values is not None else "")
        return next(
            (kind for kind in ("rows", "columns") if 2 * kinds.count(kind) > len(kinds)), ""
        )


def _moved(values: Pair, *, check_bias: bool = False) -> Explanation:
    """Return whether values are near the base's everywhere."""
    own, base = values
    error = relative_error(own, base)
    if not error < LOST:
        return Explanation(False, error)
    if not is_intact(own, base):
        return Explanation(False, error, "some of its rows or blocks are not the base's")
    bias = along(own, base) / norm2(base)
    if check_bias and abs(bias) > BIAS:
        return Explanation(False, error, f"its values are {1 + bias:.3f} of the base's as a whole")
    return Explanation(True, error)


def _spread(kinds: Iterable[tuple[str, T]], count: int) -> list[T]:
    """Return up to ``count`` things of each kind, evenly spaced."""
    groups: dict[str, list[T]] = {}
    for kind, thing in kinds:
        groups.setdefault(kind, []).append(thing)
    picked: list[T] = []
    for group in groups.values():
        places = np.unique(np.linspace(0, len(group) - 1, count).astype(int))
        picked += [group[i] for i in places]
    return picked
