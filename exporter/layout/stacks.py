# SPDX-License-Identifier: Apache-2.0
"""Stacks of experts that an export reads or writes: a family whose layout it refuses, and tensors
that do not fit, end it by name.

How families stack experts, and the view that reads a stack as single experts, are in
`verifier.layouts.expert_stacks`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from exporter.layout.siblings import MemoryWeight, meaning
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError, UnsupportedConversion
from verifier.layouts.expert_stacks import (
    StoredStack,
    UnstackedCheckpoint,
    find_stacks,
    stack_layout_of,
    unstacked_view,
)

ExpertLayout = Literal["per-expert", "hub"]
EXPERT_LAYOUTS: tuple[ExpertLayout, ...] = ("per-expert", "hub")
_CODES = ("weight", "blocks", "scales")


def stacks_of(ckpt: Checkpoint) -> tuple[StoredStack, ...]:
    """Return the stacks of a checkpoint, in file order; none where its family has no stacks.

    Args:
        ckpt: in hub layout; its stacks may be unquantized, MXFP4, or quantized as ckptgate writes
            them.

    Raises:
        PlanError: a family that is refused, or stacks that do not fit its layout.
        UnsupportedConversion: a sibling of a stack whose shape has no meaning, or whose blocks
            cross the seam of gate and up.
    """
    if isinstance(ckpt, UnstackedCheckpoint):
        return ckpt.stacks
    layout = stack_layout_of(ckpt.config)
    if layout is None:
        return ()
    if layout.refused:
        suffixes = tuple(f".{name}" for name in layout.refused_names)
        name = next((n for n in ckpt.tensors if n.endswith(suffixes)), None)
        if name is not None:
            raise PlanError(f"{name}: {layout.name} cannot be exported: {layout.refused}")
        return ()
    stacks, misfits = find_stacks(ckpt)
    if misfits:
        raise PlanError(f"{ckpt.uri}: {misfits[0]}")
    _require_whole_mxfp4(ckpt, stacks)
    for stack in stacks:
        _require_meanings(stack)
    return stacks


def unstacked(ckpt: Checkpoint) -> Checkpoint:
    """Return a checkpoint with the experts of its stacks as single tensors; itself where it has no
    stacks.

    Raises:
        PlanError, UnsupportedConversion: as `stacks_of`.
    """
    return unstacked_view(ckpt, stacks_of(ckpt))


def scale_groups(stacks: Iterable[StoredStack]) -> list[tuple[StoredStack, ...]]:
    """Return the stacks that share scales: those of gate and up of a layer, and that of down."""
    groups: dict[tuple[str, bool], list[StoredStack]] = {}
    for stack in stacks:
        groups.setdefault((stack.head, stack.is_down), []).append(stack)
    return [tuple(group) for group in groups.values()]


def _require_whole_mxfp4(ckpt: Checkpoint, stacks: Iterable[StoredStack]) -> None:
    layers: dict[str, list[StoredStack]] = {}
    for stack in stacks:
        layers.setdefault(stack.head, []).append(stack)
    for layer in layers.values():
        mxfp4 = [stack for stack in layer if "blocks" in stack.tensors]
        if mxfp4 and len(mxfp4) != len(layer):
            raise PlanError(
                f"{ckpt.uri}: {mxfp4[0].key} is MXFP4 and the other stacks of its layer are not"
            )


def _require_meanings(stack: StoredStack) -> None:
    """Check that every tensor of a stack can be cut into those of its experts.

    Raises:
        UnsupportedConversion: naming the tensor.
    """
    experts, out, in_ = stack.shape
    family = stack.layout.name
    if stack.transposed:
        weight = MemoryWeight((experts, in_, out), ("expert", "in", "out"), family)
    else:
        weight = MemoryWeight((experts, out, in_), ("expert", "out", "in"), family)
    for leaf, tensor in stack.tensors.items():
        if leaf in _CODES:
            continue
        axes = meaning(tensor.name, leaf, tensor.shape, weight)
        if not stack.slices(leaf):
            raise UnsupportedConversion(
                tensor.name, "split", family, f"{tensor.dtype} {list(tensor.shape)} cannot be cut"
            )
        per = dict(zip(axes.roles, axes.blocks, strict=True)).get("out", 1)
        size = out // len(stack.leaves)
        if per > 1 and len(stack.leaves) > 1 and (stack.layout.interleaved or size % per):
            seam = "every row" if stack.layout.interleaved else f"row {size}"
            raise UnsupportedConversion(
                tensor.name,
                "split",
                family,
                f"gate and up meet at {seam}, inside a block of {per}; cutting it would take "
                "re-quantizing",
            )
