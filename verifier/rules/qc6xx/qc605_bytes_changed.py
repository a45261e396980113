# SPDX-License-Identifier: Apache-2.0
"""QC605: a tensor that must be untouched has other bytes."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC605",
    "untouched tensor has other bytes",
    severity="error",
    depth="payload",
    unit="untouched tensors",
    split=True,
    needs=("base|merged_from",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1806",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A tensor that is not re-quantized has the bytes of its source (``--merged-from`` where given,
    else the base).

    With ``--merged-from`` that includes the quantized tensors that the merge keeps, codes and
    scales.
    **Why.** A cast there and back on copy; a tensor of another revision.
    **Hurts.** The release is not the base it claims to be; the harm depends on the tensor.
    **Mend.** Copy byte ranges, do not load and save. (Another dtype is QC516.)
    """
    for ours, theirs in ctx.pass_through():
        if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
            continue
        ctx.tally.see()
        facts = ctx.payload.scan(ours)
        if facts.differing.count:
            yield ctx.finding(
                "bytes differ from the source",
                where=ctx.at_byte(ours, facts.differing.first),
                observed=f"0x{facts.observed:02X}, {facts.differing.count:,} bytes differ",
                expected=f"0x{facts.differing.value:02X}",
            )
