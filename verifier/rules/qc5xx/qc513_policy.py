# SPDX-License-Identifier: Apache-2.0
"""QC513: router, embedding or head is quantized."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, role

ROLES = {"router": "the router", "embedding": "the token embedding", "lm_head": "the output head"}


@rule(
    "QC513",
    "router, embedding or head is quantized",
    severity="warning",
    depth="header",
    unit="routers, embeddings, heads",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("intel/auto-round#1776", "warpfront/hipfire#180", "vllm-project/vllm#25923"),
    engines={"vllm": ("warning", "silently loads a quantized router")},
)
def check(ctx: Context) -> Iterator[Finding]:
    """Routers, the token embedding and the output head are not quantized.

    **What it does.** Looks at the stored dtype of these weights. A head in eight bits is a choice
    of some releases, and only a note.

    **Why it happens.** A pattern was too broad, or the exporter treats the router as any other
    nn.Linear.

    **Impact.** A quantized router selects different experts: loops, and 152 of 256 rows below a
    cosine of 0.99 in one report. Most engines have no kernel for a quantized embedding.

    **Fix.** Exclude the module and copy its weight from the base.
    """
    for module in ctx.candidate.modules.values():
        kind = role(module.stem)
        if kind not in ROLES or module.weight is None or module.dims is None:
            continue
        ctx.tally.see()
        if module.quantized and module.weight.dtype not in FLOATS:
            eight_bit_head = kind == "lm_head" and module.weight.dtype == "F8_E4M3"
            fmt = ctx.candidate.format_of(module) or module.inferred_format
            yield ctx.finding(
                f"{ROLES[kind]} is quantized",
                where=Where(module.weight.name, module.weight.file),
                observed=fmt.algo if fmt else module.weight.dtype,
                expected="unquantized",
                severity="info" if eight_bit_head else None,
            )
