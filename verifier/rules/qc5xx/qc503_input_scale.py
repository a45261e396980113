# SPDX-License-Identifier: Apache-2.0
"""QC503: input_scale is zero, not finite or implausible."""

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
    "input_scale is zero, not finite or implausible",
    severity="error",
    depth="payload",
    unit="input scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vllm-project/vllm#42601", "vllm-project/vllm#45320"),
    engines={
        "vllm": ("error", "loads it silently and divides by it"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each ``input_scale`` is finite, at least 1e-30, and within 10,000 times its siblings' median.

    **What it does.** Reads every scale of activations: ``input_scale``, ``input_scale_2`` (Quark)
    and ``input_global_scale`` (compressed-tensors), a divisor, which is at most 1e30. A large
    distance to the median of its siblings (the same projection in other layers or experts) is a
    warning.

    **Why it happens.** An expert that received no token during calibration has amax 0.

    **Impact.** Engines divide by it: 1/0 is infinity and the whole batch becomes NaN. A scale that
    is far too small clips.

    **Fix.** Write the largest input_scale of the layer's other experts, or 1.0 for all.
    """
    groups: dict[tuple[str, str], list[tuple[Tensor, float]]] = {}
    for module, _, sibling, tensor in ctx.candidate.scales_of("input"):
        values = ctx.payload.array(tensor).reshape(-1).astype(np.float64)
        ctx.tally.see(values.size)
        leaf = tensor.name.rpartition(".")[2]
        bad = ~np.isfinite(values) | (values < SMALLEST)
        if sibling.divisor:
            bad |= values > 1 / SMALLEST
        if bad.any():
            value = float(values[bad][0])
            bound = f" and <= {1 / SMALLEST:g}" if sibling.divisor else ""
            yield ctx.finding(
                f"{leaf} is zero, too {'large' if sibling.divisor else 'small'} or not finite",
                cause="unusable",
                where=Where(tensor.name, tensor.file, byte=tensor.offset),
                observed=value,
                expected=f"finite and >= {SMALLEST:g}{bound}",
                count=int(bad.sum()),
            )
        elif values.size:
            key = expert_key(module.name)
            group = f"{key.container}.*.{key.leaf}" if key else collapse(module.name)
            groups.setdefault((leaf, group), []).append((tensor, float(values[0])))
    for (leaf, _), siblings in groups.items():
        median = float(np.median([v for _, v in siblings]))
        for tensor, value in siblings:
            if not median / FAR <= value <= median * FAR:
                yield ctx.finding(
                    f"{leaf} is far from the median of its siblings",
                    cause="far from the median",
                    where=Where(tensor.name, tensor.file, byte=tensor.offset),
                    observed=f"{value:.3e}",
                    expected=f"about {median:.3e}",
                    severity="warning",
                )
