# SPDX-License-Identifier: Apache-2.0
"""QC508: an unquantized tensor holds NaN or infinity."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, SCALE_LEAVES, split

EXPONENT = {"BF16": (np.uint16, 0x7F80), "F16": (np.uint16, 0x7C00), "F32": (np.uint32, 0x7F800000)}


@rule(
    "QC508", "NaN or infinity in a weight", severity="error", depth="payload", unit="unquantized tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"), sources=("vllm-project/llm-compressor#2101",),
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """No unquantized floating tensor holds NaN or infinity.

    **Why.** NaN activations in calibration that folds into weights; an uninitialised norm that was saved.
    **Hurts.** Every output that passes the value.
    **Mend.** Copy the tensor from the source.
    """
    for tensor in ctx.checkpoint.tensors.values():
        if tensor.dtype not in FLOATS or split(tensor.name)[1] in SCALE_LEAVES:
            continue
        ctx.tally.see()
        dtype, mask = EXPONENT[tensor.dtype]
        bits = ctx.bytes_of(tensor).view(dtype)
        # Infinity and NaN are the numbers whose exponent bits are all set.
        bad = (bits & mask) == mask
        if bad.any():
            first = int(np.argmax(bad))
            yield ctx.finding(
                "NaN or infinite values", where=ctx.at_byte(tensor, first * bits.itemsize),
                observed=f"0x{int(bits[first]):0{bits.itemsize * 2}X}", expected="finite", count=int(bad.sum()),
            )  # fmt: skip
