# SPDX-License-Identifier: Apache-2.0
"""QC408: the algorithm is null, unknown, or not the one on disk."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import KNOWN_ALGOS, same_layout


@rule(
    "QC408", "quant_algo does not fit the tensors", severity="error", depth="header", unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"), sources=("NVIDIA/Model-Optimizer changelog (nvfp4_mlp_only)",),
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """``quant_algo`` is one that engines know, and the one that dtypes and shapes on disk show.

    **Why.** The selector missed the modules and the tag is null; a config was kept from another export.
    **Hurts.** Engines refuse the checkpoint, or read one format as another.
    **Mend.** State the format that is on disk. (NVFP4 declared over unpacked weights is QC305.)
    """
    declaration = ctx.declaration
    quantized = ctx.quantized_modules
    if declaration is None or not quantized:
        return
    where = Where(None, declaration.file)
    if declaration.algo is None:
        ctx.tally.see()
        yield ctx.finding(f"quant_algo is null and {len(quantized)} modules are quantized", where=where, observed="null")
        return
    if declaration.algo not in KNOWN_ALGOS:
        ctx.tally.see()
        algo = declaration.algo
        yield ctx.finding(f"quant_algo {algo!r} is none that engines know", where=where, observed=algo)
        return
    if declaration.mixed:
        return  # QC410 compares module by module
    for module in quantized:
        declared, shown = declaration.cover(module.name).format, module.shown
        if declared is None or shown is None or module.weight is None:
            continue
        ctx.tally.see()
        if not same_layout(declared, shown) and not declared.packed:
            yield ctx.finding(
                f"{declaration.algo} is declared, the tensors are {shown.algo}", tensor=module.weight.name,
                observed=shown.algo, expected=declaration.algo,
            )  # fmt: skip
