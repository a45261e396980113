# SPDX-License-Identifier: Apache-2.0
"""QC304: a scale has another dtype than its format gives it."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC304", "scale has another dtype", severity="error", depth="header", unit="scale tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"), sources=("NVIDIA/Model-Optimizer#868",),
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """Block scales are F8_E4M3 (NVFP4) or U8/F8_E8M0 (MXFP8), global and input scales F32.

    **Why.** A framework saved its own dtype.
    **Hurts.** Loaders copy with a cast: MXFP8 scales stored as F32 values become the byte 0, 2^-127, everywhere, and the
    model is garbage without a message. TensorRT-LLM asserts.
    **Mend.** Save the bytes of the format's own dtype.
    """
    for alike in ctx.alike:
        first, found = alike.first, alike.format
        if found is None:
            continue
        for leaf in first.scales:
            sibling = found.sibling(leaf)
            if sibling is None:
                continue
            ctx.tally.see(len(alike.modules))
            if first.parts[leaf].dtype in sibling.dtypes:
                continue
            for module in alike.modules:
                tensor = module.parts[leaf]
                yield ctx.finding(
                    f"{found.algo}: {leaf} is stored as {tensor.dtype}", tensor=tensor.name,
                    observed=tensor.dtype, expected=" or ".join(sibling.dtypes),
                )  # fmt: skip
