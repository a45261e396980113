# SPDX-License-Identifier: Apache-2.0
"""QC311: scalars of one kind, some of them 0-d and some of shape [1]."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.checkpoint import Tensor
from verifier.findings import Finding
from verifier.rules.context import Context
from verifier.rules.registry import rule

ZERO, ONE = (), (1,)


@rule(
    "QC311",
    "scalars are 0-d and [1] by turns",
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
    """Scalars of one name (``weight_scale_2``, ``input_scale`` …) are all 0-d, as ModelOpt writes
    them, or all of shape [1].

    Either is sound alone. Formats are compared apart; any other shape is QC306.

    **Why.** Modules of two exporters were merged, or some scalars went through code that
    unsqueezes.
    **Hurts.** A loader written for one of the shapes fails on the other, half way through the load.
    **Mend.** Write the shape of the majority; the four bytes stay as they are.
    """
    kinds: dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]] = {}

    def add(kind: str, leaf: str, tensor: Tensor) -> None:
        if tensor.shape in (ZERO, ONE):
            kinds.setdefault((kind, leaf), ([], []))[len(tensor.shape)].append(tensor)

    for _, found, sibling, tensor in ctx.candidate.scales:
        if sibling.scalar:
            add(found.weight_dtype, tensor.name.rpartition(".")[2], tensor)
    for _, leaf, tensor in ctx.candidate.kv_scales:
        add("", leaf, tensor)
    for (_, leaf), (zero, one) in sorted(kinds.items()):
        ctx.tally.see(len(zero) + len(one))
        odd = one if len(one) <= len(zero) else zero
        if zero and one:
            for tensor in odd:
                yield ctx.finding(
                    f"{leaf} is {_said(tensor.shape)} here and {_said(ZERO if odd is one else ONE)} elsewhere",
                    tensor=tensor.name,
                    observed=list(tensor.shape),
                    expected=[] if odd is one else [1],
                )


def _said(shape: tuple[int, ...]) -> str:
    return "[1]" if shape else "0-d"
