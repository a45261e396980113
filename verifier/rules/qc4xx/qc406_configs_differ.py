# SPDX-License-Identifier: Apache-2.0
"""QC406: the two declarations disagree."""

from __future__ import annotations

from collections.abc import Collection, Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import PACKED, Declaration


@rule(
    "QC406",
    "the two declarations disagree",
    severity="error",
    depth="header",
    unit="fields",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("https://huggingface.co/nvidia/Qwen3.6-35B-A3B-NVFP4",),
    engines={
        "vllm": ("error", "reads config.json first"),
        "sglang": ("error", "reads config.json first"),
        "trtllm": ("error", "reads hf_quant_config.json and warns that config.json differs"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``quantization_config`` and hf_quant_config.json declare the same quantization.

    **What it does.** Compares algorithm, KV cache, group size, exclusions and quantized layers of
    both files, and the ``config_groups`` of config.json with the rest of it: targets that name a
    fused projection of the engine, and activations that the algorithm does not have, are warnings.

    **Why it happens.** One of the files was rewritten and the other was not.

    **Impact.** TensorRT-LLM reads hf_quant_config.json, vLLM and SGLang config.json: the same files
    give two models.

    **Fix.** Write both from one source, from the stored tensors.
    """
    inline, file = ctx.candidate.declarations.inline, ctx.candidate.declarations.file
    yield from _groups_against_the_rest(ctx, inline)
    if inline is None or file is None or not inline.known or not file.known:
        return
    pairs: list[tuple[str, object, object]] = [
        ("quant_algo", inline.algo, file.algo),
        ("KV cache", inline.kv, file.kv),
        ("exclusions", frozenset(inline.exclude), frozenset(file.exclude)),
        ("quantized_layers", dict(inline.layers), dict(file.layers)),
    ]
    if inline.group_size is not None and file.group_size is not None:
        pairs.append(("group_size", inline.group_size, file.group_size))
    for name, in_config, in_file in pairs:
        ctx.tally.see()
        if in_config != in_file:
            yield ctx.finding(
                f"{name} of config.json and hf_quant_config.json differ:"
                f" {_difference(in_config, in_file)}",
                cause=name,
                where=Where(None, file.file),
                observed=_summary(in_file),
                expected=_summary(in_config),
            )


def _groups_against_the_rest(ctx: Context, declaration: Declaration | None) -> Iterator[Finding]:
    """Yield what ModelOpt's config groups say otherwise than its algorithm and layers; engines read
    the latter, other tools the groups.
    """
    if declaration is None or declaration.form != "flat" or not declaration.groups:
        return
    modules = ctx.candidate.modules
    where = Where(None, declaration.file)
    named = {target for group in declaration.groups for target in group.targets}
    for group in declaration.groups:
        ctx.tally.see()
        weights_alone = declaration.scheme is not None and declaration.scheme.inputs == "none"
        if weights_alone and group.scheme.inputs != "none" and not declaration.mixed:
            yield ctx.finding(
                f"config_groups: {group.name} quantizes activations, {declaration.algo} does not",
                cause=f"inputs of {group.name}",
                where=where,
                observed=group.scheme.inputs,
                expected="no input_activations",
                severity="warning",
            )
        fused = [t for t in group.targets if t not in modules and _members(t, modules, named)]
        if fused:
            yield ctx.finding(
                f"config_groups: targets of {group.name} name fused projections, not those stored",
                cause=f"targets of {group.name}",
                where=where,
                observed=fused[0],
                expected=", ".join(_members(fused[0], modules, named)),
                severity="warning",
                count=len(fused),
            )


def _members(target: str, modules: Collection[str], named: Collection[str]) -> list[str]:
    """Return the stored projections of a fused name that no group names themselves."""
    head, _, leaf = target.rpartition(".")
    members = [f"{head}.{member}" for member in PACKED.get(leaf, ())]
    return [m for m in members if m in modules and m not in named]


def _summary(value: object) -> str:
    if isinstance(value, frozenset | dict):
        return _entries(len(value))
    return "null" if value is None else str(value)


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count:,} entries"


def _difference(in_config: object, in_file: object) -> str:
    if isinstance(in_config, frozenset) and isinstance(in_file, frozenset):
        unmatched = sorted(in_config ^ in_file)
        return f"{_entries(len(unmatched))} in only one of them, {unmatched[0]!r} first"
    if isinstance(in_config, dict) and isinstance(in_file, dict):
        names = in_config.keys() | in_file.keys()
        unequal = sorted(n for n in names if in_config.get(n) != in_file.get(n))
        return f"{_entries(len(unequal))}, {unequal[0]!r} first"
    return f"{_summary(in_config)} and {_summary(in_file)}"
