# SPDX-License-Identifier: Apache-2.0
"""Whether a method moved the weights of a checkpoint on purpose, and whether what it did explains
a single weight.

``folded``: every column and row has a factor, and a norm or the layer before or after undoes it
(AWQ, SmoothQuant). ``rotated``: one orthogonal matrix turns what all layers read and write (QuaRot,
SpinQuant). ``moved``: values differ a little everywhere (GPTQ, AutoRound, quantization-aware
training). A sample of modules decides for the checkpoint; each weight is then tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal, TypeVar, get_args

import numpy as np

from verifier.checkpoint import Tensor
from verifier.decoding import Float32
from verifier.reconstruction.blocks import relative_error
from verifier.reconstruction.cause import BIAS, CheckpointPair, Reconstruction, reconstruct
from verifier.reconstruction.distance import along, floats, norm2
from verifier.reconstruction.neighbours import Neighbours, Pair, layer_of
from verifier.reconstruction.rows import value_rows
from verifier.reconstruction.transforms import (
    Rotation,
    Scaling,
    fit_scaling,
    is_intact,
    is_rotation,
    permuted,
    rotation_matrix,
)
from verifier.schemes import Module, fused_groups, role

Method = Literal["moved", "rotated", "folded"]
METHODS: tuple[Method, ...] = get_args(Method)
DIFFERENT = ("lost", "part", "weak", "moved")
"""Causes of `Reconstruction` that a method may explain."""
MODULES, PER_KIND = 24, 4
"""Modules that decide about the checkpoint; of each kind (last part of the name)."""
TENSORS = 16
HEAD_BYTES = 1 << 20
"""Of a larger pass-through tensor the beginning decides whether it differs."""
SHARE = 0.25
"""A method that moves weights moves at least this share of the modules."""
LOST = 0.5
"""A weight that is farther than this from its base, relative, is not a moved one."""
LIMIT, FACTOR = 0.2, 2.0
"""What an explanation may leave of a quantized weight: this relative error, or so many times that
of ``max`` calibration."""
EXACT = 0.02
"""The same of an unquantized weight."""
ONE = 0.03
"""A factor of a whole weight within this of 1 is rounding."""
ANCHORS = 64
WIDEST = 5120
"""Inputs up to which the rotation itself is worked out; it takes seconds."""
ROUTERS = frozenset({"gate", "router", "wg"})
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Explanation:
    """Whether a method explains how a weight differs from its base.

    Attributes:
        holds: whether it does.
        error: relative error that it leaves.
        against: the evidence that contradicts it, '' without such evidence.
    """

    holds: bool
    error: float = 0.0
    against: str = ""


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
        enough = len(moved) >= SHARE * len(modules) or len(changed) * 2 >= len(tensors)
        if not names or not (enough or self.stated):
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
            return self._folded(module, limit)
        if method == "rotated":
            return self._rotated(module, limit)
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
                return _all(_moved(chunk) for chunk in self.near.chunks(module))
            found = self._folded if method == "folded" else self._rotated
            return found(module, EXACT)
        values = self.near.tensor_values(own, other)
        if values is None or not np.isfinite(values[0]).all():
            return Explanation(False)
        if method == "moved":
            error = relative_error(*values)
            return Explanation(error < LOST, error)
        if module is None:
            return Explanation(False)
        if leaf == "bias" and module.dims is not None:
            return self._bias(module, values, method)
        if module in self.near.norms.get(layer_of(name), ()):
            holds = self._folded_norm(module) if method == "folded" else _is_neutral(values)
            return Explanation(holds)
        return Explanation(False)

    # --- Folded

    def scaling(self, module: Module) -> Scaling | None:
        """Return the factors of a module's rows and columns, worked out once."""

        def fit() -> Scaling | None:
            values = self.near.values(module)
            return fit_scaling(*values) if values is not None else None

        return self.pair.payload.results.of_name("scaling", module.name, fit)

    def _folded(self, module: Module, limit: float) -> Explanation:
        fit = None if role(module.name) == "embedding" else self.scaling(module)
        if fit is None or fit.error > limit or not fit.intact:
            return Explanation(False)
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

    def _folded_norm(self, norm: Module) -> bool:
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

    def _bias(self, module: Module, values: Pair, method: Method) -> Explanation:
        if method == "rotated":
            rotation = self.rotation
            if rotation is None or len(values[0]) != rotation.anchors.shape[1]:
                return Explanation(False)
            error, _ = rotation.output_error(values[0][:, None], values[1][:, None])
            return Explanation(error < EXACT, error)
        fit = self.scaling(module)
        scale = self._undone_before(module, fit) if fit is not None else None
        if fit is None or scale is None:
            return Explanation(False)
        error = relative_error(values[0], values[1] * fit.rows * np.float32(scale))
        return Explanation(error < 0.1, error)

    # --- Rotated

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
        origin = self.pair.base.modules[module.name]
        own = value_rows(self.pair.candidate, module, 0, count)
        other = value_rows(self.pair.base, origin, 0, count)
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

    def _rotated(self, module: Module, limit: float) -> Explanation:
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
        found = [Explanation(False, float("inf"))]
        if width == turned:
            found.append(self._turned_input(rotation, module, values, limit)[0])
        if out == turned:
            error, intact = rotation.output_error(*values)
            found.append(Explanation(error <= limit and intact, error))
        best = min(found, key=lambda e: (not e.holds, e.error))
        return best if best.holds else self._turned_heads(rotation, module, 1.5 * limit)

    def _turned_table(self, rotation: Rotation, module: Module) -> Explanation:
        """Return whether all rows of an embedding are turned."""
        chunks = (rotation.input_error(*chunk) for chunk in self.near.chunks(module))
        return _all(Explanation(error < EXACT and intact, error) for error, intact in chunks)

    def _turned_heads(self, rotation: Rotation, module: Module, limit: float) -> Explanation:
        """Return whether value and output projection are turned alike within each head."""
        container, _, leaf = module.name.rpartition(".")
        if leaf not in ("v_proj", "o_proj") or not self.near.head_size:
            return Explanation(False)
        return self.pair.payload.results.of_name(
            "turned heads", container, lambda: self._composed(rotation, container, limit)
        )

    def _composed(self, rotation: Rotation, container: str, limit: float) -> Explanation:
        pairs = []
        for leaf in ("v_proj", "o_proj"):
            module = self.pair.candidate.modules.get(f"{container}.{leaf}")
            pairs.append(self.near.values(module) if module is not None else None)
        first, second = pairs
        size = self.near.head_size
        if first is None or second is None or len(first[0]) % size or second[0].shape[1] % size:
            return Explanation(False)
        shared = second[0].shape[1] // len(first[0])
        if not shared:
            return Explanation(False)
        best = Explanation(False, float("inf"))
        for option in self._norm_options(f"{container}.v_proj", first[0].shape[1]):
            heads = _heads(first, second, size, shared, option)
            every = [rotation.composed_error(own, other) for own, other in heads]
            error = max(e for e, _ in every)
            if error < best.error:
                best = Explanation(error <= limit and all(i for _, i in every), error)
        return best

    # --- The sample

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
        size = min(own.nbytes, HEAD_BYTES)
        mine = self.pair.candidate.checkpoint.read_range(own, 0, size)
        return not np.array_equal(mine, self.pair.base.checkpoint.read_range(other, 0, size))

    @np.errstate(all="ignore")  # whatever a file holds
    def _permuted(self, moved: Sequence[Module]) -> str:
        """Return what was permuted in most of the modules that differ."""
        found = []
        for module in moved[:PER_KIND]:
            values = self.near.values(module)
            found.append(permuted(*values) if values is not None else "")
        return next(
            (kind for kind in ("rows", "columns") if 2 * found.count(kind) > len(found)), ""
        )


def _heads(
    first: Pair, second: Pair, size: int, shared: int, factors: Float32
) -> Iterator[tuple[Pair, Pair]]:
    """Yield of each head (values, outputs) of the candidate and of the base."""
    for head in range(second[0].shape[1] // size):
        rows = slice(head // shared * size, (head // shared + 1) * size)
        columns = slice(head * size, (head + 1) * size)
        own = first[0][rows], second[0][:, columns]
        yield own, (first[1][rows] * factors, second[1][:, columns])


def _moved(values: Pair, *, check_bias: bool = False) -> Explanation:
    """Return whether values are near the base's everywhere."""
    own, base = values
    error = relative_error(own, base)
    if not error < LOST:
        return Explanation(False, error)
    if not is_intact(own, base):
        return Explanation(False, error, "some of its rows or blocks are not the base's at all")
    bias = along(own, base) / norm2(base)
    if check_bias and abs(bias) > BIAS:
        return Explanation(False, error, f"its values are {1 + bias:.3f} of the base's as a whole")
    return Explanation(True, error)


def _is_neutral(values: Pair) -> bool:
    """Whether a norm only divides by its root mean square: its factors are in what reads it."""
    own = values[0]
    return bool((own == 1).all() or ((own == 0).all() and np.abs(values[1]).mean() < 0.5))


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


def _all(parts: Iterable[Explanation]) -> Explanation:
    """Return the explanation of all parts of a weight."""
    found = list(parts)
    error = max((p.error for p in found), default=float("inf"))
    return Explanation(bool(found) and all(p.holds for p in found), error)


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
