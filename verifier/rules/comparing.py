# SPDX-License-Identifier: Apache-2.0
"""Walks quantized weights next to their base, for the rules that compare the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

from verifier.checkpoint import Tensor
from verifier.reconstruction.cause import CheckpointPair, Reconstruction, reconstruct
from verifier.reconstruction.method import DIFFERENT, DIFFERS, WeightMethod
from verifier.rules.context import Context
from verifier.schemes import Format, Module


def weight_method(ctx: Context) -> WeightMethod | None:
    """Return how the weights of the whole checkpoint relate to the base's, worked out once per
    process; None without a base that the weights come from.
    """
    if ctx.base is None or ctx.expectations.unrelated_base:
        return None
    pair = CheckpointPair(ctx.expectations.candidate, ctx.base, ctx.payload)
    return ctx.cached("weight method", lambda: WeightMethod(pair, ctx.inputs.weights))


def reconstruction(ctx: Context, module: Module) -> Reconstruction:
    """Return the comparison of a quantized weight with its base, made once for all rules; its cause
    is ``unjudged`` where there is nothing to compare.

    A difference that the method explains by which all weights moved has the cause ``explained``,
    and one that contradicts that method ``unexplained``: QC519 reports the method.
    """
    if ctx.base is None or ctx.expectations.unrelated_base:
        return Reconstruction("unjudged", "the base is a different model")
    pair = CheckpointPair(ctx.candidate, ctx.base, ctx.payload)
    results = ctx.payload.results
    result = results.of_name("reconstruction", module.name, lambda: reconstruct(pair, module))
    method = weight_method(ctx) if result.cause in DIFFERENT else None
    if method is None or not method.survey.method:
        return result
    explanation = method.of_module(module, method.survey.method)
    if explanation.holds:
        return replace(result, cause="explained")
    if result.cause in ("weak", "moved") and explanation.against:
        return replace(result, cause="unexplained", detail=explanation.against)
    return result


def differing_bytes(ctx: Context, tensor: Tensor) -> int:
    """Return how many bytes of a pass-through tensor differ from its source, and note for the
    survey of QC519 whether any do.
    """
    count = ctx.payload.scan(tensor).differing.count
    ctx.payload.results.of_name(DIFFERS, tensor.name, lambda: count > 0)
    return count


def is_explained(ctx: Context, tensor: Tensor, source: Tensor) -> bool:
    """Whether the method by which all weights moved explains how a pass-through tensor differs from
    its source.
    """
    method = weight_method(ctx) if ctx.merged_from is None else None
    if method is None or not method.survey.method or method.survey.is_rounding:
        return False
    return method.of_tensor(tensor, source, method.survey.method).holds


def compared(
    ctx: Context, modules: Iterable[Module]
) -> Iterator[tuple[Tensor, Format, Reconstruction]]:
    """Yield weight, format and comparison of each module, and tally it; modules that cannot be
    compared are missed.
    """
    for module in modules:
        weight, fmt = module.weight, ctx.candidate.format_of(module)
        result = reconstruction(ctx, module)
        if result.cause == "unjudged" or weight is None or fmt is None:
            ctx.tally.miss(1, result.reason)
            continue
        ctx.tally.see()
        yield weight, fmt, result
