# SPDX-License-Identifier: Apache-2.0
"""QC411: a field that the algorithm requires is absent, or has another type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
    "MIXED_PRECISION": ("quantized_layers",),
}
_STRING_OR_NULL, _LIST, _OBJECT = "a string or null", "a list of strings", "an object"


@rule(
    "QC411",
    "required field of the declaration",
    severity="error",
    depth="header",
    unit="fields",
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM ModelOptNvFp4Config.from_config", "vLLM ModelOptMxFp8Config.from_config"),
    engines={
        "vllm": (
            "error",
            "raises ValueError where hf_quant_config.json is read and a required field is absent",
        ),
        "trtllm": ("error", "reads hf_quant_config.json first and asserts group_size 16 for NVFP4"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """The nested form has the fields that its algorithm requires, and every field in both files has
    its type.

    NVFP4: ``group_size``, ``kv_cache_quant_algo``, ``exclude_modules``; MXFP8: the last two;
    MIXED_PRECISION: ``quantized_layers``. ``kv_cache_quant_algo`` may be null, but must be there.
    **Why.** The file was written by hand, or by an exporter of another version.
    **Hurts.** vLLM raises ValueError before it loads. Where config.json carries a declaration too,
    vLLM never reads the file, and what is absent there is a warning.
    **Mend.** Write the field. (Lists and entries of another type are QC407's, a null algorithm
    QC408's.)
    """
    for found in (ctx.candidate.declarations.inline, ctx.candidate.declarations.file):
        if found is None or not found.known:
            continue
        raw = _raw(ctx, found.file)
        nested = raw.get("quantization")
        body = nested if isinstance(nested, Mapping) else raw
        where = Where(None, found.file)
        severity: Severity = "error" if found is ctx.candidate.declarations.effective else "warning"
        if isinstance(nested, Mapping):
            for key in REQUIRED.get(found.algo or "", ()):
                ctx.tally.see()
                if key not in body:
                    yield ctx.finding(
                        f"{found.algo} requires {key!r}",
                        where=where,
                        observed="absent",
                        expected=key,
                        severity=severity,
                    )
        for key, expected, fits in _types(body):
            ctx.tally.see()
            if not fits:
                text = f"{key!r} has another type than engines read"
                yield ctx.finding(
                    text,
                    where=where,
                    observed=f"{key} = {str(body[key])[:60]!r}",
                    expected=expected,
                )


def _raw(ctx: Context, file: str) -> Mapping[str, Any]:
    if file == "hf_quant_config.json":
        return ctx.checkpoint.hf_quant_config or {}
    config = ctx.checkpoint.config or {}
    value = config.get("quantization_config")
    if value is None and isinstance(config.get("text_config"), Mapping):
        value = config["text_config"].get("quantization_config")
    return value if isinstance(value, Mapping) else {}


def _types(body: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield (field, expected type, whether it fits) for each field present whose type no other rule
    judges.
    """
    for key in ("exclude_modules", "ignore", "quantized_layers"):
        if key in body and body[key] is None:  # of other wrong types `parse` tells, for QC407
            yield key, _OBJECT if key == "quantized_layers" else _LIST, False
    if "group_size" in body:
        value = body["group_size"]
        yield "group_size", "a whole number", value is None or (type(value) is int and value > 0)
    if "kv_cache_quant_algo" in body:
        yield (
            "kv_cache_quant_algo",
            _STRING_OR_NULL,
            isinstance(body["kv_cache_quant_algo"], str | None),
        )
    if "kv_cache_scheme" in body:
        yield (
            "kv_cache_scheme",
            f"{_OBJECT} or null",
            isinstance(body["kv_cache_scheme"], Mapping | str | None),
        )
    if "config_groups" in body:
        groups = body["config_groups"]
        fits = isinstance(groups, Mapping) and all(
            isinstance(g, Mapping)
            and isinstance(g.get("weights"), Mapping | None)
            and isinstance(g.get("targets", []), list)
            for g in groups.values()
        )
        yield "config_groups", "an object of groups with weights and targets", fits
    if "producer" in body:
        yield "producer", _OBJECT, isinstance(body["producer"], Mapping | None)
