# SPDX-License-Identifier: Apache-2.0
"""QC314: a bias or a pre_quant_scale is missing where its equals have one."""

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
    unit="linears",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1678",),
    engines={
        "vllm": (
            "error",
            "leaves an expert's bias as memory held it: no completeness check (vLLM 0.32)",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A linear has its bias where the base has it (without one: the layout, or its equals); so with
    ``pre_quant_scale``.

    Among the experts of one layer a difference is an error. Among layers it is a warning: an
    exporter may fold ``pre_quant_scale`` into a norm in one layer and not in another.

    **Why.** Un-fusing experts took the weights and not their biases; AWQ scales were written for
    calibrated experts only.
    **Hurts.** The sibling is unwritten memory or zero for some experts, and prompts that are routed
    there answer nonsense.
    **Mend.** Copy biases from the source; take ``pre_quant_scale`` from the exporter's state.
    """
    if ctx.expectations.unrelated_base:
        return
    for name in ctx.expectations.naming.biases:
        ctx.tally.see()
        yield ctx.finding(
            "the linear is here, and its bias is not",
            where=Where(name),
            observed="absent",
            expected="present",
        )
    leaves = (
        ("pre_quant_scale",) if not ctx.expectations.why_unknown else ("bias", "pre_quant_scale")
    )
    having = {
        leaf: [m for m in ctx.candidate.modules.values() if leaf in m.parts and m.dims is not None]
        for leaf in leaves
    }
    for leaf, found in having.items():
        if found:
            yield from _compare(ctx, leaf, {m.name for m in found})


def _by_kind(ctx: Context) -> dict[str, list[Module]]:
    """Return the modules by name with layer and expert numbers replaced, MTP modules apart."""
    kinds: dict[str, list[Module]] = {}
    for name, module in ctx.candidate.modules.items():
        prefix = "mtp " if ctx.expectations.is_mtp(name) else ""
        kinds.setdefault(f"{prefix}{collapse(name)}", []).append(module)
    return kinds


def _compare(ctx: Context, leaf: str, having: set[str]) -> Iterator[Finding]:
    """Yield the linears without ``leaf`` whose equals have it: experts of a layer first, then
    layers of a kind.
    """
    for modules in _by_kind(ctx).values():
        linears = [m for m in modules if m.dims is not None]
        if leaf == "bias" and linears and role(linears[0].name) == "router":
            continue  # DeepSeek-V4's layers that route by a hash have no score correction, the others do
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
            for module in without:
                yield ctx.finding(
                    f"no {leaf}, and {'other experts of the layer have' if among_experts else 'other layers have'} one",
                    where=Where(f"{module.name}.{leaf}"),
                    observed="absent",
                    expected="present",
                    severity="error" if among_experts else "warning",
                )
