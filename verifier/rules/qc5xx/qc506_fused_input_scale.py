# SPDX-License-Identifier: Apache-2.0
"""QC506: projections that engines fuse have different activation scales."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import fused_groups


@rule(
    "QC506", "input_scale differs in a fused group", severity="warning", depth="payload", unit="fused groups",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"), sources=("TensorRT-LLM load_expert_fc31_input_scale_nvfp4",),
    engines={
        "vllm": ("warning", "keeps the largest and warns"),
        "sglang": ("info", "keeps the largest, of the pair or of all experts"),
        "trtllm": ("error", "asserts that w1 and w3, and q, k and v, have the same input_scale"),
    },
)  # fmt: skip
def check(ctx: Context) -> Iterator[Finding]:
    """Projections that engines fuse (q/k/v, gate/up, w1/w3) and that read one input have the same ``input_scale``.

    In compressed-tensors' form: ``input_global_scale``, a divisor.
    **Why.** Each projection has a quantizer of its own, and one of them saw other tokens.
    **Hurts.** TensorRT-LLM asserts; others keep the largest, which costs a little precision. Of divisors the largest is the
    smallest range: it clips.
    **Mend.** Write the largest activation amax of the group to all its members.
    """
    for leaf in ("input_scale", "input_global_scale"):
        for _, members in fused_groups(m.name for m in ctx.quantized_modules if leaf in m.parts):
            tensors = [ctx.modules[m].parts[leaf] for m in members]
            if any(t.dtype != "F32" or t.elements != 1 for t in tensors):
                ctx.tally.miss(1, "an activation scale that is no F32 scalar")
                continue
            ctx.tally.see()
            values = [float(ctx.array(t).reshape(-1)[0]) for t in tensors]
            if not np.isfinite(values).all() or min(values) <= 0:
                continue  # QC503
            odd = next((i for i in range(1, len(values)) if values[i] != values[0]), None)
            if odd is not None:
                yield ctx.finding(
                    f"{leaf} differs between projections that engines fuse",
                    where=Where(tensors[odd].name, tensors[odd].file, byte=tensors[odd].offset),
                    observed=f"{values[odd]:.6e}", expected=f"{values[0]:.6e}, as {members[0]}",
                )  # fmt: skip
