# SPDX-License-Identifier: Apache-2.0
"""QC314: bias or pre_quant_scale is lost."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module, collapse, expert_key, role


@rule(
    "QC314",
    "bias or pre_quant_scale is lost",
    severity="error",
    depth="header",
    unit="linear layers",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1678",),
    engines={
        "vllm": (
            "error",
            "leaves an expert's bias uninitialized: no completeness check (vLLM 0.32)",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A linear layer has a bias and a ``pre_quant_scale`` where its counterparts have them.

    **What it does.** Compares biases with the base, or without one with the layout or with equal
    modules; ``pre_quant_scale`` with equal modules. A difference between the experts of one layer
    is an error. A difference between layers is a warning: an exporter may fold ``pre_quant_scale``
    into a norm in one layer and not in others.

    **Why it happens.** Unfusing experts took the weights without their biases, or AWQ scales were
    written for calibrated experts only.

    **Impact.** The tensor is uninitialized or zero for some experts, and prompts that are routed to
    them produce garbage.

    **Fix.** Copy biases from the source; take ``pre_quant_scale`` from the exporter's state.
    """
    if ctx.expectations.unrelated_base:
        return
    for name in ctx.expectations.naming.biases:
        ctx.tally.see()
        yield ctx.finding(
            "linear layer without its bias",
            cause="bias",
            where=Where(name),
            observed="absent",
            expected="present",
        )
    leaves = ["pre_quant_scale"]
    if ctx.expectations.why_unknown:
        leaves.insert(0, "bias")
    linears = [m for m in ctx.candidate.modules.values() if m.dims is not None]
    for leaf in leaves:
        having = {m.name for m in linears if leaf in m.parts}
        if having:
            yield from _compare_counterparts(ctx, leaf, having)


def _by_kind(ctx: Context) -> dict[str, list[Module]]:
    """Return the modules by name with layer and expert numbers replaced, MTP modules apart."""
    kinds: dict[str, list[Module]] = {}
    for name, module in ctx.candidate.modules.items():
        prefix = "mtp " if ctx.expectations.is_mtp(name) else ""
        kinds.setdefault(f"{prefix}{collapse(name)}", []).append(module)
    return kinds


def _compare_counterparts(ctx: Context, leaf: str, having: set[str]) -> Iterator[Finding]:
    """Yield the linear layers without ``leaf`` if other experts of their layer, or other layers,
    have it.
    """
    for modules in _by_kind(ctx).values():
        linears = [m for m in modules if m.dims is not None]
        # DeepSeek-V4's hash-routed layers have no score correction, its other layers do.
        if leaf == "bias" and linears and role(linears[0].name) == "router":
            continue
        if not any(m.name in having for m in linears):
            continue
        ctx.tally.see(len(linears))
        groups: dict[str, list[Module]] = {}
        for module in linears:
            key = expert_key(module.name)
            groups.setdefault(key.container if key else module.name, []).append(module)
        for members in groups.values():
            without = [m for m in members if m.name not in having]
            among_experts = len(without) < len(members)
            others = "other experts of the layer" if among_experts else "other layers"
            for module in without:
                yield ctx.finding(
                    f"no {leaf}, but {others} have one",
                    cause=leaf,
                    where=Where(f"{module.name}.{leaf}"),
                    observed="absent",
                    expected="present",
                    severity="error" if among_experts else "warning",
                )
