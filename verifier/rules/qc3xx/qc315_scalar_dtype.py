# SPDX-License-Identifier: Apache-2.0
"""QC315: a global, activation or KV scale is no float32."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import FLOATS


@rule(
    "QC315",
    "scalar has another dtype",
    severity="error",
    depth="header",
    unit="scalars",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("TensorRT-LLM: NVFP4LinearMethod.load_weight_scales",),
    engines={
        "vllm": (
            "error",
            "copies with a cast, so what the narrower dtype lost stays lost (vLLM 0.32's loader)",
        ),
        "trtllm": (
            "error",
            "its loader notes that ModelOpt once stored o_proj.weight_scale_2 as BF16",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Global, activation and KV scales (``weight_scale_2``, ``input_scale``, ``k_scale`` …) are
    F32.

    The scale of the weight itself, block, row or tensor, is QC304's.

    **Why.** Scalars were cast to the model's dtype on save.
    **Hurts.** BF16 keeps 8 bits: every value of the tensor is off by up to 0.4 %, and scales that
    must be equal in q, k and v, or in w1 and w3, are no longer what the block scales were made for.
    Loaders cast without a word.
    **Mend.** Save them as float32 from the exporter's state; a cast back does not bring the bits
    back.
    """
    lenient = (
        ctx.candidate.declarations.effective is not None
        and not ctx.candidate.declarations.effective.known
    )
    for module, found, sibling, tensor in ctx.candidate.scales:
        if not sibling.scalar or tensor is module.scale:
            continue
        ctx.tally.see()
        own = lenient and not found.packed and tensor.dtype in FLOATS
        if tensor.dtype not in sibling.dtypes and not own:
            yield ctx.finding(
                f"{found.algo}: {tensor.name.rpartition('.')[2]} is stored as {tensor.dtype}",
                tensor=tensor.name,
                observed=tensor.dtype,
                expected="F32",
            )
    for _, leaf, tensor in ctx.candidate.kv_scales:
        ctx.tally.see()
        if tensor.dtype != "F32" and not (lenient and tensor.dtype in FLOATS):
            yield ctx.finding(
                f"{leaf} of the KV cache is stored as {tensor.dtype}",
                tensor=tensor.name,
                observed=tensor.dtype,
                expected="F32",
            )
