# SPDX-License-Identifier: Apache-2.0
"""QC502: NaN, infinite or negative weight scale."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.checkpoint import Tensor
from verifier.findings import Finding, Where
from verifier.payload.scan import Hits
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC502",
    "NaN, infinite or negative weight scale",
    severity="error",
    depth="payload",
    unit="weight scales",
    split=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("vllm-project/compressed-tensors#595", "NVIDIA/Model-Optimizer#1633"),
    engines={
        "vllm": ("error", "loads it silently in experts"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Weight scales are finite and not negative.

    **What it does.** Scans all weight scales: E4M3 bytes must be below 0x7F, E8M0 bytes below 0xFF,
    float32 values finite and not negative.

    **Why it happens.** An all-zero expert (0/0), or an uncalibrated or infinite amax.

    **Impact.** NaN spreads to the whole output for the prompts that reach the block; vLLM loads it
    silently.

    **Fix.** Define the scale of an all-zero block (1.0) and quantize again.
    """
    for _, _, tensor in ctx.candidate.scale_tensors(("weight_scale", "weight_scale_inv")):
        ctx.tally.see(tensor.elements)
        if tensor.dtype == "F32":
            yield from _invalid_floats(ctx, tensor)
            continue
        limit = 0x7F if tensor.dtype == "F8_E4M3" else 0xFF
        if ctx.payload.extremes(tensor)[1] >= limit:
            groups = {"NaN": Hits(), "negative": Hits()}
            for start, flat in ctx.payload.pieces(tensor):
                groups["NaN"].add(start, np.flatnonzero((flat & limit) == limit), flat)
                if limit == 0x7F:  # 0x80 is negative zero: QC501
                    groups["negative"].add(
                        start, np.flatnonzero((flat > 0x80) & (flat < 0xFF)), flat
                    )
            for problem, hits in groups.items():
                if hits.count:
                    yield ctx.finding(
                        f"{problem} block scales",
                        where=ctx.at_byte(tensor, hits.first),
                        observed=f"0x{hits.value:02X}",
                        expected="0x01..0x7E" if limit == 0x7F else "0x00..0xFE",
                        count=hits.count,
                    )
    for _, _, tensor in ctx.candidate.scale_tensors(("weight_scale_2",)):
        ctx.tally.see(tensor.elements)
        yield from _invalid_floats(ctx, tensor)


def _invalid_floats(ctx: Context, tensor: Tensor) -> Iterator[Finding]:
    values = ctx.payload.array(tensor).reshape(-1)
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if bad.size:
        leaf = tensor.name.rpartition(".")[2]
        yield ctx.finding(
            f"{leaf} is not a finite positive number",
            where=Where(tensor.name, tensor.file, byte=tensor.offset + 4 * int(bad[0])),
            observed=float(values[bad[0]]),
            expected="finite and > 0",
            count=int(bad.size),
        )
