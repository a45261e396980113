# SPDX-License-Identifier: Apache-2.0
"""From a plan of single experts to one of stacks: what is written whole, and what passes
through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporter.layout import Stack, Stacks, Unstacked
from exporter.plan.model import Action, Copy, Decode, Encode, Origin, Restack, Take
from verifier.errors import PlanError
from verifier.schemes import Format

TILE = 128
Left = tuple[Origin, str, str]


def touched(stacks: Stacks, units: Iterable[str]) -> bool:
    """Whether any expert of the stacks is among the modules that are written anew."""
    members = {m for s in stacks.stacks for m in s.members}
    return any(u in members for u in units)


def restack(
    source: Unstacked,
    actions: Iterable[Action],
    left: Iterable[Left],
    units: Mapping[str, Encode],
    decoded: Mapping[str, Format],
) -> tuple[list[Action], list[Left]]:
    """Return the actions and what is left of a plan of single experts with the source's stacks
    written as stacks.

    Args:
        source: the view that the plan was made of.
        actions: its actions.
        left: what it leaves.
        units: the quantizations by module.
        decoded: the quantized modules that are written as BF16.

    Raises:
        PlanError: a stack of which only a part is quantized, or blocks across the seam of gate and
            up.
    """
    stacks, raw = source.stacks, source.raw
    group_of = {s.key: i for i, g in enumerate(stacks.groups()) for s in g}
    of_tensor = {n: r.tensor.name for n, r in stacks.regions.items()}
    key_of = {t.name: s.key for s in stacks.stacks for t in s.parts.values()}
    of_module = {m: s.key for s in stacks.stacks for m in s.members}
    groups = [_group(g, units, decoded) for g in stacks.groups()]
    found: list[Action] = []
    done: set[int] = set()
    for action in actions:
        if isinstance(action, Encode):
            key = of_module.get(action.modules[0])
        elif isinstance(action, Decode):
            key = next(
                (
                    key_of[of_tensor[t.name]]
                    for t in action.weight.parts.values()
                    if t.name in of_tensor
                ),
                None,
            )
        elif isinstance(action, Copy | Take):
            name = of_tensor.get(action.tensor.name)
            key = key_of[name] if name is not None else None
        else:
            key = None
        if key is None:
            found.append(action)
        elif group_of[key] not in done:
            done.add(group_of[key])
            found += groups[group_of[key]]
    used = {a.tensor.name for a in found if isinstance(a, Copy)} | {
        t.name for a in found if isinstance(a, Restack) for t in a.tensors
    }
    rest: list[Left] = [entry for entry in left if entry[1] not in of_tensor]
    rest += [("source", n, "replaced") for n in raw.tensors if n in stacks.names and n not in used]
    return found, rest


def _group(
    group: tuple[Stack, ...], units: Mapping[str, Encode], decoded: Mapping[str, Format]
) -> list[Action]:
    members = [m for s in group for m in s.members]
    formats = {
        units[m].format.name if m in units else ("BF16" if m in decoded else "") for m in members
    }
    if len(formats) > 1:
        some = next(m for m in members if m in units or m in decoded)
        other = next(
            m
            for m in members
            if (m in units or m in decoded) != (some in units or some in decoded)
            or (m in units and units[m].format is not units[some].format)
        )
        raise PlanError(
            f"{group[0].key}: a stack is written whole, and {some} is to be {_said(some, units)} and {other} "
            f"{_said(other, units)}; --expert-layout per-expert, or a recipe that takes all experts of a layer alike"
        )
    (name,) = formats
    if not name:
        return [Copy(t, "source") for s in group for t in s.parts.values()]
    beside: list[Action] = [Copy(s.parts["bias"], "source") for s in group if "bias" in s.parts]
    if name == "BF16":
        return [*(Restack((s,), decoded[s.members[0]], None) for s in group), *beside]
    first = units[members[0]]
    if first.format.name == "fp8_block":
        _require_seams(group)
    return [_quantized(group, units, first), *beside]


def _said(module: str, units: Mapping[str, Encode]) -> str:
    return units[module].format.algo if module in units else "left"


def _quantized(group: tuple[Stack, ...], units: Mapping[str, Encode], first: Encode) -> Restack:
    read = {
        w.format.name if w.format else None
        for s in group
        for m in s.members
        for w in units[m].weights
    }
    if len(read) > 1:
        raise PlanError(
            f"{group[0].key}: its experts are in {len(read)} formats; --expert-layout per-expert"
        )
    inputs = None
    if first.input_scales is not None:
        each = [
            max(
                (units[m].input_scales or (0.0,))[0]
                for s in group
                for leaf in s.leaves
                for m in (s.member(e, leaf),)
            )
            for e in range(group[0].shape[0])
        ]
        inputs = (max(each),) if group[0].family.one_scale else tuple(each)
    return Restack(
        group, first.weights[0].format, first.format, first.scale_leaf, inputs, first.method
    )


def _require_seams(group: tuple[Stack, ...]) -> None:
    for stack in group:
        size = stack.shape[1] // len(stack.leaves)
        if len(stack.leaves) > 1 and (stack.family.interleaved or size % TILE):
            how = "alternate row by row" if stack.family.interleaved else f"meet at row {size}"
            raise PlanError(
                f"{stack.key}: gate and up {how}, inside a block of {TILE} x {TILE}; --expert-layout per-expert quantizes "
                "each by itself"
            )
