# SPDX-License-Identifier: Apache-2.0
"""QC311: scalar shapes are inconsistent (0-d vs [1])."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from verifier.checkpoint import Tensor
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import Module

Kind = tuple[str, str]
"""What scalars of one shape have in common: the dtype of the weight, and the leaf."""
SCALARS = ((), (1,))


@rule(
    "QC311",
    "scalar shapes are inconsistent (0-d vs [1])",
    severity="warning",
    depth="header",
    unit="scalars",
    consumers=("vLLM", "transformers"),
    sources=("vllm-project/vllm#37462", "NVIDIA/Model-Optimizer#1833"),
    engines={
        "vllm": (
            "warning",
            "code that reads shape[0] == 1 breaks on 0-d (vllm-project/vllm#37462)",
        ),
        "transformers": (
            "warning",
            "Chunk.convert raises IndexError on 0-d scalars (NVIDIA/Model-Optimizer#1833)",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Scalars of one name (such as ``weight_scale_2``) are all 0-d, or all of shape [1].

    **What it does.** Compares the shapes of global, activation and KV scales, per name and format.
    ModelOpt writes 0-d scalars; either shape is valid by itself. Any other shape is QC306.

    **Why it happens.** Modules of two exporters were merged, or some scalars went through code that
    unsqueezes.

    **Impact.** A loader written for one of the shapes fails on the other, halfway through loading.

    **Fix.** Write the shape of the majority; the four bytes do not change.
    """
    counts: dict[Kind, list[int]] = {}
    for group in ctx.candidate.module_groups:
        for kind, tensor in _scalars(ctx, group.first):
            counts.setdefault(kind, [0, 0])[len(tensor.shape)] += len(group.modules)
    for kind, tensor in _cache_scalars(ctx):
        counts.setdefault(kind, [0, 0])[len(tensor.shape)] += 1
    for kind, (zero_d, one_d) in sorted(counts.items()):
        ctx.tally.see(zero_d + one_d)
        if not zero_d or not one_d:
            continue
        rank, here, elsewhere = (1, "[1]", "0-d") if one_d <= zero_d else (0, "0-d", "[1]")
        stored = (_scalars(ctx, module) for module in ctx.candidate.quantized_modules)
        for other, tensor in chain(_cache_scalars(ctx), *stored):
            if other == kind and len(tensor.shape) == rank:
                yield ctx.finding(
                    f"{kind[1]} is {here} here and {elsewhere} elsewhere",
                    tensor=tensor.name,
                    observed=here,
                    expected=elsewhere,
                )


def _scalars(ctx: Context, module: Module) -> Iterator[tuple[Kind, Tensor]]:
    """Yield the scalars next to a weight, each with its kind."""
    fmt = ctx.candidate.format_of(module)
    for leaf, sibling in ctx.candidate.siblings(module):
        tensor = module.parts[leaf]
        if fmt is not None and sibling.scalar and tensor.shape in SCALARS:
            yield (fmt.weight_dtype, leaf), tensor


def _cache_scalars(ctx: Context) -> Iterator[tuple[Kind, Tensor]]:
    """Yield the scalars of the KV cache, each with its kind."""
    for _, leaf, tensor in ctx.candidate.kv_scales:
        if tensor.shape in SCALARS:
            yield ("", leaf), tensor
