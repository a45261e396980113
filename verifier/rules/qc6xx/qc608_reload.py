# SPDX-License-Identifier: Apache-2.0
"""QC608: transformers cannot load the checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

if TYPE_CHECKING:
    from verifier.rules.loading import Forward, Kind, Misfit

FAR, LOST = 0.35, 1.0
"""Relative distance to the base's logits above which it is a warning, and an error."""
_MESSAGES: Mapping[Kind, tuple[str, str]] = {
    "missing": ("transformers finds no tensor for a parameter", "a tensor"),
    "unexpected": ("transformers finds no parameter for a tensor", "a name of the family's layout"),
    "mismatched": ("the tensor has a different shape than transformers' parameter", ""),
    "unconverted": (
        "transformers cannot combine the parts of a parameter",
        "parts that can be stacked and concatenated",
    ),
}


@rule(
    "QC608",
    "transformers cannot load the checkpoint",
    severity="error",
    depth="load",
    unit="parameters and forward passes",
    consumers=("transformers",),
    sources=("transformers core_model_loading", "NVIDIA/Model-Optimizer#1833"),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The dequantized checkpoint loads with transformers' own loader, and its logits are sane.

    **What it does.** The verifier dequantizes the checkpoint and passes it to transformers' loader.
    Names and shapes are checked on the meta device, which takes seconds at any size. If the model
    fits into memory, its values are loaded as well, followed by a forward pass on a fixed prompt:
    the logits must be finite and, with ``--base``, close to the base's. Their relative distance is
    a warning above 0.35 and an error above 1, where zero logits would be closer; `docs/reload.md`
    lists what valid exports measure. This does not replace ``ckptgate gate``.

    Names that the model class drops on purpose, MTP layers and names left over in the base's own
    load are not reported (QC606). A family that transformers does not know is not checked; code
    that comes with a checkpoint is never run.

    **Why it happens.** In-memory names, a missing or misplaced tensor, or values that overflow only
    in a forward pass.

    **Impact.** transformers initializes missing parameters randomly and continues with a warning.

    **Fix.** See the findings of QC2xx, QC3xx and QC5xx for the same tensors first, which are more
    specific. This rule is a second opinion if they do not know the layout.
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
    yield from _check_logits(ctx, loaded.forward)


def _known(ctx: Context, misfit: Misfit) -> bool:
    """Whether releases have such a tensor although transformers has no parameter for it."""
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
        cause=misfit.kind,
        where=Where(misfit.name, tensor.file if tensor else None),
        observed=misfit.have or ("absent" if misfit.kind == "missing" else "left over"),
        expected=misfit.want or expected,
    )


def _check_logits(ctx: Context, forward: Forward) -> Iterator[Finding]:
    if forward.broken:
        yield ctx.finding(
            "the logits of the fixed prompt are not finite",
            cause="not finite",
            observed=f"at {forward.broken} of {forward.positions} positions",
            expected="finite logits",
        )
    elif forward.distance is not None and not forward.distance <= FAR:
        far = not forward.distance <= LOST
        yield ctx.finding(
            "the logits of the fixed prompt are far from the base's",
            cause="far",
            observed=f"relative distance {forward.distance:.3f},"
            f" top-1 agreement at {forward.agree} of {forward.positions} positions",
            expected=f"at most {LOST if far else FAR}",
            severity="error" if far else "warning",
        )
    if ctx.base is not None and forward.distance is None and not forward.broken:
        ctx.tally.miss(1, forward.why_not or ctx.expectations.unrelated_base)
