# SPDX-License-Identifier: Apache-2.0
"""QC512: E8M0 scale is zero."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.quantized import QuantizedCheckpoint
from verifier.reconstruction.cause import E8M0_WIDESPREAD
from verifier.reconstruction.exponents import e8m0_zeros
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format, Module


@rule(
    "QC512",
    "E8M0 scale is zero",
    severity="error",
    depth="payload",
    split=True,
    unit="E8M0 scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM 0.32 loads MXFP8 scales stored as float32, reproduced",),
    engines={
        "vllm": (
            "error",
            "casts float scales to uint8 on load, silently: 2^-10 becomes 0, which is 2^-127",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """An E8M0 exponent byte is 0 (2^-127) only if all quantized values of its block are zero.

    **What it does.** Compares the zero bytes among the scales with the values of their blocks. It
    is an error in more than a tenth of a tensor's blocks, else a warning. The byte 255 is NaN
    (QC502).

    **Why it happens.** Scales were cast to uint8 by value, so every 2^e below one became 0.

    **Impact.** The blocks read as zero: the layer is lost, silently.

    **Fix.** Store the exponent plus 127.
    """
    for module, fmt in e8m0_modules(ctx.candidate):
        scale = module.scale
        if scale is None:
            continue
        ctx.tally.see(scale.elements)
        zeros = e8m0_zeros(ctx.payload, module, fmt)
        if zeros is not None:
            count, first, used = zeros
            widespread = count > E8M0_WIDESPREAD * used
            yield ctx.finding(
                "E8M0 scales of 2^-127 for nonzero values: these blocks read as zero",
                where=ctx.at_byte(scale, first),
                observed="0x00",
                expected="0x01..0xFE",
                count=count,
                severity=None if widespread else "warning",
            )


def e8m0_modules(checkpoint: QuantizedCheckpoint) -> Iterator[tuple[Module, Format | None]]:
    """Yield the modules whose weight scale is E8M0, with their format where it is known."""
    for module in checkpoint.quantized_modules:
        scale, fmt = module.scale, checkpoint.stored_format(module)
        if scale is None or scale.dtype not in ("U8", "F8_E8M0") or module.weight is None:
            continue
        sibling = fmt.siblings[0] if fmt is not None else None
        if sibling is None or sibling.values_in(scale.dtype) == scale.dtype:
            yield module, fmt
