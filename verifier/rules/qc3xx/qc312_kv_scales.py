# SPDX-License-Identifier: Apache-2.0
"""QC312: KV scale is missing or misplaced."""

from __future__ import annotations

import re
from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import KV_LEAVES, role

LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "kv_proj")
_SHARED = ("qkv_proj", "self_attn", "attn", "attention", "mixer", *LATENT)
KV_MODULES = {"k_scale": ("k_proj", *_SHARED), "v_scale": ("v_proj", *_SHARED)}
"""Modules that may have a KV scale: as ModelOpt and compressed-tensors write them, and as vLLM's
loader maps them."""
RECURRENT = ("A_log", "dt_bias", "conv1d", "k_conv1d")
"""Siblings of the projections in linear attention, which has no KV cache."""
_ATTENTION = re.compile(r"^(.+?\.(?:self_attn|attn|attention|mixer))(?:\.|$)")


@rule(
    "QC312",
    "KV scale is missing or misplaced",
    severity="error",
    depth="header",
    unit="KV scales",
    consumers=("vLLM", "SGLang"),
    sources=("vllm-project/vllm#34293", "vllm-project/vllm#25968", "sgl-project/sglang#25792"),
    engines={
        "vllm": (
            "error",
            "AssertionError where a layer has one of the two; warns and uses 1.0 where it has "
            "none; KeyError for one on a module that it does not map",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """If KV scales are stored, every attention layer has both, on a module that loaders know.

    **What it does.** Loaders look for ``k_proj.k_scale`` and ``v_proj.v_scale`` (ModelOpt), for
    ``output_scale`` of these (Quark), or for scales of the attention module itself. A scale has one
    value, or one for each head. A declared FP8 cache without any scale is valid:
    ModelOpt's ``kv_fp8_cast`` recipes use a constant and store none. Scales that no config declares
    are a warning.

    **Why it happens.** A layer was not calibrated, a merge took it from a different checkpoint, or
    scales were written on the wrong projection.

    **Impact.** vLLM stops at a layer with only one of the two scales. It uses 1.0 in a layer
    without both: values above 448 are clipped in that layer only.
    A scale on a module that the loader does not map raises KeyError or is lost: vLLM 0.32 reads
    none in layers of MiniMax-M3 with sparse attention, and uses 1.0 there.

    **Fix.** Calibrate the cache in all layers, or drop all KV scales and keep the declaration.
    """
    layers: dict[str, set[str]] = {}
    example = ""
    for module, leaf, tensor in ctx.candidate.kv_scales:
        ctx.tally.see()
        last = module.name.rpartition(".")[2]
        if last not in KV_MODULES[leaf]:
            yield ctx.finding(
                f"{leaf} belongs to a module that loaders do not look at",
                cause="module",
                tensor=tensor.name,
                observed=last,
                expected=f"{leaf[0]}_proj.{leaf}, or the attention module",
            )
        else:
            example = example or tensor.name
        if not _is_cache_shape(ctx, tensor.shape):
            yield ctx.finding(
                f"{leaf} is neither a scalar nor one value for each head",
                cause="shape",
                tensor=tensor.name,
                observed=list(tensor.shape),
                expected="[], [1] or [heads, 1, 1]",
            )
        layers.setdefault(_layer(module.name), set()).add(leaf)
    if not layers:
        return
    for layer in _cached_layers(ctx):
        for leaf in sorted(KV_LEAVES - layers.get(layer, set())):
            ctx.tally.see()
            inner = f"{leaf[0]}_proj." if not example or "_proj." in example else ""
            name = "output_scale" if example.endswith(".output_scale") else leaf
            yield ctx.finding(
                f"an attention layer has no {leaf}, but others have KV scales",
                cause="missing",
                where=Where(f"{layer}.{inner}{name}"),
                observed="absent",
                expected="F32 scalar",
            )
    declarations = ctx.candidate.declarations
    known = [d for d in (declarations.inline, declarations.file) if d is not None and d.known]
    if example and known and not any(d.kv for d in known):
        yield ctx.finding(
            "KV scales are stored, but no config declares a quantized cache",
            cause="undeclared",
            tensor=example,
            observed="KV scales",
            expected="kv_cache_scheme",
            severity="warning",
        )


def _is_cache_shape(ctx: Context, shape: tuple[int, ...]) -> bool:
    """Whether a scale has one value, or one for each head as compressed-tensors stores it."""
    if shape in ((), (1,)):
        return True
    heads = config_value(ctx.checkpoint.config, "num_key_value_heads", "num_attention_heads")
    return len(shape) == 3 and shape[1:] == (1, 1) and heads in (None, shape[0])


def _layer(module: str) -> str:
    match = _ATTENTION.match(module)
    return match[1] if match else module.rpartition(".")[0]


def _cached_layers(ctx: Context) -> Iterator[str]:
    """Yield the text layers with a KV cache of their own; count those where this is unknown."""
    shared = config_value(ctx.checkpoint.config, "num_kv_shared_layers")
    for name in ctx.candidate.modules:
        head, _, leaf = name.rpartition(".")
        if leaf not in ("k_proj", "qkv_proj") or role(name) != "attention":
            continue
        recurrent = any(f"{head}.{sibling}" in ctx.candidate.modules for sibling in RECURRENT)
        if recurrent or "encoder" in name.split("."):
            continue
        if ctx.expectations.is_mtp(name):
            ctx.tally.miss(1, "MTP modules: not known whether their cache is quantized")
        elif shared:
            ctx.tally.miss(1, "some layers share the cache of others (num_kv_shared_layers)")
        else:
            yield head
