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
    """No two weights of routed experts have the same codes and the same scales, in one layer or
    across layers.

    **Why.** A wrong index in un-stacking, or an expert that was never filled in.
    **Hurts.** The router sends tokens to an expert that is another one; quality falls and nothing
    fails.
    **Mend.** Un-stack again. Without a base it is a warning (a model that was just upcycled has
    equal experts); with one in which the two differ, an error. Without one, weights that are all
    zero, or one number up to its sign, say nothing.
    """
    ctx.tally.see(len(expert_weights(ctx)))
    for name, (first, poor) in duplicated(ctx).items():
        weight, same = ctx.candidate.modules[name].weight, _same_in_base(ctx, name, first)
        if weight is None or same:
            continue
        if poor and "duplicate" not in {
            reconstruction(ctx, ctx.candidate.modules[m]).cause for m in (name, first)
        }:
            continue  # zeros of an expert that was lost are QC501's and QC502's
        yield ctx.finding(
            "the same bytes as another expert's",
            where=Where(weight.name, weight.file),
            observed=f"equal to {first}",
            expected="bytes of its own",
            severity="error" if same is False else None,
        )


def _same_in_base(ctx: Context, one: str, other: str) -> bool | None:
    """Return whether the base's two weights are equal; None where it has not both."""
    base = ctx.base
    if base is None or ctx.expectations.unrelated_base:
        return None
    ours, theirs = (m.weight if (m := base.modules.get(n)) else None for n in (one, other))
    if ours is None or theirs is None:
        return None
    return ours.shape == theirs.shape and np.array_equal(
        base.checkpoint.read(ours), base.checkpoint.read(theirs)
    )
