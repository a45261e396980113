# SPDX-License-Identifier: Apache-2.0
"""QC415: KV-cache field uses the wrong spelling for this config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import json_text


@rule(
    "QC415",
    "KV-cache field uses the wrong spelling for this config",
    severity="warning",
    depth="header",
    unit="declarations",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM ModelOptQuantConfigBase.from_config", "SGLang ModelOptFp4Config.from_config"),
    engines={
        "vllm": (
            "info",
            "0.32 reads kv_cache_quant_algo in the flat form, too, and gives an FP8 cache",
        ),
        "sglang": (
            "info",
            "in the flat form reads kv_cache_scheme (object or string) and kv_cache_quant_algo",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The KV cache is declared by ``kv_cache_scheme`` (flat) or ``kv_cache_quant_algo`` (nested).

    **What it does.** Compares the KV-cache field with the form of its declaration. The flat form
    (config.json) declares ``kv_cache_scheme``, the nested form ``kv_cache_quant_algo``.

    **Why it happens.** hf_quant_config.json was copied into ``quantization_config``, or vice versa.

    **Impact.** A reader that knows only the field of the form keeps the KV cache in BF16, at twice
    the memory and without the stored scales. vLLM 0.32 and SGLang read ``kv_cache_quant_algo`` in
    both forms.

    **Fix.** Flat: ``"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": false}``.
    Nested: ``"kv_cache_quant_algo": "FP8"``.
    """
    config = ctx.checkpoint.config or {}
    raws = (
        ("config.json", config.get("quantization_config")),
        ("hf_quant_config.json", ctx.checkpoint.hf_quant_config),
    )
    for file, raw in raws:
        if not isinstance(raw, Mapping):
            continue
        nested = raw.get("quantization")
        body = nested if isinstance(nested, Mapping) else raw
        scheme, algo = body.get("kv_cache_scheme"), body.get("kv_cache_quant_algo")
        if not scheme and not algo:
            continue
        ctx.tally.see()
        if isinstance(nested, Mapping):
            message = "kv_cache_scheme in the nested form, where engines read kv_cache_quant_algo"
            fits, expected = bool(algo), "kv_cache_quant_algo"
        elif not scheme:
            message = "kv_cache_quant_algo in the flat form, where kv_cache_scheme belongs"
            fits, expected = False, "kv_cache_scheme, an object"
        else:
            message = "kv_cache_scheme is a string in the flat form, where an object belongs"
            # There is no object for the other forms: ModelOpt writes their name.
            named = isinstance(scheme, str) and scheme.upper() != "FP8"
            fits, expected = named or isinstance(scheme, Mapping), "kv_cache_scheme, an object"
        if not fits:
            yield ctx.finding(
                message,
                where=Where(None, file),
                observed=json_text(algo or scheme),
                expected=expected,
            )
