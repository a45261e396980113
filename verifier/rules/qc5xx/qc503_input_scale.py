# SPDX-License-Identifier: Apache-2.0
"""QC503: an input_scale is zero, not finite, denormal, or far from its siblings."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import collapse, expert_key

SMALLEST = 1e-30
FAR = 1e4


@rule(
    "QC503",
    "unusable input_scale",
    severity="error",
    depth="payload",
    unit="input scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#42601", "vllm-project/vllm#45320"),
    engines={
        "vllm": ("error", "loads it without a word and divides by it"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each ``input_scale`` is a finite number of at least 1e-30, and within 10,000 times the median
    of its siblings.

    **Why.** An expert that saw no token in calibration has amax 0.
    **Hurts.** Engines divide by it: 1/0 is infinity and the whole batch turns NaN; a scale far too
    small clips.
    **Mend.** Write the largest of the layer's other experts, or 1.0 for all. The distance to
    siblings is a warning.
    """
    groups: dict[str, list[tuple[Tensor, float]]] = {}
    for module, _, tensor in ctx.candidate.scale_tensors(("input_scale",)):
        values = ctx.payload.array(tensor).reshape(-1).astype(np.float64)
        ctx.tally.see(values.size)
        bad = ~np.isfinite(values) | (values < SMALLEST)
        if bad.any():
            value = float(values[bad][0])
            yield ctx.finding(
                "input_scale is not a usable number",
                where=Where(tensor.name, tensor.file, byte=tensor.offset),
                observed=value,
                expected=f"finite and >= {SMALLEST:g}",
                count=int(bad.sum()),
            )
        elif values.size:
            key = expert_key(module.name)
            group = f"{key.container}.*.{key.leaf}" if key else collapse(module.name)
            groups.setdefault(group, []).append((tensor, float(values[0])))
    for siblings in groups.values():
        middle = float(np.median([v for _, v in siblings]))
        for tensor, value in siblings:
            if not middle / FAR <= value <= middle * FAR:
                yield ctx.finding(
                    "input_scale is far from its siblings",
                    where=Where(tensor.name, tensor.file, byte=tensor.offset),
                    observed=f"{value:.3e}",
                    expected=f"near the median {middle:.3e}",
                    severity="warning",
                )
