# SPDX-License-Identifier: Apache-2.0
"""QC302: weight scale is missing."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.rules.kept import is_kept
from verifier.rules.registry import rule
from verifier.schemes import Module, required_siblings


@rule(
    "QC302",
    "weight scale is missing",
    severity="error",
    depth="header",
    unit="modules",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/vllm#54444", "charlie12345/ROCmFPX#85"),
    engines={
        "vllm": (
            "error",
            "stops at a missing NVFP4 scale of a linear layer; scales of experts stay unset, and "
            "FP8 keeps a default",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Each quantized weight has all weight scales of its format.

    **What it does.** Looks up the scale tensors that the format requires; NVFP4 requires
    ``weight_scale`` and ``weight_scale_2``. It also reports an FP8 weight without any scale.

    **Why it happens.** An exporter or a merge dropped scalars, or a filter on "weight" did.

    **Impact.** vLLM stops at a missing block scale of a linear layer. Without a scale of an expert
    or a ``weight_scale_2`` it silently multiplies by uninitialized memory, and FP8 without a scale
    keeps a default.

    **Fix.** Take the scale from the exporter's state; it cannot be recovered from the quantized
    values.
    """
    for group in ctx.candidate.module_groups:
        module, fmt = group.first, group.format
        if fmt is None:
            if _is_fp8_without_scale(module) and not is_kept(ctx, module):
                ctx.tally.see(len(group.modules))
                yield from _missing(ctx, group, "weight_scale", "a scale")
            continue
        ctx.tally.see(len(group.modules))
        scheme = group.declared.scheme if group.declared else None
        for sibling in required_siblings(fmt, scheme):
            leaf = sibling.leaves[0]
            if sibling.role == "input":
                continue  # QC301
            if not any(n in module.parts for n in sibling.leaves):
                dtypes = " or ".join(sibling.dtypes)
                yield from _missing(ctx, group, leaf, f"{dtypes} for {fmt.algo}")


def _is_fp8_without_scale(module: Module) -> bool:
    weight = module.weight
    is_fp8 = weight is not None and weight.dtype == "F8_E4M3"
    return is_fp8 and module.scale is None and module.dims is not None


def _missing(ctx: Context, group: ModuleGroup, leaf: str, expected: str) -> Iterator[Finding]:
    for module in group.modules:
        yield ctx.finding(
            f"quantized weight without {leaf}",
            where=Where(f"{module.name}.{leaf}"),
            observed="absent",
            expected=expected,
        )
