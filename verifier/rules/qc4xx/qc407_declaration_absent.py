# SPDX-License-Identifier: Apache-2.0
"""QC407: quantization is not declared."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted


@rule(
    "QC407",
    "quantization is not declared",
    severity="error",
    depth="header",
    unit="quantized modules",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("sgl-project/sglang#13919",),
    engines={
        "vllm": ("error", "builds an unquantized model and stops at the first scale"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A checkpoint with quantized tensors declares them in config.json or hf_quant_config.json.

    **What it does.** Reports quantized tensors without a declaration, a missing config.json, and
    what cannot be read of either file. A config that is not a JSON object counts as missing.

    **Why it happens.** config.json was copied from the source.

    **Impact.** The engine builds a BF16 model and stops at the first scale ("no parameter
    w2_input_scale").

    **Fix.** Write ``quantization_config`` and hf_quant_config.json.
    """
    for problem in ctx.checkpoint.problems:
        if problem.kind == "json":
            ctx.tally.see()
            yield ctx.finding(
                f"{problem.file}: {problem.message}",
                cause=problem.kind,
                where=Where(None, problem.file),
            )
    if ctx.checkpoint.config is None and "config.json" not in ctx.checkpoint.files:
        ctx.tally.see()
        yield ctx.finding(
            "config.json is missing",
            cause="no config.json",
            where=Where(None, "config.json"),
            observed="absent",
        )
    declarations = ctx.candidate.declarations
    for declaration in (declarations.inline, declarations.file):
        if declaration is not None:
            for text in declaration.problems:
                yield ctx.finding(
                    f"{declaration.file}: {text}",
                    cause=f"malformed {text.partition(' ')[0]}",
                    where=Where(None, declaration.file),
                )
    quantized = ctx.candidate.quantized_modules
    ctx.tally.see(len(quantized))
    if quantized and declarations.effective is None:
        weight = quantized[0].weight
        yield ctx.finding(
            f"{counted(len(quantized), 'quantized module')}, but no declaration in config.json"
            " or hf_quant_config.json",
            cause="no declaration",
            where=Where(weight.name, weight.file) if weight else Where(quantized[0].name),
            observed="no declaration",
        )
