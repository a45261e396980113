# SPDX-License-Identifier: Apache-2.0
"""QC513: a router, the embedding or the head is quantized."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, role

WHAT = {"router": "a router", "embedding": "the token embedding", "lm_head": "the output head"}


@rule(
    "QC513",
    "router, embedding or head is quantized",
    severity="warning",
    depth="header",
    unit="routers, embeddings, heads",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("intel/auto-round#1776", "warpfront/hipfire#180", "vllm-project/vllm#25923"),
    engines={"vllm": ("warning", "loads a quantized router without a word")},
)
def check(ctx: Context) -> Iterator[Finding]:
    """Routers, the token embedding and the output head are not quantized.

    **Why.** A pattern was too wide, or the router is an nn.Linear like any other to the exporter.
    **Hurts.** A quantized router chooses other experts: loops, 152 of 256 rows below a cosine of
    0.99 in one report; most engines have no kernel for a quantized embedding. A head in eight bits
    is a choice that some releases make: information only.
    **Mend.** Exclude the module and copy its weight from the base.
    """
    for module in ctx.candidate.modules.values():
        kind = role(module.name)
        if kind not in WHAT or module.weight is None or module.dims is None:
            continue
        ctx.tally.see()
        if module.quantized and module.weight.dtype not in FLOATS:
            mild = kind == "lm_head" and module.weight.dtype == "F8_E4M3"
            shown = ctx.candidate.format_of(module) or module.inferred_format
            yield ctx.finding(
                f"{WHAT[kind]} is quantized",
                where=Where(module.weight.name, module.weight.file),
                observed=shown.algo if shown else module.weight.dtype,
                expected="unquantized",
                severity="info" if mild else None,
            )
