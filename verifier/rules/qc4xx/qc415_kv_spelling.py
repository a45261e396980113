# SPDX-License-Identifier: Apache-2.0
"""QC415: the KV cache's format is spelled as another form of the declaration spells it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule


@rule(
    "QC415",
    "KV cache field of another form",
    severity="warning",
    depth="header",
    unit="declarations",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM ModelOptQuantConfigBase.from_config", "SGLang ModelOptFp4Config.from_config"),
    engines={
        "vllm": (
            "warning",
            "reads only kv_cache_scheme {type: float, num_bits: 8} in the flat form: KV stays BF16",
        ),
        "sglang": (
            "info",
            "reads kv_cache_scheme, as an object or a string, and kv_cache_quant_algo in the flat form",
        ),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The flat form (config.json) declares the KV cache as ``kv_cache_scheme``, the nested form as
    ``kv_cache_quant_algo``.

    **Why.** hf_quant_config.json was copied into ``quantization_config``, or the other way.
    **Hurts.** vLLM reads each form's own field and ignores the other: the KV cache stays in BF16,
    at twice the memory and without the scales that the checkpoint carries; SGLang reads both.
    **Mend.** Flat: ``"kv_cache_scheme": {"type": "float", "num_bits": 8, "dynamic": false}``.
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
            told = (
                "kv_cache_scheme stands in the nested form, where engines read kv_cache_quant_algo"
                if not algo
                else ""
            )
        elif not scheme:
            told = "kv_cache_quant_algo stands in the flat form, where vLLM reads kv_cache_scheme alone"
        elif not isinstance(scheme, Mapping):
            told = "kv_cache_scheme is a string in the flat form, where vLLM reads an object"
        else:
            told = ""
        if told:
            yield ctx.finding(
                told,
                where=Where(None, file),
                observed=str(algo or scheme)[:80],
                expected="kv_cache_quant_algo"
                if isinstance(nested, Mapping)
                else "kv_cache_scheme, an object",
            )
