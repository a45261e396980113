# SPDX-License-Identifier: Apache-2.0
"""QC508: NaN or infinity in a weight."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import CACHE_LEAVES, FLOATS, SIBLING_LEAVES


@rule(
    "QC508",
    "NaN or infinity in a weight",
    severity="error",
    depth="payload",
    unit="unquantized tensors",
    repairable=True,
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/llm-compressor#2101",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """No unquantized floating-point tensor contains NaN or infinity.

    **What it does.** Scans all unquantized BF16, F16 and F32 tensors. Scales are QC502 and QC503.

    **Why it happens.** NaN activations during a calibration that folds into weights, or a norm that
    was saved uninitialized.

    **Impact.** Every output that depends on the value becomes NaN.

    **Fix.** Copy the tensor from the source.
    """
    scales = SIBLING_LEAVES | CACHE_LEAVES
    tensors = (
        tensor
        for module in ctx.candidate.modules.values()
        for leaf, tensor in module.parts.items()
        if tensor.dtype in FLOATS and leaf not in scales
    )
    for tensor in tensors:
        ctx.tally.see()
        bad = ctx.payload.scan(tensor).nonfinite
        if bad.count:
            size = tensor.nbytes // tensor.elements
            yield ctx.finding(
                "NaN or infinite values",
                where=ctx.at_byte(tensor, bad.first * size),
                observed=f"0x{bad.value:0{size * 2}X}",
                expected="finite",
                count=bad.count,
            )
