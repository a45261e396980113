# SPDX-License-Identifier: Apache-2.0
"""QC207: a routed expert, or a projection of one, is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
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
        "vllm": ("error", "starts without a word, and the expert's rows keep what memory held"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each sparse layer has all experts that the config (with a base: the base) declares, each with
    all projections.

    A lost bias of a projection that is here is QC314.

    **Why.** A layer filter that matched nothing, a partial merge, a partial download of one source.
    **Hurts.** vLLM has no completeness check for experts: the rows keep whatever memory held, and
    only prompts that are routed there answer nonsense.
    **Mend.** Export or merge the layer again; compare the expert sets of both sources first.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    owed = sum(1 for n in ctx.expectations.shapes if ".experts." in n)
    ctx.tally.see(owed)
    if ctx.expectations.unrelated_base:
        return
    for key, name in ctx.expectations.naming.experts:
        yield ctx.finding(
            f"a routed expert has no {key.leaf}",
            where=Where(name),
            observed=f"expert {key.expert} absent",
            expected="present",
        )
