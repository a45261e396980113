# SPDX-License-Identifier: Apache-2.0
"""QC406: config.json and hf_quant_config.json disagree."""

from __future__ import annotations

from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC406",
    "the two declarations disagree",
    severity="error",
    depth="header",
    unit="fields",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("https://huggingface.co/nvidia/Qwen3.6-35B-A3B-NVFP4",),
    engines={
        "vllm": ("error", "reads config.json first"),
        "sglang": ("error", "reads config.json first"),
        "trtllm": ("error", "reads hf_quant_config.json, and warns that config.json differs"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """``quantization_config`` and hf_quant_config.json state the same algorithm, KV cache, group
    size, lists and layers.

    **Why.** One was written again and the other was not.
    **Hurts.** TensorRT-LLM reads hf_quant_config.json, vLLM and SGLang config.json: the same files,
    two models.
    **Mend.** Write both from one source, from the tensors on disk.
    """
    inline, file = ctx.candidate.declarations.inline, ctx.candidate.declarations.file
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
    for name, ours, theirs in pairs:
        ctx.tally.see()
        if ours != theirs:
            yield ctx.finding(
                f"{name} differs between config.json and hf_quant_config.json: {_difference(ours, theirs)}",
                where=Where(None, file.file),
                observed=_short(theirs),
                expected=_short(ours),
            )


def _short(value: object) -> str:
    return f"{len(value)} entries" if isinstance(value, frozenset | dict) else str(value)


def _difference(ours: object, theirs: object) -> str:
    if isinstance(ours, frozenset) and isinstance(theirs, frozenset):
        odd = sorted(ours ^ theirs)
        return f"{len(odd)} entries stand in one only, {odd[0]!r} first"
    if isinstance(ours, dict) and isinstance(theirs, dict):
        odd = sorted(k for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k))
        return f"{len(odd)} modules, {odd[0]!r} first"
    return f"{ours} and {theirs}"
