# SPDX-License-Identifier: Apache-2.0
"""QC509: scale convention is inverted."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from verifier.checkpoint import NUMPY_DTYPES, Tensor
from verifier.decoding import E2M1_MAX, E4M3_MAX, Float32, e8m0_table
from verifier.findings import Finding, Where
from verifier.reconstruction.cause import inverse, is_e8m0
from verifier.rules.comparing import reconstruction
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, SCALE_BITS, Format, Module

HUGE = 1e4
"""Weights of language models are smaller than this."""
PLAUSIBLE = (1e-6, 1e2)
ACTIVATION = (1e-2, 1e3)
HUGE_ACTIVATION = 1e6
FEWEST = 4
_CODE_256 = 0x78


def _check_all(ctx: Context) -> Iterator[Finding]:
    yield from _default_scales(ctx)
    yield from _check_activations(ctx)


def _default_scales(ctx: Context) -> Iterator[Finding]:
    """Yield FP8 weights whose every scale is 1.0 although the values fill the range of FP8: weights
    up to 448 were divided by a scale that was lost.
    """
    found = [(m, f) for m, f in ctx.candidate.formatted if f.name in ("fp8", "fp8_per_channel")]
    if len(found) < FEWEST or not all(_is_one(ctx, m) for m, _ in found):
        return
    weights = [m.weight for m, _ in found if m.weight is not None]
    ctx.tally.see(len(weights))
    filling = [w for w in weights if ctx.payload.extremes(w)[1] & 0x7F >= _CODE_256]
    if len(filling) == len(weights):
        yield ctx.finding(
            "every weight_scale is 1.0, and the values fill the range of FP8: a default, not the"
            " scale of the weights",
            cause="default scales",
            tensor=weights[0].name,
            observed="weights up to 448",
            expected="amax / 448",
            count=len(weights),
        )


def _check_activations(ctx: Context) -> Iterator[Finding]:
    """Yield activation scales that are implausible as stored and plausible under 1/x."""
    for leaf in ("input_scale", "input_scale_2", "input_global_scale"):
        tensors = [t for _, _, t in ctx.candidate.scale_tensors((leaf,)) if t.elements == 1]
        if len(tensors) < FEWEST:
            continue
        values = np.asarray([float(ctx.payload.array(t).reshape(-1)[0]) for t in tensors])
        good = values[np.isfinite(values) & (values > 0)]
        if not good.size:
            continue  # QC503
        divisor = leaf == "input_global_scale"
        median = float(np.median(1 / good if divisor else good))
        code_max = float(E4M3_MAX * E2M1_MAX)
        largest, largest_inverted = median * code_max, code_max / median
        if largest > HUGE_ACTIVATION and ACTIVATION[0] <= largest_inverted <= ACTIVATION[1]:
            yield ctx.finding(
                f"{leaf} may be inverted: it implies activations above 10^6 as stored, and ordinary"
                " ones under 1/x",
                cause="inverted activations",
                where=Where(tensors[0].name, tensors[0].file, byte=tensors[0].offset),
                observed=f"median {float(np.median(good)):.3e}",
                expected="2688 / amax" if divisor else "amax / 2688",
                severity="warning",
                count=len(tensors),
            )


@rule(
    "QC509",
    "scale convention is inverted",
    severity="error",
    depth="payload",
    unit="quantized weights",
    split=True,
    across=_check_all,
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
    """Scales are factors; only compressed-tensors stores its global scales as divisors.

    **What it does.** With a base: compares the decoded values under the scale and under 1/x.
    Without one: a weight counts as inverted if its largest value is above 10,000 as stored and
    ordinary under 1/x. FP8 whose every scale is 1.0 while its values fill the range lost its
    scales. Activation scales can only be checked for plausibility, over all of them: a
    warning.

    **Why it happens.** A conversion renamed the tensor without taking 1/x, or ``weight_scale_inv``
    was taken for an inverse.

    **Impact.** Weights of 10^7: one token repeated, or NaN.

    **Fix.** Store 1/x (for E8M0: 254 minus the byte).
    """
    for module, fmt in ctx.candidate.formatted:
        tensor = _checked_scale(module, fmt)
        if tensor is None or not _is_read(fmt, tensor):
            continue
        result = reconstruction(ctx, module) if ctx.base is not None else None
        if result is not None and result.cause != "unjudged":
            ctx.tally.see()
            if result.cause == "inverted":
                reason = "the dequantized weight matches the base under 1/x"
                yield _inverted(ctx, tensor, reason, f"relative error {result.relative:.3g}")
            continue
        largest, largest_inverted = _largest_weight(ctx, fmt, tensor)
        if largest is None or largest_inverted is None:
            ctx.tally.miss(1, "the scales are not finite")
            continue
        ctx.tally.see()
        if largest > HUGE and PLAUSIBLE[0] <= largest_inverted <= PLAUSIBLE[1]:
            reason = "weights are implausibly large as stored and ordinary under 1/x"
            observed = f"largest weight about {largest:.3g}, {largest_inverted:.3g} under 1/x"
            yield _inverted(ctx, tensor, reason, observed)


def _is_one(ctx: Context, module: Module) -> bool:
    scale = module.scale
    if scale is None or scale.dtype not in FLOATS or not scale.elements:
        return False
    return bool((ctx.payload.array(scale) == 1).all())


def _inverted(ctx: Context, tensor: Tensor, reason: str, observed: str) -> Finding:
    leaf = tensor.name.rpartition(".")[2]
    divisor = leaf == "weight_global_scale"
    problem = "a factor instead of a divisor" if divisor else "a divisor instead of a factor"
    return ctx.finding(
        f"{leaf} is {problem}: {reason}",
        cause="inverted",
        where=Where(tensor.name, tensor.file, byte=tensor.offset),
        observed=observed,
        expected="2688 / amax" if divisor else "a factor: amax over the format's range",
    )


def _checked_scale(module: Module, fmt: Format) -> Tensor | None:
    """Return the scale of a weight that may be a factor or a divisor."""
    if fmt.packed:
        return module.parts.get("weight_scale_2") or module.parts.get("weight_global_scale")
    return module.scale


def _is_read(fmt: Format, scale: Tensor) -> bool:
    """Whether a scale is of a format and a dtype whose values are known."""
    sibling = fmt.sibling(scale.name.rpartition(".")[2])
    if sibling is None or scale.dtype not in sibling.dtypes or sibling.signed:
        return False
    return fmt.weight.codes != "opaque" and sibling.values_in(scale.dtype) in SCALE_BITS


def _largest_weight(ctx: Context, fmt: Format, tensor: Tensor) -> tuple[float | None, float | None]:
    """Estimate the largest weight from the scales alone, as stored and under 1/x."""
    code_max = _largest_code(fmt) * (float(E4M3_MAX) if fmt.packed else 1.0)
    if is_e8m0(fmt, NUMPY_DTYPES[tensor.dtype]):
        exponent = min(ctx.payload.extremes(tensor)[1], 254)
        if code_max * float(e8m0_table()[exponent]) <= HUGE:
            return 0.0, 0.0  # every block is ordinary: the bytes need not be read again
    parts = {tensor.name.rpartition(".")[2]: ctx.payload.array(tensor)}
    medians = [_median(_factors(p, fmt)) for p in (parts, inverse(parts, fmt))]
    stored, inverted = (code_max * m if np.isfinite(m) and m > 0 else None for m in medians)
    return stored, inverted


def _largest_code(fmt: Format) -> float:
    if fmt.weight.codes == "int":
        return float(1 << (fmt.bits - 1))
    return {"e2m1": float(E2M1_MAX), "e2m3": 7.5, "e3m2": 28.0}.get(
        fmt.weight.codes, float(E4M3_MAX)
    )


def _factors(parts: dict[str, npt.NDArray[np.generic]], fmt: Format) -> Float32:
    ((leaf, values),) = parts.items()
    if is_e8m0(fmt, values.dtype):
        return e8m0_table()[values.view(np.uint8)]
    floats: Float32 = values.astype(np.float32)
    if leaf == "weight_global_scale":
        with np.errstate(divide="ignore", over="ignore"):
            floats = np.float32(1) / floats
    return floats


def _median(values: Float32) -> float:
    if not values.size or np.isnan(values).any():
        return float("nan")
    if values.size == 1:  # most often; numpy takes 30 microseconds to find it
        return float(values.item())
    return float(np.median(values.astype(np.float64)))
