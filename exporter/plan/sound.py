# SPDX-License-Identifier: Apache-2.0
"""Checks before a plan is made of a checkpoint, and of a plan that was made."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping

from exporter.layout import stacks_of
from exporter.plan.model import Copy, Decode, Encode, Plan, Restack, Take
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import Module, expert_key

_STACKED = re.compile(
    r"\.experts\.[^.]+(\.weight)?$"
    r"|(^|\.)((\w+_)?moe|experts)\.([^.]+\.)*weight$"  # block_sparse_moe.input_linear.weight
)


def require_sound(ckpt: Checkpoint, owner: str, *, described: bool = True) -> None:
    """Refuse a checkpoint whose container is broken: an export would copy the damage.

    Args:
        ckpt: the checkpoint.
        owner: its role, for messages.
        described: check its index and config too; a repair re-writes both.

    Raises:
        PlanError: naming the first problem.
    """
    problems = [
        p for s in ckpt.shards for p in s.problems if p.kind not in ("trailing", "metadata")
    ]
    if described and ckpt.index is not None:
        problems += ckpt.index.problems
        _require_indexed(ckpt, owner)
    if problems:
        first = problems[0]
        where = f"{first.file}: {first.tensor}" if first.tensor else first.file
        raise PlanError(f"{owner} {ckpt.uri}: {where}: {first.message}")
    if ckpt.duplicates:
        name, files = next(iter(ckpt.duplicates.items()))
        raise PlanError(
            f"{owner} {ckpt.uri}: {name} is in {' and in '.join(files)}; remove the stray files"
        )
    for name in (*ckpt.tensors, *(s.file for s in ckpt.shards)):
        if any("\ud800" <= c <= "\udfff" for c in name):
            raise PlanError(
                f"{owner} {ckpt.uri}: the name {name} is not valid text (a lone surrogate)"
            )
    if described and not isinstance(ckpt.config, Mapping):
        raise PlanError(f"{owner} {ckpt.uri}: config.json is missing or not a JSON object")


def _require_indexed(ckpt: Checkpoint, owner: str) -> None:
    """Check that every tensor is in the shard that the index names."""
    shards = {s.file: s for s in ckpt.shards}
    for name, file in (ckpt.index.weight_map if ckpt.index else {}).items():
        shard = shards.get(file)
        if shard is None:
            raise PlanError(
                f"{owner} {ckpt.uri}: the index names {file}, which is not in the directory"
            )
        if name not in shard.tensors and not shard.problems:
            raise PlanError(
                f"{owner} {ckpt.uri}: the index lists {name} in {file}, which does not hold it"
            )


def refuse_stacked(ckpt: Checkpoint) -> None:
    """Refuse experts stored as one 3-D tensor.

    Raises:
        PlanError: naming the first such tensor.
    """
    for tensor in ckpt.tensors.values():
        if len(tensor.shape) >= 3 and _STACKED.search(tensor.name):
            reason = "ckptgate does not know stacks of this family (docs/expert-layouts.md)"
            if stacks_of(ckpt):
                reason = (
                    "only individual experts are merged; export --expert-layout per-expert writes "
                    "them"
                )
            raise PlanError(
                f"{tensor.name} holds all experts of its layer in one tensor of shape "
                f"{list(tensor.shape)}; {reason} (model_type {ckpt.model_type})"
            )


def require_same_experts(
    modules: Mapping[str, Module], targets: Mapping[str, Module], onto: Checkpoint
) -> None:
    """Refuse two checkpoints whose expert sets differ.

    Raises:
        PlanError: naming the first expert that only one of them has.
    """
    source_experts = {n for n in modules if expert_key(n)}
    target_experts = {n for n in targets if expert_key(n)}
    different = sorted(source_experts ^ target_experts)
    if different:
        owner = "the source" if different[0] in source_experts else "onto"
        raise PlanError(
            f"the expert sets differ: {len(source_experts):,} in the source, "
            f"{len(target_experts):,} in {onto.uri}; {different[0]} is in {owner} only "
            f"(1 of {len(different):,})"
        )


def require_every_tensor_once(plan: Plan) -> None:
    """Check that no name is written twice, and that every tensor of both checkpoints is read or
    skipped.

    Raises:
        PlanError: it is not so, which is a defect of the plan.
    """
    for name, count in Counter(s.name for s in plan.specs).most_common(1):
        if count > 1:
            raise PlanError(f"{name} would be written {count} times")
    accounted: set[tuple[str, str]] = {(origin, name) for origin, name, _ in plan.skipped}
    for action in plan.actions:
        if isinstance(action, Copy | Take):
            accounted.add((action.origin, action.tensor.name))
        elif isinstance(action, Decode):
            accounted |= {(action.origin, t.name) for t in action.weight.parts.values()}
        elif isinstance(action, Encode):
            accounted |= {("source", t.name) for w in action.weights for t in w.parts.values()}
        elif isinstance(action, Restack):
            accounted |= {("source", t.name) for t in action.tensors}
    present = {("source", n) for n in plan.source.tensors}
    if plan.onto is not None:
        present |= {("onto", n) for n in plan.onto.tensors}
    if accounted != present:
        origin, name = sorted(accounted ^ present)[0]
        raise PlanError(f"the plan accounts for {name} of {origin} wrongly")
