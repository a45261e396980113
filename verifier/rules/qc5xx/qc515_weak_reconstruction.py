# SPDX-License-Identifier: Apache-2.0
"""QC515: decoded values are further from the base than the format need be."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC515",
    "weak reconstruction",
    severity="warning",
    depth="payload",
    unit="quantized weights",
    needs=("base",),
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#2243",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Decoded, each quantized weight is as near to the base as its format can be on that very
    tensor.

    Relative error is ||decoded - base|| / ||base||. It is compared with the best codes under the
    stored scales and with plain ``max`` calibration, whichever is worse; no fixed band exists (0
    for +-c weights, 0.36 on blocks at the floor).
    **Why.** Scales rounded after the codes were chosen; a swapped, foreign or permuted tensor.
    **Hurts.** Quality; with a foreign tensor, everything.
    **Mend.** Encode the tensor again from the base. Beyond 1.25 times what is possible, or where
    the values are more than 3% too large or too small as a whole, it is a warning; where more than
    half of the tensor is lost and the format is not to blame, an error. Where the cause can be
    told, the rule that tells it speaks instead: QC507, QC509 to QC512, QC517. Codes beside the
    nearest all over a tensor, as often above as below, are what GPTQ and its like do on purpose (or
    a base of another revision): information only.
    """
    if ctx.base is None or ctx.expectations.unrelated_base:
        ctx.tally.miss(len(ctx.candidate.quantized_modules), "the base is another model")
        return
    for weight, found, r in compared(ctx, ctx.candidate.quantized_modules):
        if r.cause == "nan codes" and r.place is not None:
            first = int(ctx.payload.bytes_of(weight)[r.place[0]])
            yield ctx.finding(
                "NaN codes",
                where=ctx.at_byte(weight, r.place[0]),
                severity="error",
                count=r.count,
                observed=f"0x{first:02X}",
                expected="0x00..0x7E or 0x80..0xFE",
            )
        elif r.cause == "zero base":
            yield ctx.finding(
                "the base is all zero and the decoded weight is not",
                tensor=weight.name,
                severity="error",
            )
        elif r.cause == "lost":
            other = f"; it begins as {r.detail} of the base" if r.detail else ""
            yield ctx.finding(
                "the decoded weight is not the base's",
                tensor=weight.name,
                severity="error",
                observed=f"relative error {r.relative:.3f}{other}",
                expected=f"about {r.by_max:.3f} ({found.algo} on this tensor)",
            )
        elif r.cause == "moved":
            yield ctx.finding(
                "codes beside the nearest throughout, in both directions: weights that GPTQ or its like moved, or another"
                " revision of the base",
                tensor=weight.name,
                severity="info",
                observed=f"relative error {r.relative:.4f}",
                expected=f"{r.best:.4f} with the nearest codes",
            )
        elif r.cause == "weak":
            yield ctx.finding(
                "further from the base than the format need be",
                tensor=weight.name,
                observed=f"relative error {r.relative:.4f}{r.as_a_whole}",
                expected=f"at most {r.best:.4f} ({found.algo} on this tensor)",
            )
