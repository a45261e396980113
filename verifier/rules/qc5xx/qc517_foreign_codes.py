# SPDX-License-Identifier: Apache-2.0
"""QC517: part of a weight holds codes that are not the base's."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC517",
    "codes are not the base's nearest",
    severity="error",
    depth="payload",
    split=True,
    unit="quantized weights",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("re-encoding of the base under the stored scales, own",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Encoded again under the stored scales, the base gives the stored codes, up to rounding.

    That holds for ``max``, MSE, a scale sweep and four-over-six alike, whose scales differ and
    whose codes do not.
    **Why.** Rows were swapped, rolled or overwritten after encoding; a shard was written in part.
    **Hurts.** Those rows compute something else, and the whole tensor's error stays below what
    alarms.
    **Mend.** Encode the tensor again. A block counts where it is off by half as much again as its
    scale allows, or where one factor would make it right: its codes were chosen under another scale
    (a block's, a row's, a tile's, the tensor's). GPTQ and its like move weights on purpose: where
    more than 10% of the other blocks hold codes beside the nearest, only the factor is judged. A
    tensor that is lost as a whole is QC515's.
    """
    for weight, found, r in compared(ctx, ctx.candidate.quantized_modules):
        if r.cause == "part" and r.place is not None:
            row, block = r.place
            width = found.group_size or 0
            yield ctx.finding(
                "codes chosen under other scales than those stored"
                if r.detail == "other scales"
                else "blocks of codes that are not the base's, in a weight that otherwise is",
                where=Where(
                    weight.name, weight.file, row=row, block=block if 0 < width <= 32 else None
                ),
                observed=f"relative error {r.relative:.3f} of the tensor{r.as_a_whole}",
                expected=f"about {r.by_max:.3f}",
                count=r.count,
            )
