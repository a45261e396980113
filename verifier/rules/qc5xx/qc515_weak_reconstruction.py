# SPDX-License-Identifier: Apache-2.0
"""QC515: weight is less accurate than its format allows."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.comparing import compared
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC515",
    "weight is less accurate than its format allows",
    severity="warning",
    depth="payload",
    unit="quantized weights",
    needs=("base",),
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#2243",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Dequantized, each weight is as close to the base as its format allows for that tensor.

    **What it does.** Compares the relative error ||dequantized - base|| / ||base|| with the best
    quantized values under the stored scales and with plain ``max`` calibration, whichever is worse.
    There is no fixed threshold: the error is 0 for weights of one magnitude and 0.36 for blocks at
    the floor of the scale.

    More than 1.25 times that error, or values that are more than 3% too large or too small as a
    whole, are a warning. If more than half of the tensor is lost and the format does not explain
    it, it is an error. If the cause is known, its own rule reports it instead: QC507, QC509 to
    QC512, QC517. Values off the nearest ones all over a tensor, in both directions, are only a
    note: GPTQ-style methods do that intentionally, and so does a base of a different revision.
    What a method explains that moved all weights (scaling, rotation, training) is QC519.

    **Why it happens.** Scales were rounded after the values were chosen, or the tensor was swapped,
    permuted or taken from a different model.

    **Impact.** Lower quality; with a wrong tensor, garbage.

    **Fix.** Quantize the tensor again from the base.
    """
    if ctx.base is None or ctx.expectations.unrelated_base:
        ctx.tally.miss(len(ctx.candidate.quantized_modules), "the base is a different model")
        return
    for weight, fmt, result in compared(ctx, ctx.candidate.quantized_modules):
        if result.cause == "nan codes" and result.place is not None:
            first = int(ctx.payload.bytes_of(weight)[result.place[0]])
            yield ctx.finding(
                "NaN among the quantized values",
                cause="nan codes",
                where=ctx.at_byte(weight, result.place[0]),
                severity="error",
                count=result.count,
                observed=f"0x{first:02X}",
                expected="0x00..0x7E or 0x80..0xFE",
            )
        elif result.cause == "overflow" and result.place is not None:
            yield ctx.finding(
                "the dequantized values overflow",
                cause="overflow",
                where=Where(weight.name, weight.file, *result.place),
                severity="error",
                count=result.count,
                observed="infinity",
                expected="finite values",
            )
        elif result.cause == "zero base":
            yield ctx.finding(
                "the base is all zero, but the dequantized weight is not",
                cause="zero base",
                tensor=weight.name,
                severity="error",
            )
        elif result.cause == "lost":
            similar = f"; it begins like {result.detail} of the base" if result.detail else ""
            yield ctx.finding(
                "the dequantized weight does not match the base",
                cause="lost",
                tensor=weight.name,
                severity="error",
                observed=f"relative error {result.relative:.3f}{similar}",
                expected=f"about {result.by_max:.3f} ({fmt.algo} on this tensor)",
            )
        elif result.cause == "moved":
            yield ctx.finding(
                "quantized values are not the nearest ones throughout, in both directions:"
                " a GPTQ-style method, or a different revision of the base",
                cause="moved",
                tensor=weight.name,
                severity="info",
                observed=f"relative error {result.relative:.4f}",
                expected=f"{result.best:.4f} with the nearest values",
            )
        elif result.cause == "unexplained":
            yield ctx.finding(
                "the weight differs from the base in a way that QC519's method does not explain",
                cause="unexplained",
                tensor=weight.name,
                severity="error",
                observed=f"relative error {result.relative:.4f}; {result.detail}",
                expected=f"at most {result.best:.4f} ({fmt.algo} on this tensor)",
            )
        elif result.cause == "weak":
            yield ctx.finding(
                "less accurate than the format allows",
                cause="weak",
                tensor=weight.name,
                observed=f"relative error {result.relative:.4f}{result.as_a_whole}",
                expected=f"at most {result.best:.4f} ({fmt.algo} on this tensor)",
            )
