# SPDX-License-Identifier: Apache-2.0
"""QC111: a calibration buffer stands among the weights."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.layouts.name_differences import leaked
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC111",
    "quantizer buffer is in the checkpoint",
    severity="error",
    depth="header",
    unit="tensors",
    consumers=("vLLM", "SGLang"),
    sources=("NVIDIA/Model-Optimizer#2038",),
    engines={
        "vllm": ("error", 'raises "no module or parameter named" (NVIDIA/Model-Optimizer#2038)'),
        "transformers": ("warning", "lists it as an unexpected key and goes on"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """No tensor is a buffer of the calibration: ``…_quantizer._amax``, ``._scale``,
    ``._double_scale`` and the like.

    **Why.** The exporter's list of what to strip is incomplete, or the state of the simulated model
    was saved.
    **Hurts.** vLLM finds no parameter of that name and stops.
    **Mend.** Drop the tensors; what an engine needs of them stands in the scales. (In a file that
    the index does not list, QC103 speaks of it.)
    """
    ckpt = ctx.checkpoint
    listed = ckpt.index.weight_map if ckpt.index else {}
    known = ctx.base.names if ctx.base else ctx.expected
    ctx.tally.see(len(ckpt.tensors))
    for name, tensor in ckpt.tensors.items():
        if leaked(name) and name not in known and (not listed or name in listed):
            yield ctx.finding(
                "a quantizer's buffer is saved with the weights",
                tensor=name,
                observed=f"{tensor.dtype} {list(tensor.shape)}",
                expected="absent",
            )
