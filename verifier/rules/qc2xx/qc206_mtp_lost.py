# SPDX-License-Identifier: Apache-2.0
"""QC206: MTP modules are missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import layer_of

COUNTS = ("num_nextn_predict_layers", "num_mtp_modules", "mtp_num_hidden_layers", "num_mtp_layers")
"""Config keys under which families declare their MTP modules: DeepSeek and GLM, MiniMax, Qwen3.5,
others."""


@rule(
    "QC206",
    "MTP module is missing",
    severity="error",
    depth="header",
    unit="MTP counts and tensors",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=(
        "NVIDIA/Model-Optimizer#2427",
        "NVIDIA/Model-Optimizer#2312",
        "NVIDIA/Model-Optimizer#2174",
        "vllm-project/llm-compressor#2735",
        "vllm-project/llm-compressor#3118",
    ),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every MTP (next-token prediction) tensor that the base has is here, as a weight or as its
    quantized parts.

    Whether a release ships the modules that its config declares only the base says: MiniMax-M3
    declares one and ships none. Without a base, fewer modules than declared are a warning, and none
    at all is not judged.

    **Why.** transformers drops ``mtp.*`` when it loads; the exporter looks for it only beside a
    local path.
    **Hurts.** Speculative decoding fails, or runs with an unwritten draft head.
    **Mend.** Copy the tensors from the source checkpoint, and exclude them from quantization
    (QC402, QC403).
    """
    declared = max(0, min(config_value(ctx.checkpoint.config, *COUNTS) or 0, 1000))
    if ctx.base is not None:
        ctx.tally.see(
            sum(map(ctx.expectations.is_mtp, ctx.base.names))
            if declared or ctx.expectations.naming.mtp
            else 0
        )
        if ctx.expectations.unrelated_base:
            return
        for name in ctx.expectations.naming.mtp:
            yield ctx.finding(
                "an MTP tensor of the base is missing", where=Where(name), observed="absent"
            )
        return
    if not declared:
        return
    ctx.tally.see()
    found: dict[int, Tensor] = {}
    for name, module in ctx.candidate.modules.items():
        if ctx.expectations.is_mtp(name):
            found.setdefault(layer_of(name) or 0, next(iter(module.parts.values())))
    if not found:
        ctx.tally.miss(
            declared,
            "config.json declares MTP and no tensor is here: only a base says whether any belongs",
        )
    elif len(found) < declared:
        ctx.tally.see(len(found))
        first = found[min(found)]
        yield ctx.finding(
            "fewer MTP modules than config.json declares",
            where=Where(first.name, first.file),
            severity="warning",
            observed=len(found),
            expected=declared,
        )
    else:
        ctx.tally.see(len(found))
