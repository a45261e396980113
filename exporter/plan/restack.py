# SPDX-License-Identifier: Apache-2.0
"""Turn a plan of single experts into one of stacks: which stacks are written, and which are
copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from exporter.layout import scale_groups
from exporter.plan.model import Action, Copy, Decode, Encode, Restack, Skipped, Take
from verifier.errors import PlanError
from verifier.layouts.expert_stacks import StoredStack, UnstackedCheckpoint
from verifier.schemes import Format

TILE = 128


def any_expert(stacks: Iterable[StoredStack], modules: Iterable[str]) -> bool:
    """Whether any expert of the stacks is among the modules."""
    experts = {linear for stack in stacks for linear in stack.linears}
    return any(module in experts for module in modules)


def restack(
    source: UnstackedCheckpoint,
    actions: Iterable[Action],
    skipped: Iterable[Skipped],
    units: Mapping[str, Encode],
    decoded: Mapping[str, Format],
) -> tuple[list[Action], list[Skipped]]:
    """Return the actions and skipped tensors of a plan of single experts with the source's stacks
    written as stacks.

    Args:
        source: the view that the plan was made of.
        actions: its actions.
        skipped: its skipped tensors.
        units: the quantizations by module.
        decoded: the quantized modules that are written as BF16.

    Raises:
        PlanError: a stack of which only a part is quantized, or blocks across the seam of gate and
            up.
    """
    groups = scale_groups(source.stacks)
    group_of = {
        tensor.name: i
        for i, group in enumerate(groups)
        for stack in group
        for tensor in stack.tensors.values()
    }
    group_actions = [_group_actions(group, units, decoded) for group in groups]
    restacked: list[Action] = []
    done: set[int] = set()
    for action in actions:
        stack_tensor = _stack_tensor(action, source)
        if stack_tensor is None:
            restacked.append(action)
        elif (group := group_of[stack_tensor]) not in done:
            done.add(group)
            restacked += group_actions[group]
    used = {a.tensor.name for a in restacked if isinstance(a, Copy)}
    used |= {t.name for a in restacked if isinstance(a, Restack) for t in a.tensors}
    rest = [entry for entry in skipped if entry[1] not in source.stacked]
    rest += [
        ("source", name, "replaced")
        for name in source.raw.tensors
        if name in group_of and name not in used
    ]
    return restacked, rest


def _stack_tensor(action: Action, source: UnstackedCheckpoint) -> str | None:
    """Return a tensor of the stack that an action reads, None where it reads none."""
    if isinstance(action, Encode):
        tensors = [action.weights[0].tensor]
    elif isinstance(action, Decode):
        tensors = list(action.weight.parts.values())
    elif isinstance(action, Copy | Take):
        tensors = [action.tensor]
    else:
        tensors = []
    stacked = (source.stacked[t.name] for t in tensors if t.name in source.stacked)
    return next(stacked, None)


def _group_actions(
    group: tuple[StoredStack, ...], units: Mapping[str, Encode], decoded: Mapping[str, Format]
) -> list[Action]:
    """Return how the stacks that share scales are written: copied, decoded or quantized."""
    linears = [linear for stack in group for linear in stack.linears]
    by_target: dict[str, str] = {}
    for linear in linears:
        by_target.setdefault(_target(linear, units, decoded), linear)
    if len(by_target) > 1:
        selected_first = sorted(by_target, key=lambda target: target == "")
        first, other = (by_target[target] for target in selected_first[:2])
        raise PlanError(
            f"{group[0].key}: a stack is written as a whole, but {first} is "
            f"{_described(first, units, decoded)} and {other} is "
            f"{_described(other, units, decoded)}; use --expert-layout per-expert, or a recipe "
            "that treats all experts of a layer alike"
        )
    (target,) = by_target
    if not target:
        return [Copy(tensor, "source") for s in group for tensor in s.tensors.values()]
    biases: list[Action] = [Copy(s.tensors["bias"], "source") for s in group if "bias" in s.tensors]
    if target == "BF16":
        return [*(Restack((s,), decoded[s.linears[0]], None) for s in group), *biases]
    first_unit = units[linears[0]]
    if first_unit.format.name == "fp8_block":
        _require_tile_seams(group)
    return [_quantized(group, units, first_unit), *biases]


def _target(linear: str, units: Mapping[str, Encode], decoded: Mapping[str, Format]) -> str:
    """Return the format that a linear layer is written in, '' where its bytes are kept."""
    if linear in units:
        return units[linear].format.name
    return "BF16" if linear in decoded else ""


def _described(linear: str, units: Mapping[str, Encode], decoded: Mapping[str, Format]) -> str:
    if linear in units:
        return f"quantized to {units[linear].format.algo}"
    return "decoded to BF16" if linear in decoded else "not selected"


def _quantized(
    group: tuple[StoredStack, ...], units: Mapping[str, Encode], first: Encode
) -> Restack:
    formats = set()
    for stack in group:
        for linear in stack.linears:
            formats |= {w.format.name if w.format else None for w in units[linear].weights}
    if len(formats) > 1:
        raise PlanError(
            f"{group[0].key}: its experts are in {len(formats)} formats; use --expert-layout "
            "per-expert"
        )
    return Restack(
        group,
        first.weights[0].format,
        first.format,
        first.scale_leaf,
        _input_scales(group, units),
        first.method,
    )


def _input_scales(
    group: tuple[StoredStack, ...], units: Mapping[str, Encode]
) -> tuple[float, ...] | None:
    """Return one input scale per expert, or one for the whole stack; None without input scales."""
    per_expert = []
    for expert in range(group[0].shape[0]):
        linears = [stack.linear(expert, leaf) for stack in group for leaf in stack.leaves]
        scales = [units[linear].input_scales for linear in linears]
        if scales[0] is None:
            return None
        per_expert.append(max(scale[0] for scale in scales if scale is not None))
    return (max(per_expert),) if group[0].layout.one_scale else tuple(per_expert)


def _require_tile_seams(group: tuple[StoredStack, ...]) -> None:
    """Check that gate and up meet between two blocks of 128 x 128.

    Raises:
        PlanError: naming the stack.
    """
    for stack in group:
        size = stack.shape[1] // len(stack.leaves)
        if len(stack.leaves) > 1 and (stack.layout.interleaved or size % TILE):
            seam = "alternate row by row" if stack.layout.interleaved else f"meet at row {size}"
            raise PlanError(
                f"{stack.key}: gate and up {seam}, inside a block of {TILE} x {TILE}; "
                "--expert-layout per-expert quantizes each on its own"
            )
