# SPDX-License-Identifier: Apache-2.0
"""QC206: MTP module is missing."""

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
    """Every MTP (multi-token prediction) tensor of the base is stored here.

    **What it does.** With a base: compares the MTP tensors, quantized or not. Without one: fewer
    modules than config.json declares are a warning. No module at all is not an error then, since
    only the base shows whether a release ships them: MiniMax-M3 declares one and ships none.

    **Why it happens.** transformers drops ``mtp.*`` when it loads a model, and the exporter looks
    for those tensors only next to a local path.

    **Impact.** Speculative decoding fails, or runs with an uninitialized draft head.

    **Fix.** Copy the tensors from the source checkpoint, and exclude them from quantization (QC402,
    QC403).
    """
    expectations = ctx.expectations
    declared = max(0, min(config_value(ctx.checkpoint.config, *COUNTS) or 0, 1000))
    if ctx.base is not None:
        missing = expectations.naming.mtp
        if declared or missing:
            ctx.tally.see(sum(map(expectations.is_mtp, ctx.base.names)))
        if expectations.unrelated_base:
            return
        for name in missing:
            yield ctx.finding(
                "missing MTP tensor", cause="missing", where=Where(name), observed="absent"
            )
        return
    if not declared:
        return
    ctx.tally.see()
    first_tensors: dict[int, Tensor] = {}
    for name, module in ctx.candidate.modules.items():
        if expectations.is_mtp(name):
            first_tensors.setdefault(layer_of(name) or 0, next(iter(module.parts.values())))
    if not first_tensors:
        ctx.tally.miss(
            declared,
            "config.json declares MTP modules, but none is stored:"
            " pass --base to know whether to expect any",
        )
    elif len(first_tensors) < declared:
        ctx.tally.see(len(first_tensors))
        first = first_tensors[min(first_tensors)]
        yield ctx.finding(
            "fewer MTP modules than config.json declares",
            cause="fewer modules",
            where=Where(first.name, first.file),
            severity="warning",
            observed=len(first_tensors),
            expected=declared,
        )
    else:
        ctx.tally.see(len(first_tensors))
