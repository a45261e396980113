# SPDX-License-Identifier: Apache-2.0
"""QC605: pass-through tensor differs from its source."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.comparing import differing_bytes, is_explained
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC605",
    "pass-through tensor differs from its source",
    severity="error",
    depth="payload",
    unit="pass-through tensors",
    repairable=True,
    split=True,
    needs=("base|merged_from",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1806",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """A tensor that is not re-quantized has the bytes of its source.

    **What it does.** Compares all pass-through tensors byte by byte with ``--merged-from`` if
    given, else with the base. With ``--merged-from`` that includes the quantized tensors that the
    merge keeps, values and scales. A different dtype is QC516. What a method explains that moved
    all weights, such as a norm that absorbed a scale, is QC519.

    **Why it happens.** A cast back and forth during a copy, or a tensor of a different revision.

    **Impact.** The release is not based on what it claims to be; the effect depends on the tensor.

    **Fix.** Copy byte ranges instead of loading and saving.
    """
    for tensor, source in ctx.pass_through():
        if tensor.dtype != source.dtype or tensor.shape != source.shape:
            continue
        ctx.tally.see()
        if differing_bytes(ctx, tensor) and not is_explained(ctx, tensor, source):
            facts = ctx.payload.scan(tensor)
            yield ctx.finding(
                "bytes differ from the source",
                where=ctx.at_byte(tensor, facts.differing.first),
                observed=f"0x{facts.observed:02X}, {facts.differing.count:,} bytes differ",
                expected=f"0x{facts.differing.value:02X}",
            )
