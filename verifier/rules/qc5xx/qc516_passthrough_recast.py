# SPDX-License-Identifier: Apache-2.0
"""QC516: pass-through tensor changed dtype."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC516",
    "pass-through tensor changed dtype",
    severity="error",
    depth="header",
    unit="pass-through tensors",
    repairable=True,
    needs=("base|merged_from",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer export of a float32 router, reproduced",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A tensor that is not quantized keeps the dtype of its source.

    **What it does.** Compares the dtype of each pass-through tensor with ``--merged-from`` if
    given, else with the base.

    **Why it happens.** The exporter saved the tensors from memory, where everything is BF16.

    **Impact.** A float32 router written as BF16 selects different experts; the logits of a BF16 run
    do not show it.

    **Fix.** Copy the bytes from the source file.
    """
    for tensor, source in ctx.pass_through():
        ctx.tally.see()
        if tensor.dtype != source.dtype:
            yield ctx.finding(
                f"stored as {tensor.dtype}, but {source.dtype} in the source",
                where=Where(tensor.name, tensor.file),
                observed=tensor.dtype,
                expected=source.dtype,
            )
