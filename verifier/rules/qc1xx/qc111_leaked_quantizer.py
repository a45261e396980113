# SPDX-License-Identifier: Apache-2.0
"""QC111: quantizer buffer is in the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding
from verifier.layouts.name_differences import all_leaked
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC111",
    "quantizer buffer is in the checkpoint",
    severity="error",
    depth="header",
    unit="tensors",
    repairable=True,
    consumers=("vLLM", "SGLang"),
    sources=("NVIDIA/Model-Optimizer#2038",),
    engines={
        "vllm": ("error", 'raises "no module or parameter named" (NVIDIA/Model-Optimizer#2038)'),
        "transformers": ("warning", "lists it as an unexpected key and continues"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """No tensor is a calibration buffer: ``…_quantizer._amax``, ``._scale``, ``._double_scale``.

    **What it does.** Looks for the buffer names of quantizer modules among the tensors of the
    index. A tensor that the index does not list is reported by QC103.

    **Why it happens.** The exporter's list of buffers to strip is incomplete, or the state of the
    simulated model was saved.

    **Impact.** vLLM finds no parameter of that name and stops.

    **Fix.** Drop the tensors; everything an engine needs from them is in the scales.
    """
    ckpt = ctx.checkpoint
    listed = ckpt.index.weight_map if ckpt.index else {}
    known = ctx.base.names if ctx.base else ctx.expectations.shapes
    ctx.tally.see(len(ckpt.tensors))
    for name in all_leaked(ckpt.tensors):
        tensor = ckpt.tensors[name]
        if name not in known and (not listed or name in listed):
            yield ctx.finding(
                "a calibration buffer is saved with the weights",
                tensor=name,
                observed=f"{tensor.dtype} {list(tensor.shape)}",
                expected="absent",
            )
