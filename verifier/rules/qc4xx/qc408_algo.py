# SPDX-License-Identifier: Apache-2.0
"""QC408: the algorithm is null, unknown, or not the one on disk."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, KNOWN_ALGOS, same_layout

_INTEGER_ALGOS = frozenset(
    {"INT8_SQ", "INT4_AWQ", "W4A16_AWQ", "W4A8_AWQ", "W8A16", "W8A8_SQ_PER_CHANNEL"}
)
_INTEGER = frozenset(
    {"awq", "gptq", "bitsandbytes", "aqlm", "eetq", "hqq", "vptq", "spqr", "higgs", "auto-round"}
)


@rule(
    "QC408",
    "quant_algo does not fit the tensors",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer changelog (nvfp4_mlp_only)",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """``quant_algo`` is one that engines know, and the one that dtypes and shapes on disk show.

    **Why.** The selector missed the modules and the tag is null; a config was kept from another
    export.
    **Hurts.** Engines refuse the checkpoint, or read one format as another.
    **Mend.** State the format that is on disk. (NVFP4 declared over unpacked weights is QC305.)
    """
    declaration = ctx.candidate.declaration
    quantized = ctx.candidate.quantized_modules
    yield from _foreign(ctx)
    if declaration is None or not quantized:
        return
    where = Where(None, declaration.file)
    if declaration.algo is None:
        ctx.tally.see()
        yield ctx.finding(
            f"quant_algo is null and {len(quantized)} modules are quantized",
            where=where,
            observed="null",
        )
        return
    if declaration.algo not in KNOWN_ALGOS:
        ctx.tally.see()
        algo = declaration.algo
        yield ctx.finding(
            f"quant_algo {algo!r} is none that engines know", where=where, observed=algo
        )
        return
    for module in quantized:
        cover, shown = declaration.declared_for(module.name), module.inferred_format
        declared = cover.format
        if cover.algo in _INTEGER_ALGOS and shown is not None and not declaration.mixed:
            ctx.tally.see()
            yield ctx.finding(
                f"{cover.algo} is declared, a format of integers, and the tensors are {shown.algo}",
                tensor=module.weight.name if module.weight else module.name,
                observed=shown.algo,
                expected=cover.algo,
            )
            continue
        if declared is None or module.weight is None:
            continue
        ctx.tally.see()
        if shown is None:
            # Packed ones are QC305's, plain weights beside scales QC313's.
            if module.weight.dtype not in (*FLOATS, declared.weight_dtype) and not declared.packed:
                yield ctx.finding(
                    f"{cover.algo} is declared, and a weight is {module.weight.dtype}",
                    tensor=module.weight.name,
                    observed=module.weight.dtype,
                    expected=declared.weight_dtype,
                )
            continue
        if declaration.mixed:
            continue  # QC410 compares what is shown, module by module
        if not same_layout(declared, shown) and not declared.packed:
            yield ctx.finding(
                f"{declaration.algo} is declared, the tensors are {shown.algo}",
                tensor=module.weight.name,
                observed=shown.algo,
                expected=declaration.algo,
            )


def _foreign(ctx: Context) -> Iterator[Finding]:
    """Yield a finding where a method of integer formats is declared over tensors that are plainly
    FP8.
    """
    found = ctx.candidate.declarations.effective
    if found is None or found.known or found.method not in _INTEGER:
        return
    algos = [
        m.inferred_format.algo
        for m in ctx.candidate.quantized_modules
        if m.weight and m.weight.dtype == "F8_E4M3" and m.inferred_format
    ]
    ctx.tally.see(len(algos))
    if algos:
        yield ctx.finding(
            f"quant_method {found.method!r} is declared, the tensors are {algos[0]}",
            where=Where(None, found.file),
            observed=found.method,
            expected=algos[0],
            count=len(algos),
        )
