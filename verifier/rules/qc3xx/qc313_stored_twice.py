# SPDX-License-Identifier: Apache-2.0
"""QC313: a weight is both quantized and not, or stored though it is tied."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS


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
            "takes one of both for a parameter of its size; a tied lm_head is skipped when it loads",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A module holds one weight: codes with scales, or plain values without; a tied head holds
    none.

    Scales beside a plain weight are told here (codes that are not packed are QC305; a module that
    the config excludes or does not list is QC401 and QC410). A plain ``lm_head.weight`` under
    ``tie_word_embeddings: true`` is a warning, and silent where the base does the same. A fused
    stack beside its parts is QC203.

    **Why.** Offloading unties the head and saves it again; scales are of one pass and the weight of
    another.
    **Hurts.** The engine refuses the size, reads values as codes, or ignores the head that was
    meant.
    **Mend.** Drop the copy that should not be there, or clear the flag where head and embedding
    differ.
    """
    for module in ctx.candidate.quantized_modules:
        weight, parts = module.weight, module.parts
        if weight is None:
            continue
        ctx.tally.see()
        if "weight" in parts and "weight_packed" in parts:
            yield ctx.finding(
                "the weight stands twice, packed and not",
                tensor=parts["weight"].name,
                observed="weight and weight_packed",
                expected="one of both",
            )
            continue
        cover = ctx.candidate.declared_for(module)
        scales = [leaf for leaf in module.scales if leaf != "pre_quant_scale"]
        if weight.dtype in FLOATS and scales and (cover is None or cover.algo is not None):
            yield ctx.finding(
                "scales stand beside a weight that is not quantized",
                tensor=weight.name,
                observed=f"{weight.dtype} {list(weight.shape)} with {', '.join(scales)}",
                expected="codes, or no scales",
            )
    for name in sorted(ctx.candidate.tied_heads):
        ctx.tally.see()
        head = ctx.candidate.modules[name.rpartition(".")[0]]
        if head.quantized and head.weight is not None:
            yield ctx.finding(
                "the head is tied to the embedding, and a quantized one is stored",
                tensor=head.weight.name,
                observed=head.weight.dtype,
                expected="absent, or tie_word_embeddings: false",
            )
        elif head.weight is not None and (ctx.base is None or name not in ctx.base.tied_heads):
            yield ctx.finding(
                "the head is tied to the embedding, and one of its own is stored",
                tensor=head.weight.name,
                observed="tie_word_embeddings: true",
                expected="absent, or tie_word_embeddings: false",
                severity="warning",
            )
