# SPDX-License-Identifier: Apache-2.0
"""QC313: weight is stored two ways."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.alike import each_quantized
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS, Module


@rule(
    "QC313",
    "weight is stored two ways",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/llm-compressor#2798",),
    engines={
        "vllm": (
            "error",
            "loads whichever fits the parameter; unties and loads a stored head (0.32)",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A module stores one weight, quantized with scales or plain without; a tied head stores none.

    **What it does.** Reports scales next to an unquantized weight, and a weight that is stored
    packed and unpacked. A plain ``lm_head.weight`` together with ``tie_word_embeddings: true`` is a
    warning; it is not reported if the base does the same. Quantized values that are not packed are
    QC305, an excluded or unlisted module QC401 or QC410, a fused stack next to its parts QC203.

    **Why it happens.** Offloading unties the head and saves it again, or scales and weight come
    from different passes.

    **Impact.** The engine refuses the size, reads plain values as quantized ones, or ignores the
    head that was trained.

    **Fix.** Drop the redundant copy, or clear the flag if head and embedding differ.
    """
    for group in ctx.candidate.module_groups:
        if group.first.weight is not None:
            ctx.tally.see(len(group.modules))
    yield from each_quantized(ctx, _check_module)
    for name in sorted(ctx.candidate.tied_heads):
        ctx.tally.see()
        head = ctx.candidate.modules[name.rpartition(".")[0]]
        if head.quantized and head.weight is not None:
            yield ctx.finding(
                "the head is tied to the embedding, but a quantized head is stored",
                cause="quantized tied head",
                tensor=head.weight.name,
                observed=head.weight.dtype,
                expected="absent, or tie_word_embeddings: false",
            )
        elif head.weight is not None and (ctx.base is None or name not in ctx.base.tied_heads):
            yield ctx.finding(
                "the head is tied to the embedding, but a separate head is stored",
                cause="tied head",
                tensor=head.weight.name,
                observed="tie_word_embeddings: true",
                expected="absent, or tie_word_embeddings: false",
                severity="warning",
            )


def _check_module(ctx: Context, module: Module) -> Iterator[Finding]:
    """Yield a weight that is stored twice, or plain next to scales."""
    weight, parts = module.weight, module.parts
    if weight is None:
        return
    stored = [leaf for leaf in ("weight", "weight_packed", "qweight") if leaf in parts]
    if len(stored) > 1:
        yield ctx.finding(
            "the weight is stored twice, packed and unpacked",
            cause="two weights",
            tensor=parts[stored[0]].name,
            observed=" and ".join(stored),
            expected="one of them",
        )
        return
    declared = ctx.candidate.declared_for(module)
    scales = [leaf for leaf in module.scales if leaf != "pre_quant_scale"]
    if weight.dtype in FLOATS and scales and (declared is None or declared.algo is not None):
        yield ctx.finding(
            "scales next to an unquantized weight",
            cause="plain weight with scales",
            tensor=weight.name,
            observed=f"{weight.dtype} {list(weight.shape)} with {', '.join(scales)}",
            expected="quantized values, or no scales",
        )
