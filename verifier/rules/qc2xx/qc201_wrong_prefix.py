# SPDX-License-Identifier: Apache-2.0
"""QC201: names under another prefix, or unknown to the layout."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC201",
    "name is not the hub's",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1833",),
    engines={
        "vllm": ("error", "stops: no module or parameter of that name"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor has the name that the hub layout gives it: no in-memory name, no other prefix,
    no invention.

    **Why.** transformers renames modules when it loads; an exporter that writes what is in memory
    writes names that no engine knows (``model.language_model.layers`` for
    ``language_model.model.layers``).
    **Hurts.** vLLM raises "no module or parameter named", or skips the tensor and leaves the
    parameter unwritten.
    **Mend.** Apply the family's conversion mapping in reverse to every key, scale siblings
    included. (A prefix of another part of the model is QC202, a calibration buffer QC111, a
    wrapper's name QC209, a redundant tied head QC313.)
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    if ctx.expectations.unrelated_base:
        yield ctx.finding(
            "the base is another model",
            observed=ctx.expectations.unrelated_base,
            expected="the same architecture and sizes",
        )
        return
    for name, wanted in ctx.expectations.naming.prefix:
        memory = ctx.expectations.family is not None and ctx.expectations.family.in_memory(name)
        what = (
            "a name of transformers' memory where the hub's belongs"
            if memory
            else "the name has another prefix"
        )
        yield ctx.finding(what, tensor=name, observed=name, expected=wanted)
    for name in ctx.expectations.naming.unknown:
        if name not in ctx.candidate.tied_heads:
            yield ctx.finding("no tensor of this layout has this name", tensor=name, observed=name)
