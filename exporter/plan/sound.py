# SPDX-License-Identifier: Apache-2.0
"""What a checkpoint must be before a plan is made of it, and what must hold of a plan that was
made.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from exporter.layout import read_stacks
from exporter.plan.model import Copy, Decode, Encode, Plan, Restack, Take
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import Module, expert_key

_STACKED = re.compile(
    r"\.experts\.[^.]+(\.weight)?$"
    r"|(^|\.)((\w+_)?moe|experts)\.([^.]+\.)*weight$"  # granitemoe: block_sparse_moe.input_linear.weight
)


def require_sound(ckpt: Checkpoint, what: str, *, described: bool = True) -> None:
    """Refuse a checkpoint whose container is broken: an export would copy the damage.

    Args:
        ckpt: the checkpoint.
        what: what it is, for messages.
        described: its index and config count too; a repair writes both anew.

    Raises:
        PlanError: naming the first problem.
    """
    problems = [
        p for s in ckpt.shards for p in s.problems if p.kind not in ("trailing", "metadata")
    ]
    if described and ckpt.index is not None:
        problems += ckpt.index.problems
        for name, file in ckpt.index.weight_map.items():
            shard = next((s for s in ckpt.shards if s.file == file), None)
            if shard is None:
                raise PlanError(
                    f"{what} {ckpt.uri}: the index names {file}, which is not in the folder"
                )
            if name not in shard.tensors and not shard.problems:
                raise PlanError(
                    f"{what} {ckpt.uri}: the index says {name} is in {file}, and it is not"
                )
    if problems:
        first = problems[0]
        place = f"{first.file}: {first.tensor}" if first.tensor else first.file
        raise PlanError(f"{what} {ckpt.uri}: {place}: {first.message}")
    if ckpt.duplicates:
        name, files = next(iter(ckpt.duplicates.items()))
        raise PlanError(
            f"{what} {ckpt.uri}: {name} stands in {' and '.join(files)}; remove the stray files"
        )
    for name in (*ckpt.tensors, *(s.file for s in ckpt.shards)):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise PlanError(
                f"{what} {ckpt.uri}: the name {name} is no text: it holds a lone surrogate"
            )
    if described and not isinstance(ckpt.config, Mapping):
        raise PlanError(f"{what} {ckpt.uri}: config.json is missing or no JSON object")


def refuse_stacked(ckpt: Checkpoint) -> None:
    """Refuse experts stored as one 3-D tensor.

    Raises:
        PlanError: naming the first such tensor.
    """
    for tensor in ckpt.tensors.values():
        if len(tensor.shape) >= 3 and _STACKED.search(tensor.name):
            why = "stacks of this family are not known (docs/expert-layouts.md)"
            if read_stacks(ckpt) is not None:
                why = (
                    "only single experts are merged; export --expert-layout per-expert writes such"
                )
            raise PlanError(
                f"{tensor.name} holds all experts of its layer in one tensor of shape {list(tensor.shape)}; {why} "
                f"(model_type {ckpt.model_type!r})"
            )


def same_experts(
    modules: Mapping[str, Module], targets: Mapping[str, Module], onto: Checkpoint
) -> None:
    """Refuse two checkpoints whose expert sets differ.

    Raises:
        PlanError: naming the first expert that only one of them has.
    """
    ours = {n for n in modules if expert_key(n)}
    theirs = {n for n in targets if expert_key(n)}
    if ours != theirs:
        odd = sorted(ours ^ theirs)
        side = "the source" if odd[0] in ours else "onto"
        raise PlanError(
            f"the expert sets differ: {len(ours):,} in the source, {len(theirs):,} in {onto.uri}; "
            f"{odd[0]} is in {side} only ({len(odd):,} such)"
        )


def one_fate(plan: Plan) -> None:
    """Hold the set equation: no name is written twice, and every tensor of both checkpoints is used
    or left.

    Raises:
        PlanError: the equation does not hold, which is a defect of the plan.
    """
    names = [s.name for s in plan.specs]
    if len(set(names)) != len(names):
        twice = sorted({n for n in names if names.count(n) > 1})[0]
        raise PlanError(f"{twice} would be written twice")
    used: set[tuple[str, str]] = {(o, n) for o, n, _ in plan.left}
    for action in plan.actions:
        if isinstance(action, Copy | Take):
            used.add((action.origin, action.tensor.name))
        elif isinstance(action, Decode):
            used |= {(action.origin, t.name) for t in action.weight.parts.values()}
        elif isinstance(action, Encode):
            used |= {("source", t.name) for w in action.weights for t in w.parts.values()}
        elif isinstance(action, Restack):
            used |= {("source", t.name) for t in action.tensors}
    owed = {("source", n) for n in plan.source.tensors}
    if plan.onto is not None:
        owed |= {("onto", n) for n in plan.onto.tensors}
    if used != owed:
        odd = sorted(used ^ owed)[0]
        raise PlanError(f"{odd[1]} of {odd[0]} has no fate in the plan")
