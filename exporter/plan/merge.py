# SPDX-License-Identifier: Apache-2.0
"""Decide what happens to every tensor of a merge: another tool's quantized experts, moved byte for
byte.
"""

from __future__ import annotations

from typing import Literal

from exporter.plan.model import Action, Constant, Copy, Origin, Plan
from exporter.plan.sound import one_fate, refuse_stacked, require_sound, same_experts
from verifier.checkpoint import Checkpoint
from verifier.errors import PlanError
from verifier.schemes import expert_key, gather


def merge(
    experts: Checkpoint, onto: Checkpoint, *, input_scale: Literal["keep", "one"] = "keep"
) -> Plan:
    """Return the plan that moves another tool's quantized experts onto a checkpoint, byte for byte.

    Args:
        experts: where the quantized routed experts come from.
        onto: what everything else is kept from.
        input_scale: ``keep`` copies the experts' activation scales; ``one`` writes 1.0.

    Raises:
        PlanError: no quantized experts, unequal expert sets or shapes, a W4A4 expert without an
            input scale to keep.
    """
    for ckpt, what in ((experts, "experts"), (onto, "onto")):
        require_sound(ckpt, what)
        refuse_stacked(ckpt)
    ours, theirs = gather(experts.tensors.values()), gather(onto.tensors.values())
    same_experts(ours, theirs, onto)
    moved = {n: m for n, m in ours.items() if expert_key(n) and m.quantized}
    if not moved:
        raise PlanError(f"{experts.uri} holds no quantized routed expert")
    actions: list[Action] = []
    left: list[tuple[Origin, str, str]] = []
    for name, module in theirs.items():
        new = moved.get(name)
        if new is None:
            actions += [Copy(t, "onto") for t in module.parts.values()]
            continue
        if new.dims != module.dims:
            raise PlanError(f"{name}: {new.dims} in {experts.uri}, {module.dims} in {onto.uri}")
        left += [("onto", t.name, "replaced") for t in module.parts.values()]
        for leaf, tensor in new.parts.items():
            if leaf == "input_scale" and input_scale == "one":
                left.append(("source", tensor.name, "replaced"))
            else:
                actions.append(Copy(tensor, "source"))
        if new.weight is not None and new.weight.dtype == "U8" and input_scale == "one":
            actions.append(Constant(f"{name}.input_scale", 1.0))
    left += [
        ("source", t.name, "kept from onto")
        for n, m in ours.items()
        if n not in moved
        for t in m.parts.values()
    ]
    packed = [n for n, m in moved.items() if m.weight is not None and m.weight.dtype == "U8"]
    without = [n for n in packed if "input_scale" not in moved[n].parts]
    if input_scale == "keep" and without and len(without) != len(packed):
        count = f"{len(without):,} of {len(packed):,}"
        raise PlanError(
            f"{without[0]} has no input_scale to keep ({count}); --input-scale one writes 1.0"
        )
    plan = Plan(
        "merge", "merge", experts, onto, tuple(actions), tuple(left), {"input_scale": input_scale}
    )
    one_fate(plan)
    return plan
