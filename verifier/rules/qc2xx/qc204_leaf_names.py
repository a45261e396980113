# SPDX-License-Identifier: Apache-2.0
"""QC204: the last parts of a name are spelled otherwise."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC204",
    "leaf name of another family",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#1833", "allenai/open-instruct#1820"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Projections and containers are spelled as the family spells them: ``w1/w3/w2`` or
    ``gate/up/down_proj``.

    **Why.** An exporter used one table of names for all families.
    **Hurts.** The engine does not find the tensor; where it does not check, the parameter stays
    unwritten.
    **Mend.** Rename by the family's own mapping.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    for name, wanted in ctx.expectations.naming.leaf:
        yield ctx.finding(
            "the name is spelled as another family's", tensor=name, observed=name, expected=wanted
        )
