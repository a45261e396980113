# SPDX-License-Identifier: Apache-2.0
"""QC201: unknown tensor name."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC201",
    "unknown tensor name",
    severity="error",
    depth="header",
    unit="tensors",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1833",),
    engines={
        "vllm": ("error", "stops: no module or parameter of that name"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor has the name that the Hub layout gives it, prefix included.

    **What it does.** Compares all names with the layout of the family (with a base: also of the
    base). It reports names under a wrong prefix, transformers' module names and names that the
    layout does not have. A prefix of a different submodel is QC202, a calibration buffer QC111, a
    name with a wrapper's part QC209, a redundant tied head QC313.

    **Why it happens.** transformers renames modules when it loads a checkpoint. An exporter that
    saves the names in memory writes names that no engine knows: ``model.language_model.layers``
    instead of ``language_model.model.layers``.

    **Impact.** vLLM raises "no module or parameter named", or skips the tensor and leaves the
    parameter uninitialized.

    **Fix.** Apply the family's conversion mapping in reverse to every key, scales included.
    """
    if ctx.expectations.why_unknown:
        ctx.tally.miss(len(ctx.candidate.names), ctx.expectations.why_unknown)
        return
    ctx.tally.see(len(ctx.candidate.names))
    if ctx.expectations.unrelated_base:
        yield ctx.finding(
            "the base is a different model",
            cause="different model",
            observed=ctx.expectations.unrelated_base,
            expected="the same architecture and sizes",
        )
        return
    for name, expected_name in ctx.expectations.naming.prefix:
        in_memory = ctx.expectations.family is not None and ctx.expectations.family.in_memory(name)
        message = "transformers module name instead of the checkpoint key"
        yield ctx.finding(
            message if in_memory else "wrong prefix",
            cause="prefix",
            tensor=name,
            observed=name,
            expected=expected_name,
        )
    for name in ctx.expectations.naming.unknown:
        if name not in ctx.candidate.tied_heads:
            yield ctx.finding(
                "the layout has no such tensor", cause="unknown name", tensor=name, observed=name
            )
