# SPDX-License-Identifier: Apache-2.0
"""QC507: two experts have the same bytes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from verifier.findings import Finding, Where
from verifier.rules.comparing import reconstruction
from verifier.rules.context import Context
from verifier.rules.experts import duplicated, expert_weights
from verifier.rules.registry import rule


@rule(
    "QC507",
    "two experts have the same bytes",
    severity="warning",
    depth="payload",
    unit="expert weights",
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("ByteDance-Seed/VeOmni#799", "NVIDIA/Model-Optimizer#1631"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """No two routed-expert weights have the same quantized values and the same scales.

    **What it does.** Compares the experts' weights within and across layers. Without a base, equal
    experts are a warning (a freshly upcycled model has them), and weights that are all zero or have
    a single magnitude are not reported. With a base in which the two experts differ, equal ones are
    an error.

    **Why it happens.** A wrong index during unstacking, or an expert that was never filled in.

    **Impact.** The router sends tokens to a copy of a different expert: quality drops and nothing
    fails.

    **Fix.** Unstack the experts again.
    """
    ctx.tally.see(len(expert_weights(ctx)))
    modules = ctx.candidate.modules
    for name, (first, trivial) in duplicated(ctx).items():
        weight, same = modules[name].weight, _same_in_base(ctx, name, first)
        if weight is None or same:
            continue
        if trivial:  # the zeros of a lost expert are QC501's and QC502's
            causes = {reconstruction(ctx, modules[m]).cause for m in (name, first)}
            if "duplicate" not in causes:
                continue
        yield ctx.finding(
            "the same bytes as a different expert",
            where=Where(weight.name, weight.file),
            observed=f"equal to {first}",
            expected="different values",
            severity="error" if same is False else None,
        )


def _same_in_base(ctx: Context, name: str, other: str) -> bool | None:
    """Return whether the base's two weights are equal, None if it does not have both."""
    base = ctx.base
    if base is None or ctx.expectations.unrelated_base:
        return None
    modules = base.modules.get(name), base.modules.get(other)
    a, b = (m.weight if m else None for m in modules)
    if a is None or b is None:
        return None
    read = base.checkpoint.read
    return a.shape == b.shape and np.array_equal(read(a), read(b))
