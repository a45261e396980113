# SPDX-License-Identifier: Apache-2.0
"""QC602: a parameter of the engine is never written."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC602",
    "a parameter of the engine is never written",
    severity="error",
    depth="engine",
    unit="parameters",
    consumers=("vLLM",),
    sources=("vLLM 0.32 model_loader, run on a CPU",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every element of every parameter of the engine's model is written by the checkpoint.

    **What it does.** Records each operation of vLLM's loader that writes into a parameter, and
    reports the parameters of which elements were never written, with the share of these elements.
    Parameters that stay unwritten when the base is loaded are not reported, nor are the scales of
    the KV cache, which vLLM replaces by 1 (QC603 has its warning).

    **Why it happens.** A scale or a projection is missing, has a name that the loader skips, or is
    left unquantized within a parameter that the engine fuses.

    **Impact.** vLLM has no completeness check for quantized models: it serves whatever the memory
    contained.

    **Fix.** Write the missing tensors; leave a fused group unquantized as a whole, or quantize all
    of it.
    """
    load, base = ctx.engine_loads.candidate, ctx.engine_loads.base
    if load.reason or load.rejected:
        ctx.tally.miss(1, load.reason or f"{load.engine} rejects the checkpoint (QC601)")
        return
    ctx.tally.see(load.parameters)
    if load.layers is not None:
        ctx.tally.miss(1, f"only the first {load.layers} layers were built")
    in_base = {u.name for u in base.unwritten} if base is not None else set()
    for unwritten in load.unwritten:
        if unwritten.name in in_base:
            continue
        rest = f"; the rest is from {', '.join(unwritten.tensors)}" if unwritten.tensors else ""
        tensor = unwritten.tensors[0] if unwritten.tensors else unwritten.name
        known = ctx.checkpoint.tensors.get(tensor)
        yield ctx.finding(
            "vLLM never writes this parameter"
            if unwritten.share == 1
            else "vLLM leaves a part of this parameter unwritten",
            where=Where(tensor, known.file if known else None),
            observed=f"{unwritten.name}: {unwritten.share:.3%}, {counted(unwritten.bytes, 'byte')}"
            f" ({load.engine}){rest}",
            expected="every element written",
        )
