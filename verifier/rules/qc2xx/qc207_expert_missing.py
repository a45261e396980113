# SPDX-License-Identifier: Apache-2.0
"""QC207: routed expert is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.expectations import stored_name
from verifier.rules.registry import rule


@rule(
    "QC207",
    "routed expert is missing",
    severity="error",
    depth="header",
    unit="expert projections",
    consumers=("vLLM", "SGLang"),
    sources=("NVIDIA/Model-Optimizer#1806",),
    engines={
        "vllm": ("error", "starts silently with the expert uninitialized"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each sparse layer has all routed experts, and each expert has all its projections.

    **What it does.** Compares the stored experts with the config; with a base, with the base. A
    missing bias of a stored projection is QC314.

    **Why it happens.** A layer filter that matched nothing, a partial merge, or a partial download
    of a source.

    **Impact.** vLLM does not check experts for completeness: the missing ones stay uninitialized,
    and only prompts that are routed to them produce garbage.

    **Fix.** Export or merge the layer again; compare the expert sets of the sources first.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(sum(".experts." in name for name in ctx.expectations.shapes))
    if ctx.expectations.unrelated_base:
        return
    for key, name in ctx.expectations.naming.experts:
        yield ctx.finding(
            f"a routed expert has no {key.leaf}",
            where=Where(stored_name(ctx.candidate, name)),
            observed=f"expert {key.expert} absent",
            expected="present",
        )
