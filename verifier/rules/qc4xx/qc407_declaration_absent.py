# SPDX-License-Identifier: Apache-2.0
"""QC407: quantized tensors and no declaration."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC407",
    "quantization is not declared",
    severity="error",
    depth="header",
    unit="quantized modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("sgl-project/sglang#13919",),
    engines={
        "vllm": ("error", "builds an unquantized model and stops at the first scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A checkpoint with quantized tensors says so, in config.json, in hf_quant_config.json or in
    both.

    **Why.** config.json was copied from the source. A config that is no JSON object counts as
    absent.
    **Hurts.** The engine builds a BF16 model and dies at the first scale ("no parameter
    w2_input_scale").
    **Mend.** Write ``quantization_config`` and hf_quant_config.json.
    """
    for problem in ctx.checkpoint.problems:
        if problem.kind == "json":
            ctx.tally.see()
            yield ctx.finding(f"{problem.file}: {problem.message}", where=Where(None, problem.file))
    if ctx.checkpoint.config is None and "config.json" not in ctx.checkpoint.files:
        ctx.tally.see()
        yield ctx.finding(
            "config.json is absent", where=Where(None, "config.json"), observed="absent"
        )
    for found in (ctx.candidate.declarations.inline, ctx.candidate.declarations.file):
        for text in found.problems if found else ():
            yield ctx.finding(
                f"{found.file}: {text}" if found else text,
                where=Where(None, found.file if found else None),
            )
    quantized = ctx.candidate.quantized_modules
    ctx.tally.see(len(quantized))
    if quantized and ctx.candidate.declarations.effective is None:
        part = quantized[0].weight
        yield ctx.finding(
            f"{len(quantized)} modules are quantized and neither config.json nor hf_quant_config.json says so",
            where=Where(part.name if part else quantized[0].name, part.file if part else None),
            observed="no declaration",
        )
