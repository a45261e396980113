# SPDX-License-Identifier: Apache-2.0
"""QC304: a scale has another dtype than its format gives it."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS


@rule(
    "QC304",
    "weight scale has another dtype",
    severity="error",
    depth="header",
    unit="weight scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#868",),
    engines={
        "vllm": ("error", "copies with a cast: MXFP8 scales stored as F32 become the byte 0"),
        "trtllm": ("error", "stops: it asserts F8_E4M3 block scales"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Block scales are F8_E4M3 (NVFP4) or U8/F8_E8M0 (MXFP8), the scales of FP8 weights F32.

    Global, activation and KV scales are QC315's. compressed-tensors stores FP8 scales in the
    model's dtype, which is sound.

    **Why.** A framework saved its own dtype.
    **Hurts.** Loaders copy with a cast: MXFP8 scales stored as F32 values become the byte 0,
    2^-127, everywhere, and the model is garbage without a message. TensorRT-LLM asserts.
    **Mend.** Save the bytes of the format's own dtype.
    """
    lenient = (
        ctx.candidate.declarations.effective is not None
        and not ctx.candidate.declarations.effective.known
    )
    for module, found, sibling, tensor in ctx.candidate.scales:
        if sibling.scalar and tensor is not module.scale:
            continue
        ctx.tally.see()
        own = lenient and sibling.dtypes == ("F32",) and tensor.dtype in FLOATS
        if tensor.dtype not in sibling.dtypes and not own:
            yield ctx.finding(
                f"{found.algo}: {tensor.name.rpartition('.')[2]} is stored as {tensor.dtype}",
                tensor=tensor.name,
                observed=tensor.dtype,
                expected=" or ".join(sibling.dtypes),
            )
