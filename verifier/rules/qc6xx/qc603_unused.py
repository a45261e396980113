# SPDX-License-Identifier: Apache-2.0
"""QC603: the engine drops or degrades values."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

if TYPE_CHECKING:
    from verifier.rules.engine_loading import EngineLoad


@rule(
    "QC603",
    "the engine drops or degrades values",
    severity="warning",
    depth="engine",
    unit="tensors",
    consumers=("vLLM",),
    sources=("vLLM 0.32 model_loader, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every tensor of the checkpoint reaches a parameter of the engine's model, with its values.

    **What it does.** Reports tensors that vLLM reads and that reach no parameter, and the warnings
    of its loader that mean a silent loss (global scales that differ within a fused layer, KV-cache
    scales that are not in the checkpoint). Errors are tensors whose values are cast to another kind
    of number, such as floats into bytes, and scales that are zero or not finite after loading. What
    also happens to the base is not reported, nor are MTP layers and the stored copy of a tied head.

    **Why it happens.** The engine maps no parameter to the name, or has one scale for several
    projections.

    **Impact.** The values have no effect, or other values take their place.

    **Fix.** Use names and dtypes that the engine reads; unify the scales of fused projections.
    """
    load, base = ctx.engine_loads.candidate, ctx.engine_loads.base
    if load.reason or load.rejected:
        ctx.tally.miss(1, load.reason or f"{load.engine} rejects the checkpoint (QC601)")
        return
    ctx.tally.see(load.tensors)
    yield from _unused(ctx, load, set(base.unused) if base is not None else set())
    yield from _degraded(ctx, load)
    in_base = set(base.warnings) if base is not None else set()
    for warning in load.warnings:
        if warning not in in_base:
            yield ctx.finding(
                "vLLM warns of lost values",
                cause="lost values",
                where=Where(),
                observed=f"{warning} ({load.engine})",
            )


def _unused(ctx: Context, load: EngineLoad, in_base: set[str]) -> Iterator[Finding]:
    for name in load.unused:
        expected = ctx.expectations.is_mtp(name) or name in ctx.candidate.tied_heads
        if name not in in_base and not expected:
            yield ctx.finding(
                "vLLM reads the tensor into no parameter",
                cause="unused",
                tensor=name,
                observed=f"unused ({load.engine})",
                expected="a parameter of this name",
            )


def _degraded(ctx: Context, load: EngineLoad) -> Iterator[Finding]:
    for cast in load.casts:
        yield ctx.finding(
            "vLLM casts values to another kind of number",
            cause="cast",
            tensor=cast.tensor,
            observed=f"{cast.have} into {cast.want} ({cast.name}, {load.engine})",
            expected=cast.want,
            severity="error",
        )
    for scale in load.bad_scales:
        yield ctx.finding(
            "a scale is zero or not finite after vLLM loaded it",
            cause="scale after loading",
            tensor=scale.tensor or scale.name,
            observed=f"{scale.name}: {scale.zeros:,} zero and {scale.nonfinite:,} non-finite"
            f" of {scale.of:,} ({load.engine})",
            expected="positive, finite scales",
            severity="error",
        )
