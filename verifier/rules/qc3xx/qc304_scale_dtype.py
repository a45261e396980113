# SPDX-License-Identifier: Apache-2.0
"""QC304: weight scale has the wrong dtype."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.rules.scale_dtypes import ScaleKind, scale_kinds, wrong_dtypes


@rule(
    "QC304",
    "weight scale has the wrong dtype",
    severity="error",
    depth="header",
    unit="weight scales",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer#868",),
    engines={
        "vllm": ("error", "copies with a cast: MXFP8 scales stored as F32 become the byte 0"),
        "trtllm": ("error", "stops: it asserts F8_E4M3 block scales"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Scales have a dtype that readers of their format accept, all of a format the same one.

    **What it does.** Compares the dtype of each weight scale with those that readers of its format
    accept, and with that of most scales of the format. F8_E8M0 in place of U8 is a note for
    MXFP8, and an error for vLLM. Global, activation and KV scales are QC315.

    **Why it happens.** A framework saved the scales in its own dtype.

    **Impact.** Loaders copy with a cast: MXFP8 scales stored as F32 values all become the byte 0,
    which is 2^-127, and the model silently produces garbage. TensorRT-LLM stops.

    **Fix.** Save the bytes in the format's own dtype.
    """
    kinds = scale_kinds(ctx.candidate.module_groups, scalars=False)
    ctx.tally.see(sum(len(kind.group.modules) for kind in kinds))
    for fmt, tensor, expected in wrong_dtypes(kinds):
        yield ctx.finding(
            f"{fmt.algo}: {tensor.name.rpartition('.')[2]} is stored as {tensor.dtype}",
            cause="dtype",
            tensor=tensor.name,
            observed=tensor.dtype,
            expected=expected,
        )
    yield from _cast_by_value(ctx, kinds)


def _cast_by_value(ctx: Context, kinds: list[ScaleKind]) -> Iterator[Finding]:
    """Yield E8M0 scales of MXFP8 in a dtype of their own, which vLLM casts to bytes."""
    declaration = ctx.candidate.declaration
    if declaration is None or not declaration.modelopt:
        return
    typed = [k for k in kinds if k.format.name == "mxfp8" and k.dtype == "F8_E8M0"]
    if typed:
        tensor = typed[0].group.first.parts[typed[0].leaf]
        yield ctx.finding(
            "MXFP8: E8M0 scales are typed, not plain bytes",
            cause="typed exponents",
            tensor=tensor.name,
            observed="F8_E8M0",
            expected="U8",
            count=sum(len(k.group.modules) for k in typed),
            severity="info",
            engines={"vllm": ("error", "casts them by value into uint8: every scale becomes 0")},
        )
