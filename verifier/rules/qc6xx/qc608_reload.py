# SPDX-License-Identifier: Apache-2.0
"""QC608: transformers does not load it, or what it computes is no model's output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.loading import Forward, Kind, Misfit
from verifier.rules.registry import rule

FAR, LOST = 0.35, 1.0
"""Relative distance to the base's logits from which it is a warning, and an error."""
_MESSAGES: Mapping[Kind, tuple[str, str]] = {
    "missing": ("transformers finds no tensor for a parameter", "a tensor"),
    "unexpected": ("transformers finds no parameter for a tensor", "a name of the family's layout"),
    "mismatched": ("transformers finds another shape than the parameter's", ""),
    "unconverted": (
        "transformers cannot put the parts of a parameter together",
        "parts that stack and concatenate",
    ),
}


@rule(
    "QC608",
    "transformers cannot load it",
    severity="error",
    depth="load",
    unit="parameters and forward passes",
    consumers=("transformers",),
    sources=("transformers core_model_loading", "NVIDIA/Model-Optimizer#1833"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Decoded by the verifier, the checkpoint is loaded by transformers' own loader: nothing
    missing, unexpected, misshapen.

    Names and shapes go through the loader on the meta device, which takes seconds at any size.
    Where the model fits into memory its values follow, and a forward pass on a fixed prompt: the
    logits are finite and, with ``--base``, not far from the base's. Their distance, relative to the
    base's logits, is a warning above 0.35 and an error above 1, where no logits at all would be
    nearer; `docs/reload.md` says what sound exports measure. It is no substitute for `ckptgate
    gate`.

    **Why.** Names of memory, a lost or misplaced tensor, values that overflow only in a forward
    pass.
    **Hurts.** transformers initialises what it misses with noise, and goes on with a warning.
    **Mend.** What QC2xx, QC3xx and QC5xx say of the same tensors says more; this rule repeats in
    the loader's words what they find, and is a second opinion where they know no layout.

    Names that the model's class drops on purpose, MTP layers and what the base's own load leaves
    over are no finding (QC606). A family that transformers does not know is not judged; code that a
    checkpoint brings along is never run.
    """
    loaded = ctx.loaded
    if loaded.reason:
        ctx.tally.miss(max(1, len(ctx.candidate.names)), loaded.reason)
        return
    ctx.tally.see(loaded.keys)
    for misfit in loaded.misfits:
        if not _known(ctx, misfit):
            yield _finding(ctx, misfit)
    if loaded.forward is None:
        ctx.tally.miss(1, loaded.why_no_values)
        return
    ctx.tally.see()
    yield from _judge(ctx, loaded.forward)


def _known(ctx: Context, misfit: Misfit) -> bool:
    """Whether a surplus name is one that releases carry beside what transformers builds."""
    if misfit.kind != "unexpected":
        return False
    optional = ctx.expectations.family is not None and ctx.expectations.family.optional(misfit.name)
    return (
        optional or ctx.expectations.is_mtp(misfit.name) or misfit.name in ctx.candidate.tied_heads
    )


def _finding(ctx: Context, misfit: Misfit) -> Finding:
    message, expected = _MESSAGES[misfit.kind]
    tensor = ctx.checkpoint.tensors.get(misfit.name)
    return ctx.finding(
        message,
        where=Where(misfit.name, tensor.file if tensor else None),
        observed=misfit.have or ("absent" if misfit.kind == "missing" else "left over"),
        expected=misfit.want or expected,
    )


def _judge(ctx: Context, forward: Forward) -> Iterator[Finding]:
    if forward.broken:
        yield ctx.finding(
            "the logits of the fixed prompt are not finite",
            observed=f"at {forward.broken} of {forward.positions} positions",
            expected="finite logits",
        )
    elif forward.distance is not None and not forward.distance <= FAR:
        far = not forward.distance <= LOST
        yield ctx.finding(
            "the logits of the fixed prompt are far from the base's",
            observed=f"relative distance {forward.distance:.3f}, same token at {forward.agree} of {forward.positions}",
            expected=f"at most {LOST if far else FAR}",
            severity="error" if far else "warning",
        )
    if ctx.base is not None and forward.distance is None and not forward.broken:
        ctx.tally.miss(1, forward.why_not or ctx.expectations.unrelated_base)
