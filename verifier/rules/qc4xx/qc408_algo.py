# SPDX-License-Identifier: Apache-2.0
"""QC408: quant_algo does not match the tensors."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import (
    FLOATS,
    Declaration,
    Engine,
    Format,
    Module,
    Scheme,
    refusal,
    same_layout,
)
from verifier.text import counted

_SERVING: tuple[Engine, ...] = ("vllm", "sglang", "trtllm")
_INTEGER_METHODS = frozenset(
    {"awq", "gptq", "bitsandbytes", "aqlm", "eetq", "hqq", "vptq", "spqr", "higgs"}
)


@rule(
    "QC408",
    "quant_algo does not match the tensors",
    severity="error",
    depth="header",
    unit="modules",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("NVIDIA/Model-Optimizer changelog (nvfp4_mlp_only)",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """``quant_algo`` is an algorithm that engines know, and the one that the stored tensors use.

    **What it does.** Compares the declared algorithm with the format that dtypes and shapes show,
    the number of bits included, and with the algorithms that each engine reads: what vLLM does not
    read is a note, and an error for an engine that is asked about. A ``pre_quant_scale`` belongs to
    algorithms that scale the inputs. A config that contradicts itself is reported, too.
    NVFP4 declared for unpacked weights is QC305; a mismatch with MIXED_PRECISION is QC410.

    **Why it happens.** A selector missed the modules and the tag is null, or the config was kept
    from a different export.

    **Impact.** Engines refuse the checkpoint, or read the weights in the wrong format.

    **Fix.** Declare the format of the stored tensors.
    """
    declaration = ctx.candidate.declaration
    quantized = ctx.candidate.quantized_modules
    yield from _integer_method_over_fp8(ctx)
    if declaration is None or not quantized:
        return
    where = Where(None, declaration.file)
    if declaration.modelopt and declaration.algo is None:
        ctx.tally.see()
        yield ctx.finding(
            "quant_algo is null, but the checkpoint is quantized",
            cause="null",
            where=where,
            observed=f"null, with {counted(len(quantized), 'quantized module')}",
        )
        return
    if declaration.modelopt and declaration.unclear:
        ctx.tally.see()
        yield ctx.finding(
            f"engines do not know the quant_algo {declaration.algo!r}",
            cause=f"unknown {declaration.algo}",
            where=where,
            observed=declaration.algo,
        )
        return
    yield from _refused(ctx, declaration)
    yield from _scaled_inputs(ctx, declaration)
    for conflict in declaration.conflicts:
        ctx.tally.see()
        yield ctx.finding(
            f"the config contradicts itself: {conflict}",
            cause=f"conflict {conflict.partition(' ')[0]}",
            where=where,
        )
    for module in quantized:
        entry, inferred = declaration.declared_for(module.name), module.inferred_format
        algo, declared = entry.algo, entry.format
        if declared is None and inferred is not None and entry.scheme is not None:
            yield from _other_codes(ctx, entry.scheme, inferred, module)
        if declared is None or module.weight is None:
            continue
        if _is_fp8_under_integers(declaration, module):
            continue  # one finding for all
        ctx.tally.see()
        if inferred is None:
            # QC305 reports packed formats, QC313 plain weights next to scales.
            allowed = (*FLOATS, *declared.weight.dtypes)
            if module.weight.dtype not in allowed and not declared.packed:
                yield ctx.finding(
                    f"{algo} is declared, but the weight is {module.weight.dtype}",
                    cause="weight dtype",
                    tensor=module.weight.name,
                    observed=module.weight.dtype,
                    expected=declared.weight_dtype,
                )
            continue
        if declaration.mixed:
            continue  # QC410
        unpacked = declared.packed and module.weight.dtype not in declared.weight.dtypes  # QC305
        if not same_layout(declared, inferred) and not unpacked:
            yield ctx.finding(
                f"{algo} is declared, but the tensors are {inferred.algo}",
                cause="format",
                tensor=module.weight.name,
                observed=inferred.algo,
                expected=algo,
            )
        elif declared.name == inferred.name and declared.bits != inferred.bits:
            yield ctx.finding(
                f"{declared.bits} bits are declared, but the tensors hold {inferred.bits}",
                cause="bits",
                tensor=module.weight.name,
                observed=inferred.bits,
                expected=declared.bits,
            )


def _refused(ctx: Context, declaration: Declaration) -> Iterator[Finding]:
    """Yield what vLLM does not read of the declaration, with what the other engines make of it."""
    algos = [declaration.algo] if declaration.form in ("flat", "nested") else []
    for scheme in declaration.schemes():
        if declaration.mixed or (algos and scheme.algo not in algos):
            continue  # a config group of ModelOpt's, which engines do not read
        refusals = {engine: refusal(engine, declaration, scheme) for engine in _SERVING}
        if not refusals["vllm"]:
            continue
        ctx.tally.see()
        yield ctx.finding(
            f"vLLM does not read {scheme.algo}",
            cause=f"unread {scheme.algo}",
            where=Where(None, declaration.file),
            observed=scheme.algo,
            severity="info",
            engines={e: ("error", why) for e, why in refusals.items() if why},
        )


def _scaled_inputs(ctx: Context, declaration: Declaration) -> Iterator[Finding]:
    """Yield a ``pre_quant_scale`` in an algorithm that has none."""
    tensors = [
        module.parts["pre_quant_scale"]
        for module in ctx.candidate.quantized_modules
        if "pre_quant_scale" in module.parts
        and (fmt := declaration.declared_for(module.name).format) is not None
        and fmt.sibling("pre_quant_scale") is None
    ]
    if tensors:
        yield ctx.finding(
            "pre_quant_scale is stored, but the declared algorithm has none",
            cause="pre_quant_scale",
            tensor=tensors[0].name,
            observed=declaration.algo or "no pre_quant_scale",
            expected="NVFP4_AWQ, or another algorithm that scales inputs",
            count=len(tensors),
            severity="warning",
            engines={"vllm": ("error", "drops the scale, or stops at a tensor it does not know")},
        )


def _other_codes(
    ctx: Context, scheme: Scheme, inferred: Format, module: Module
) -> Iterator[Finding]:
    """Yield a module whose codes are not of the width or the kind that the config states.

    The config declares a format that is not known: what it states of the codes has to fit.
    """
    kind = "int" if inferred.weight.codes == "int" else "float"
    if not scheme.bits or inferred.weight.codes == "opaque" or module.weight is None:
        return
    ctx.tally.see()
    if (scheme.bits, scheme.kind) != (inferred.bits, kind):
        yield ctx.finding(
            f"{scheme.algo} is declared, but the tensors are {inferred.algo}",
            cause="codes",
            tensor=module.weight.name,
            observed=f"{kind} of {inferred.bits} bits",
            expected=f"{scheme.kind} of {scheme.bits} bits",
        )


def _is_fp8_under_integers(declaration: Declaration, module: Module) -> bool:
    """Whether a method of integer formats is declared for a weight that is FP8."""
    is_fp8 = module.weight is not None and module.weight.dtype == "F8_E4M3"
    return is_fp8 and declaration.method in _INTEGER_METHODS and module.inferred_format is not None


def _integer_method_over_fp8(ctx: Context) -> Iterator[Finding]:
    """Yield a finding if a method of integer formats is declared, but the tensors are FP8."""
    declaration = ctx.candidate.declarations.effective
    if declaration is None or declaration.method not in _INTEGER_METHODS:
        return
    algos = [
        m.inferred_format.algo
        for m in ctx.candidate.quantized_modules
        if m.inferred_format and _is_fp8_under_integers(declaration, m)
    ]
    ctx.tally.see(len(algos))
    if algos:
        yield ctx.finding(
            f"quant_method {declaration.method!r} is declared, but the tensors are {algos[0]}",
            cause=f"method {declaration.method}",
            where=Where(None, declaration.file),
            observed=declaration.method,
            expected=algos[0],
            count=len(algos),
        )
