# SPDX-License-Identifier: Apache-2.0
"""QC517: quantized values do not match the base."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC517",
    "quantized values do not match the base",
    severity="error",
    depth="payload",
    split=True,
    unit="quantized weights",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("re-encoding of the base under the stored scales, own",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Quantized again under the stored scales, the base gives the stored values, up to rounding.

    **What it does.** Quantizes the base under the stored scales and compares block by block. That
    works for ``max``, MSE, a scale sweep and four-over-six: their scales differ, but not the
    nearest values. A block is reported if its error is half as large again as its scale allows, or
    if a single factor (of a block, a row, a tile or the tensor) would correct it: then its values
    were chosen under a different scale.

    GPTQ-style methods move values intentionally: if more than 10% of the other blocks do not hold
    the nearest values, only the factor is checked. A tensor that is lost as a whole is QC515.

    **Why it happens.** Rows were swapped, rolled or overwritten after quantization, or a shard was
    written only partly.

    **Impact.** Those rows compute something else, while the error of the whole tensor stays
    unremarkable.

    **Fix.** Quantize the tensor again.
    """
    for weight, fmt, result in compared(ctx, ctx.candidate.quantized_modules):
        if result.cause == "part" and result.place is not None:
            row, block = result.place
            has_blocks = 0 < (fmt.group_size or 0) <= 32
            if result.detail == "other scales":
                message = "quantized values were chosen under other scales than those stored"
            else:
                message = "blocks of quantized values do not match the base, the others do"
            yield ctx.finding(
                message,
                where=Where(weight.name, weight.file, row, block if has_blocks else None),
                observed=f"relative error {result.relative:.3f} of the tensor{result.as_a_whole}",
                expected=f"about {result.by_max:.3f}",
                count=result.count,
            )
