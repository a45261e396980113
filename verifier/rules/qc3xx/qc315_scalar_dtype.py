# SPDX-License-Identifier: Apache-2.0
"""QC315: scalar scale has the wrong dtype."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.rules.scale_dtypes import scale_kinds, wrong_dtypes
from verifier.schemes import FLOATS


@rule(
    "QC315",
    "scalar scale has the wrong dtype",
    severity="error",
    depth="header",
    unit="scalars",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("TensorRT-LLM: NVFP4LinearMethod.load_weight_scales",),
    engines={
        "vllm": (
            "error",
            "copies with a cast, so the lost precision stays lost (vLLM 0.32's loader)",
        ),
        "trtllm": (
            "error",
            "its loader mentions that ModelOpt once stored o_proj.weight_scale_2 as BF16",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Global, activation and KV scales (``weight_scale_2``, ``input_scale``, ``k_scale``) are F32.

    **What it does.** Compares the dtype of each scalar with its format. The block, row or tensor
    scale of the weight itself is QC304.

    **Why it happens.** Scalars were cast to the model's dtype on save.

    **Impact.** BF16 keeps 8 bits: every value of the tensor is off by up to 0.4%, and scales that
    must be equal in q, k and v, or in w1 and w3, no longer match their block scales. Loaders cast
    silently.

    **Fix.** Save them as float32 from the exporter's state; casting back does not recover the lost
    bits.
    """
    kinds = scale_kinds(ctx.candidate.module_groups, scalars=True)
    ctx.tally.see(sum(len(kind.group.modules) for kind in kinds))
    for fmt, tensor, expected in wrong_dtypes(kinds):
        yield ctx.finding(
            f"{fmt.algo}: {tensor.name.rpartition('.')[2]} is stored as {tensor.dtype}",
            cause="format",
            tensor=tensor.name,
            observed=tensor.dtype,
            expected=expected,
        )
    declaration = ctx.candidate.declarations.effective
    third_party = declaration is not None and not declaration.modelopt
    for _, leaf, tensor in ctx.candidate.kv_scales:
        ctx.tally.see()
        if tensor.dtype != "F32" and not (third_party and tensor.dtype in FLOATS):
            yield ctx.finding(
                f"{leaf} of the KV cache is stored as {tensor.dtype}",
                cause="cache",
                tensor=tensor.name,
                observed=tensor.dtype,
                expected="F32",
            )
