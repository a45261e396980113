# SPDX-License-Identifier: Apache-2.0
"""QC312: scales of the KV cache are missing or misplaced."""

from __future__ import annotations

import re
from collections.abc import Iterator

from verifier.findings import Finding, Where
from verifier.quantized import config_value
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.schemes import KV_LEAVES, role

LATENT = ("kv_a_proj_with_mqa", "kv_a_proj", "kv_b_proj", "kv_proj")
PLACES = {
    "k_scale": frozenset(
        {"k_proj", "qkv_proj", "self_attn", "attn", "attention", "mixer", *LATENT}
    ),
    "v_scale": frozenset(
        {"v_proj", "qkv_proj", "self_attn", "attn", "attention", "mixer", *LATENT}
    ),
}
"""Modules that a KV scale may stand on: ModelOpt's, compressed-tensors', and what vLLM's loader
maps besides."""
RECURRENT = ("A_log", "dt_bias", "conv1d", "k_conv1d")
"""What stands beside the projections of a linear attention, which has no cache of keys."""
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
            "takes 1.0 for a missing scale with a warning; KeyError for one at a place it does not map",
        )
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """Where KV scales are stored, each attention layer has ``k_scale`` and ``v_scale``, at a place
    that loaders know.

    The places are ``k_proj.k_scale`` and ``v_proj.v_scale`` (ModelOpt), or the attention module
    itself. A declaration of an FP8 cache without any scale is sound: ModelOpt's ``kv_fp8_cast``
    recipes use a constant and store none. Scales that no config declares are a warning.

    **Why.** A layer was not calibrated, a merge took it from elsewhere, or scales were written on
    the wrong projection.
    **Hurts.** vLLM takes 1.0 for a missing scale: values above 448 are clipped in that layer alone.
    A scale on a place that the loader does not map is a KeyError, or is lost.
    **Mend.** Calibrate the cache in all layers, or drop all KV scales and keep the declaration.
    """
    layers: dict[str, set[str]] = {}
    example = ""
    for module, leaf, tensor in ctx.candidate.kv_scales:
        ctx.tally.see()
        last = module.name.rpartition(".")[2]
        if last not in PLACES[leaf]:
            yield ctx.finding(
                f"{leaf} stands on a module that loaders do not look at",
                tensor=tensor.name,
                observed=last,
                expected=f"{leaf[0]}_proj.{leaf}, or the attention module",
            )
        else:
            example = example or tensor.name
        layers.setdefault(_layer(module.name), set()).add(leaf)
    if not layers:
        return
    for layer in _attention(ctx):
        for leaf in sorted(KV_LEAVES - layers.get(layer, set())):
            ctx.tally.see()
            inner = f"{leaf[0]}_proj." if not example or "_proj." in example else ""
            yield ctx.finding(
                f"an attention layer has no {leaf}, and others have KV scales",
                where=Where(f"{layer}.{inner}{leaf}"),
                observed="absent",
                expected="F32 scalar",
            )
    known = [
        d
        for d in (ctx.candidate.declarations.inline, ctx.candidate.declarations.file)
        if d is not None and d.known
    ]
    if example and known and not any(d.kv for d in known):
        yield ctx.finding(
            "KV scales are stored and no config declares a quantized cache",
            tensor=example,
            observed="KV scales",
            expected="kv_cache_scheme",
            severity="warning",
        )


def _layer(module: str) -> str:
    found = _ATTENTION.match(module)
    return found[1] if found else module.rpartition(".")[0]


def _attention(ctx: Context) -> Iterator[str]:
    """Yield the text layers that cache keys and values of their own; where that is not known, count
    them as not judged.
    """
    shared = config_value(ctx.checkpoint.config, "num_kv_shared_layers")
    for name in ctx.candidate.modules:
        head, _, leaf = name.rpartition(".")
        if leaf not in ("k_proj", "qkv_proj") or role(name) != "attention":
            continue
        if any(
            f"{head}.{sign}" in ctx.candidate.modules for sign in RECURRENT
        ) or "encoder" in name.split("."):
            continue
        if ctx.expectations.is_mtp(name):
            ctx.tally.miss(1, "whether an MTP module has a quantized cache is not known")
        elif shared:
            ctx.tally.miss(1, "some layers share the cache of others (num_kv_shared_layers)")
        else:
            yield head
