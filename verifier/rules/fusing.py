# SPDX-License-Identifier: Apache-2.0
"""What loaders make one parameter of: projections behind one another, experts on top of one
another.

Serving engines do it for q/k/v, gate/up and w1/w3 and stack a layer's experts (vLLM's
``packed_modules_mapping`` and FusedMoE); transformers stacks experts and fuses their gate and up
(``core_model_loading``: MergeModulelist, Concatenate).
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
from verifier.schemes import Module, expert_key, fused_groups, role


@dataclass(frozen=True, slots=True)
class Fused:
    """The parts of one parameter in the order in which a loader takes them; ``numbers`` are those
    of stacked experts.
    """

    name: str
    modules: tuple[Module, ...]
    stack: bool = False
    numbers: tuple[int, ...] = ()


def fused(ctx: Context) -> Iterator[Fused]:
    """Yield what loaders put together, two-dimensional weights only: projections first, then each
    layer's experts.
    """
    linears = {
        m.name: m
        for m in ctx.candidate.modules.values()
        if m.dims is not None and m.weight is not None and role(m.name) not in ("embedding", "norm")
    }
    for name, members in fused_groups(linears):
        yield from _of_one_width(name, [linears[m] for m in members])
    stacks: dict[tuple[str, str], list[tuple[int, Module]]] = {}
    for module in linears.values():
        key = expert_key(module.name)
        if key is not None:
            stacks.setdefault((key.container, key.leaf), []).append((key.expert, module))
    for (container, leaf), found in stacks.items():
        found.sort(key=lambda pair: pair[0])
        for part in _lists(found):
            first = part[0][0] if part is not found else 0
            yield Fused(
                f"{container}.{leaf}",
                tuple(m for _, m in part),
                True,
                tuple(n - first for n, _ in part),
            )


def _lists(found: list[tuple[int, Module]]) -> list[list[tuple[int, Module]]]:
    """Return the experts, or both halves apart where each has a shape of its own: Ernie 4.5 VL's
    text and vision experts.
    """
    middle = len(found) // 2
    halves = [found[:middle], found[middle:]]
    heights = [{m.dims for _, m in half} for half in halves]
    apart = (
        len(found) == 2 * middle and all(len(h) == 1 for h in heights) and heights[0] != heights[1]
    )
    return halves if apart and middle > 1 else [found]


def _of_one_width(name: str, modules: list[Module]) -> Iterator[Fused]:
    """Yield the group; without its query where that reads another input than key and value (cross
    attention).
    """
    first = modules[0]
    if len(modules) > 2 and first.dims is not None:
        others = {m.dims[1] for m in modules[1:] if m.dims is not None}
        if len(others) == 1 and first.dims[1] not in others:
            modules = modules[1:]
    yield Fused(name, tuple(modules))


def scalars(ctx: Context, leaf: str, names: Iterable[str]) -> Iterator[Scalars]:
    """Yield the scalars of one leaf for each group of projections that engines fuse; others than
    F32 scalars are missed.
    """
    for _, members in fused_groups(names):
        tensors = tuple(ctx.candidate.modules[m].parts[leaf] for m in members)
        if any(t.dtype != "F32" or t.elements != 1 for t in tensors):
            ctx.tally.miss(1, f"{leaf} that is no F32 scalar")
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
        """Yield a finding on the first member whose finite value is not the first one's, bit for
        bit.
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


def lost(
    parts: Sequence[npt.NDArray[Any]], rows: int, dtype: npt.DTypeLike, starts: Sequence[int] = (0,)
) -> int:
    """Return how many values do not come back from a loader's parameter, written part by part and
    read again.

    Args:
        parts: scales with equal trailing dimensions.
        rows: rows of the parameter; what is written beyond them is lost.
        dtype: the parameter's; parts are cast into it as ``Tensor.copy_`` casts.
        starts: the row at which each part is written.
    """
    made = np.zeros((rows, *parts[0].shape[1:]), dtype)
    places = [slice(start, start + len(part)) for part, start in zip(parts, starts, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        for part, place in zip(parts, places, strict=True):
            made[place] = part[: len(made[place])].astype(made.dtype)
        count = 0
        for part, place in zip(parts, places, strict=True):
            back = np.ascontiguousarray(made[place].astype(part.dtype)).view(np.uint8)
            kept = np.ascontiguousarray(part[: len(made[place])]).view(np.uint8)
            same = (back == kept).reshape(-1, part.dtype.itemsize).all(axis=1)
            count += part.size - int(same.sum())
    return count
