# SPDX-License-Identifier: Apache-2.0
"""QC204: leaf name of a different family."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC204",
    "leaf name of a different family",
    severity="error",
    depth="header",
    unit="tensors",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1833", "allenai/open-instruct#1820"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections and containers have this family's names, such as ``w1`` or ``gate_proj``.

    **What it does.** Matches names that differ from the layout only in the spelling of their last
    parts.

    **Why it happens.** An exporter used one table of names for all families.

    **Impact.** The engine does not find the tensor; where it does not check, the parameter stays
    uninitialized.

    **Fix.** Rename with the family's own mapping.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    for name, expected_name in ctx.expectations.naming.leaf:
        yield ctx.finding(
            "the name is spelled as in a different family",
            tensor=name,
            observed=name,
            expected=expected_name,
        )
