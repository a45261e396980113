# SPDX-License-Identifier: Apache-2.0
"""QC519: weights were moved."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Severity, Where
from verifier.reconstruction.method import Survey
from verifier.rules.comparing import weight_method
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import counted

_MESSAGES = {
    "folded": "weights are scaled by row and column, as AWQ and SmoothQuant fold their scales",
    "rotated": "weights are rotated, as by QuaRot and SpinQuant",
    "moved": "weights moved throughout, as by quantization-aware training or a base of a different"
    " revision",
}
_ROUNDING = "quantized values are not the nearest ones throughout, as GPTQ and AutoRound choose"
_EVIDENCE = {
    "folded": "factors of rows and columns that a norm or a neighbouring layer undoes",
    "rotated": "one rotation of what all layers read",
    "moved": "small changes everywhere, neither a scaling nor a rotation nor a permutation",
}


@rule(
    "QC519",
    "weights were moved",
    severity="error",
    depth="payload",
    unit="sampled weights",
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("AWQ, SmoothQuant, QuaRot, SpinQuant: their own transformations, rebuilt",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """The weights are those of the base, or moved as ``--weights`` states.

    **What it does.** Looks at up to 24 quantized weights of all kinds and layers and at 16
    pass-through tensors. Where they differ from the base by more than rounding, it tests what
    explains that: factors of rows and columns that a norm or the layer before or after undoes
    (folded), one orthogonal matrix that turns what all layers read (rotated), or small changes
    everywhere (moved). It reports that once, with the evidence, and QC515, QC517 and QC605 then
    report only the tensors that this does not explain: values of a different expert, exchanged
    rows, wrong scales, factors that nothing undoes.

    Without ``--weights`` it is an error: the checkpoint was meant to have the base's weights, and
    does not. If the option states what the weights show, it is a note; if it states something else,
    an error. Values that are not the nearest ones while everything else is as in the base (GPTQ,
    AutoRound) are always a note.

    **Why it happens.** AWQ and SmoothQuant fold scales into norms and layers; QuaRot and SpinQuant
    rotate weights; training changes them. Or the base is of a different revision.

    **Impact.** None where it was meant: the model computes the same up to rounding. Otherwise the
    release is not based on what it claims to be.

    **Fix.** State the method: ``--weights folded``, ``rotated`` or ``moved``, or ``weights`` in
    ckptgate.toml. If the weights should be the base's, pass the right base or export again.
    """
    method = weight_method(ctx)
    if method is None:
        ctx.tally.miss(len(ctx.candidate.quantized_modules), "the base is a different model")
        return
    survey = method.survey
    ctx.tally.see(survey.modules + survey.tensors)
    if not survey.stated and not survey.method:
        return
    tensor = ctx.checkpoint.tensors.get(survey.first)
    where = Where(survey.first or None, tensor.file if tensor else None)
    observed = _observed(survey)
    if survey.method:
        yield ctx.finding(
            _ROUNDING if survey.is_rounding else _MESSAGES[survey.method],
            cause=survey.method,
            where=where,
            severity=_severity(survey),
            observed=observed,
            expected=_expected(survey),
        )
    elif survey.different or survey.different_tensors:
        yield ctx.finding(
            f"--weights {survey.stated} does not explain how the weights differ from the base",
            cause="not explained",
            where=where,
            observed=observed,
            expected=f"{survey.stated} weights",
        )
    else:
        yield ctx.finding(
            f"--weights {survey.stated} is stated, but the weights are as in the base",
            cause="as in the base",
            severity="info",
            observed=observed,
        )


def _severity(survey: Survey) -> Severity:
    agrees = survey.stated == survey.method or (survey.is_rounding and not survey.stated)
    return "info" if agrees else "error"


def _expected(survey: Survey) -> str:
    if survey.stated and survey.stated != survey.method:
        return f"{survey.stated} weights, as stated; or --weights {survey.method} if this is meant"
    if survey.stated or survey.is_rounding:
        return ""
    return f"weights as in the base; --weights {survey.method} if this is meant"


def _observed(survey: Survey) -> str:
    """Return the evidence in words."""
    modules = f"{survey.different} of {counted(survey.modules, 'sampled weight')}"
    text = (
        f"{modules} and {survey.different_tensors} of {survey.tensors} pass-through tensors differ"
    )
    if survey.method:
        text += f"; explained by {_EVIDENCE[survey.method]}: {survey.explained} and"
        text += f" {survey.explained_tensors} of them (relative error {survey.error:.3f})"
    elif survey.permuted:
        text += f"; a permutation of {survey.permuted} explains most of them"
    return text
