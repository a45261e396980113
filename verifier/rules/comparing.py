# SPDX-License-Identifier: Apache-2.0
"""Walks quantized weights next to their base, for the rules that compare the two."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from verifier.checkpoint import Tensor
from verifier.reconstruction.cause import CheckpointPair, Reconstruction, reconstruct
from verifier.rules.context import Context
from verifier.schemes import Format, Module


def reconstruction(ctx: Context, module: Module) -> Reconstruction:
    """Return the comparison of a quantized weight with its base, made once for all rules; its cause
    is ``unjudged`` where there is nothing to compare.
    """
    if ctx.base is None or ctx.expectations.unrelated_base:
        return Reconstruction("unjudged", "the base is a different model")
    pair = CheckpointPair(ctx.candidate, ctx.base, ctx.payload)
    results = ctx.payload.results
    return results.of_name("reconstruction", module.name, lambda: reconstruct(pair, module))


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
