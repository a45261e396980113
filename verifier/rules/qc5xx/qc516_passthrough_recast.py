# SPDX-License-Identifier: Apache-2.0
"""QC516: a tensor that is not quantized has another dtype than its source."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC516",
    "untouched tensor was recast",
    severity="error",
    depth="header",
    unit="untouched tensors",
    needs=("base|merged_from",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer export of a float32 router, reproduced",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A tensor that is not quantized keeps the dtype of its source (``--merged-from`` where given,
    else the base).

    **Why.** The exporter saved from memory, where everything is BF16.
    **Hurts.** A float32 router written as BF16 picks other experts; logits of a BF16 run do not
    show it.
    **Mend.** Copy the bytes from the source file.
    """
    for ours, theirs in ctx.pass_through():
        ctx.tally.see()
        if ours.dtype != theirs.dtype:
            yield ctx.finding(
                f"stored as {ours.dtype} where the source has {theirs.dtype}",
                where=Where(ours.name, ours.file),
                observed=ours.dtype,
                expected=theirs.dtype,
            )
