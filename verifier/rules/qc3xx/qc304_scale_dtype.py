# SPDX-License-Identifier: Apache-2.0
"""QC304: weight scale has the wrong dtype."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.rules.scale_dtypes import scale_kinds, wrong_dtypes


@rule(
    "QC304",
    "weight scale has the wrong dtype",
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
    """Block scales are F8_E4M3 (NVFP4) or U8/F8_E8M0 (MXFP8), those of FP8 and integers floats; all
    of a format in one dtype.

    **What it does.** Compares the dtype of each weight scale with those that readers of its format
    accept, and with that of most scales of the format. Global, activation and KV scales are QC315.

    **Why it happens.** A framework saved the scales in its own dtype.

    **Impact.** Loaders copy with a cast: MXFP8 scales stored as F32 values all become the byte 0,
    which is 2^-127, and the model silently produces garbage. TensorRT-LLM stops.

    **Fix.** Save the bytes in the format's own dtype.
    """
    kinds = scale_kinds(ctx.candidate.module_groups, scalars=False)
    ctx.tally.see(sum(len(kind.group.modules) for kind in kinds))
    for fmt, tensor, expected in wrong_dtypes(kinds):
        yield ctx.finding(
            f"{fmt.algo}: {tensor.name.rpartition('.')[2]} is stored as {tensor.dtype}",
            tensor=tensor.name,
            observed=tensor.dtype,
            expected=expected,
        )
