# SPDX-License-Identifier: Apache-2.0
"""QC509: a divisor is stored where a factor belongs, or the other way."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import Tensor
from verifier.decoding import E2M1_MAX, E4M3_MAX, Float32, e8m0_table
from verifier.findings import Finding, Where
from verifier.reconstruction.cause import inverse
from verifier.rules.comparing import reconstruction
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Format, Module

HUGE = 1e4
"""No weight of a language model is as large as this."""
PLAUSIBLE = (1e-6, 1e2)
ACTIVATION = (1e-2, 1e3)
HUGE_ACTIVATION = 1e6
FEWEST = 4


@rule(
    "QC509",
    "scale convention is inverted",
    severity="error",
    depth="payload",
    unit="quantized weights",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("FlashML-org/FreeToken#430", "vllm-project/vllm#42549"),
    engines={
        "vllm": (
            "error",
            "multiplies by weight_scale_2 and divides by weight_global_scale, whatever the value",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """ModelOpt's ``weight_scale_2`` and FP8's and MXFP8's scales are factors, compressed-tensors'
    global scales divisors.

    **Why.** A conversion renamed the tensor and did not take 1/x; ``weight_scale_inv`` was believed
    to be an inverse.
    **Hurts.** Weights of 10^7: one token repeated, or NaN.
    **Mend.** Store 1/x (for E8M0: 254 minus the byte). With a base it is judged by value. Without,
    a weight is called inverted where its largest value would be above 10,000 as stored and an
    ordinary one under 1/x. For activation scales only that plausibility exists, over all of them: a
    warning.
    """
    for module, found in ctx.candidate.formatted:
        tensor = _scale(module, found)
        if tensor is None:
            continue
        r = reconstruction(ctx, module) if ctx.base is not None else None
        if r is not None and r.cause != "unjudged":
            ctx.tally.see()
            if r.cause == "inverted":
                yield _told(
                    ctx,
                    tensor,
                    "under 1/x the decoded weight is the base's",
                    f"relative error {r.relative:.3g}",
                )
            continue
        stored, turned = _tops(ctx, module, found, tensor)
        if stored is None or turned is None:
            ctx.tally.miss(1, "the scales are not finite")
            continue
        ctx.tally.see()
        if stored > HUGE and PLAUSIBLE[0] <= turned <= PLAUSIBLE[1]:
            yield _told(
                ctx,
                tensor,
                "weights are as large as no model's, and ordinary under 1/x",
                f"largest weight about {stored:.3g}, {turned:.3g} under 1/x",
            )
    yield from _activations(ctx)


def _told(ctx: Context, tensor: Tensor, why: str, observed: str) -> Finding:
    leaf = tensor.name.rpartition(".")[2]
    divisor = leaf == "weight_global_scale"
    return ctx.finding(
        f"{leaf} holds a {'factor where a divisor' if divisor else 'divisor where a factor'} belongs: {why}",
        where=Where(tensor.name, tensor.file, byte=tensor.offset),
        observed=observed,
        expected="2688 / amax" if divisor else "a factor: amax over the format's range",
    )


def _scale(module: Module, found: Format) -> Tensor | None:
    """Return the tensor whose convention is in question."""
    if found.packed:
        return module.parts.get("weight_scale_2") or module.parts.get("weight_global_scale")
    return module.scale


def _tops(
    ctx: Context, module: Module, found: Format, tensor: Tensor
) -> tuple[float | None, float | None]:
    """Return about the largest weight, by the scales alone, as stored and under 1/x."""
    reach = float(E4M3_MAX) * (float(E2M1_MAX) if found.packed else 1.0)
    if (
        found.name == "mxfp8"
        and reach * float(e8m0_table()[min(ctx.payload.extremes(tensor)[1], 254)]) <= HUGE
    ):
        return 0.0, 0.0  # every block is ordinary: the bytes need not be read again
    parts = {tensor.name.rpartition(".")[2]: ctx.payload.array(tensor)}
    values = [_middle(_factors(p, found)) for p in (parts, inverse(parts, found))]
    tops = [reach * v if np.isfinite(v) and v > 0 else None for v in values]
    return tops[0], tops[1]


def _factors(parts: dict[str, npt.NDArray[np.generic]], found: Format) -> Float32:
    ((leaf, values),) = parts.items()
    if found.name == "mxfp8":
        return e8m0_table()[values.view(np.uint8)]
    floats: Float32 = values.astype(np.float32)
    if leaf == "weight_global_scale":
        with np.errstate(divide="ignore", over="ignore"):
            floats = np.float32(1) / floats
    return floats


def _middle(values: Float32) -> float:
    return (
        float(np.median(values.astype(np.float64)))
        if values.size and not np.isnan(values).any()
        else float("nan")
    )


def _activations(ctx: Context) -> Iterator[Finding]:
    for leaf in ("input_scale", "input_global_scale"):
        tensors = [t for _, _, t in ctx.candidate.scale_tensors((leaf,)) if t.elements == 1]
        if len(tensors) < FEWEST:
            continue
        values = np.asarray([float(ctx.payload.array(t).reshape(-1)[0]) for t in tensors])
        good = values[np.isfinite(values) & (values > 0)]
        if not good.size:
            continue  # QC503
        middle = float(np.median(good if leaf == "input_scale" else 1 / good))
        reach = float(E4M3_MAX * E2M1_MAX)
        if middle * reach > HUGE_ACTIVATION and ACTIVATION[0] <= reach / middle <= ACTIVATION[1]:
            yield ctx.finding(
                f"{leaf} says that activations reach beyond 10^6, and ordinary values under 1/x: the convention may be"
                " inverted",
                where=Where(tensors[0].name, tensors[0].file, byte=tensors[0].offset),
                observed=f"median {float(np.median(good)):.3e}",
                expected="amax / 2688" if leaf == "input_scale" else "2688 / amax",
                severity="warning",
                count=len(tensors),
            )
