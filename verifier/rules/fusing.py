# SPDX-License-Identifier: Apache-2.0
"""The parameters that loaders make of several modules: concatenated projections and stacked
experts.

Serving engines concatenate q/k/v, gate/up and w1/w3 and stack a layer's experts (vLLM's
``packed_modules_mapping`` and FusedMoE); transformers stacks experts and concatenates their gate
and up (``core_model_loading``: MergeModulelist, Concatenate).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.schemes import FLOATS, Module, expert_key, fused_groups, role


@dataclass(frozen=True, slots=True)
class Fused:
    """One parameter of a loader.

    Attributes:
        name: of the module that holds it.
        modules: its parts, in the order in which a loader takes them.
        stack: whether the parts are experts.
        numbers: of the experts in the stack.
    """

    name: str
    modules: tuple[Module, ...]
    stack: bool = False
    numbers: tuple[int, ...] = ()


def fused(ctx: Context) -> Iterator[Fused]:
    """Yield the parameters that loaders make of several two-dimensional weights: projections first,
    then each layer's experts.
    """
    weights = (m for m in ctx.candidate.modules.values() if m.dims and m.weight is not None)
    linears = {m.name: m for m in weights if role(m.name) not in ("embedding", "norm")}
    for name, members in fused_groups(linears):
        yield from _of_one_width(name, [linears[m] for m in members])
    stacks: dict[tuple[str, str], list[tuple[int, Module]]] = {}
    for module in linears.values():
        key = expert_key(module.name)
        if key is not None:
            stacks.setdefault((key.container, key.leaf), []).append((key.expert, module))
    for (container, leaf), experts in stacks.items():
        experts.sort(key=lambda pair: pair[0])
        for stack in _stacks(experts):
            first = stack[0][0] if stack is not experts else 0
            modules, numbers = tuple(m for _, m in stack), tuple(n - first for n, _ in stack)
            yield Fused(f"{container}.{leaf}", modules, True, numbers)


def _stacks(experts: list[tuple[int, Module]]) -> list[list[tuple[int, Module]]]:
    """Return the experts in one list, or in two where each half has a shape of its own (Ernie 4.5
    VL's text and vision experts).
    """
    middle = len(experts) // 2
    if middle < 2 or len(experts) != 2 * middle:
        return [experts]
    halves = [experts[:middle], experts[middle:]]
    first, second = ({m.dims for _, m in half} for half in halves)
    return halves if len(first) == len(second) == 1 and first != second else [experts]


def _of_one_width(name: str, modules: list[Module]) -> Iterator[Fused]:
    """Yield the group, without its query where that reads a different input than key and value
    (cross attention).
    """
    first = modules[0]
    if len(modules) > 2 and first.dims is not None:
        others = {m.dims[1] for m in modules[1:] if m.dims is not None}
        if len(others) == 1 and first.dims[1] not in others:
            modules = modules[1:]
    yield Fused(name, tuple(modules))


def scalars(ctx: Context, leaf: str, names: Iterable[str]) -> Iterator[Scalars]:
    """Yield the scalars of one leaf for each group of projections that engines fuse; groups with
    anything but float scalars of one dtype are counted as missed.
    """
    for _, members in fused_groups(names, ctx.checkpoint.model_type):
        tensors = tuple(ctx.candidate.modules[m].parts[leaf] for m in members)
        dtypes = {t.dtype for t in tensors}
        if len(dtypes) > 1 or not dtypes <= FLOATS or any(t.elements != 1 for t in tensors):
            ctx.tally.miss(1, f"{leaf} that is not a float scalar")
            continue
        ctx.tally.see()
        yield Scalars(
            leaf,
            members,
            tensors,
            tuple(float(ctx.payload.array(t).reshape(-1)[0]) for t in tensors),
        )


@dataclass(frozen=True, slots=True)
class Scalars:
    """One scalar of each member of a fused group."""

    leaf: str
    members: tuple[str, ...]
    tensors: tuple[Tensor, ...]
    values: tuple[float, ...]

    def differing(self, ctx: Context, note: str = "") -> Iterator[Finding]:
        """Yield a finding on the first member whose bits differ from those of the first, where all
        values are finite.
        """
        bits = np.asarray(self.values, np.float32).view(np.uint32)
        odd = next((i for i in range(1, len(bits)) if bits[i] != bits[0]), None)
        if odd is not None and np.isfinite(self.values).all():
            tensor = self.tensors[odd]
            yield ctx.finding(
                f"{self.leaf} differs between projections that engines fuse",
                where=Where(tensor.name, tensor.file, byte=tensor.offset),
                observed=f"{self.values[odd]:.6e}{note}",
                expected=f"{self.values[0]:.6e}, as {self.members[0]}",
            )


def changed_values(
    parts: Sequence[npt.NDArray[Any]], rows: int, dtype: npt.DTypeLike, starts: Sequence[int] = (0,)
) -> int:
    """Return how many values change when a loader writes parts into one parameter and they are read
    from it again.

    Args:
        parts: scales with equal trailing dimensions.
        rows: of the parameter; rows beyond them are not written.
        dtype: of the parameter; parts are cast to it as ``Tensor.copy_`` casts.
        starts: the row at which each part is written.
    """
    parameter = np.zeros((rows, *parts[0].shape[1:]), dtype)
    slices = [slice(start, start + len(part)) for part, start in zip(parts, starts, strict=True)]
    count = 0
    with np.errstate(over="ignore", invalid="ignore"):
        for part, rows_of in zip(parts, slices, strict=True):
            parameter[rows_of] = part[: len(parameter[rows_of])].astype(parameter.dtype)
        for part, rows_of in zip(parts, slices, strict=True):
            read = np.ascontiguousarray(parameter[rows_of].astype(part.dtype)).view(np.uint8)
            written = np.ascontiguousarray(part[: len(parameter[rows_of])]).view(np.uint8)
            same = (read == written).reshape(-1, part.dtype.itemsize).all(axis=1)
            count += part.size - int(same.sum())
    return count
