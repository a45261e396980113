# SPDX-License-Identifier: Apache-2.0
"""QC311: scalar shapes are inconsistent (0-d vs [1])."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import Tensor
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule


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
    kinds: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}

    def add(kind: str, leaf: str, tensor: Tensor) -> None:
        if tensor.shape in ((), (1,)):
            kinds.setdefault((kind, leaf), ([], []))[len(tensor.shape)].append(tensor)

    for _, fmt, sibling, tensor in ctx.candidate.scales:
        if sibling.scalar:
            add(fmt.weight_dtype, tensor.name.rpartition(".")[2], tensor)
    for _, leaf, tensor in ctx.candidate.kv_scales:
        add("", leaf, tensor)
    for (_, leaf), (zero_d, one_d) in sorted(kinds.items()):
        ctx.tally.see(len(zero_d) + len(one_d))
        if not zero_d or not one_d:
            continue
        if len(one_d) <= len(zero_d):
            minority, here, elsewhere = one_d, "[1]", "0-d"
        else:
            minority, here, elsewhere = zero_d, "0-d", "[1]"
        for tensor in minority:
            yield ctx.finding(
                f"{leaf} is {here} here and {elsewhere} elsewhere",
                tensor=tensor.name,
                observed=here,
                expected=elsewhere,
            )
