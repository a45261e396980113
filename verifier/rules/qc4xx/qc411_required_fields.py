# SPDX-License-Identifier: Apache-2.0
"""QC411: required field is missing or has the wrong type."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verifier.findings import Finding, Severity, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import json_text

REQUIRED: Mapping[str, tuple[str, ...]] = {
    "NVFP4": ("group_size", "kv_cache_quant_algo", "exclude_modules"),
    "MXFP8": ("kv_cache_quant_algo", "exclude_modules"),
    "MIXED_PRECISION": ("quantized_layers",),
}
_STRING_OR_NULL, _LIST, _OBJECT = "a string or null", "a list of strings", "an object"


@rule(
    "QC411",
    "required field is missing or has the wrong type",
    severity="error",
    depth="header",
    unit="fields",
    repairable=True,
    consumers=("vLLM", "SGLang", "TensorRT-LLM"),
    sources=("vLLM ModelOptNvFp4Config.from_config", "vLLM ModelOptMxFp8Config.from_config"),
    engines={
        "vllm": (
            "error",
            "raises ValueError if it reads hf_quant_config.json and a required field is missing",
        ),
        "trtllm": ("error", "reads hf_quant_config.json first and asserts group_size 16 for NVFP4"),
    },
)
def check(ctx: Context) -> Iterator[Finding]:
    """A declaration has the fields that its algorithm requires, each with the expected type.

    **What it does.** Checks the nested form for the required fields: for NVFP4 ``group_size``,
    ``kv_cache_quant_algo`` and ``exclude_modules``, for MXFP8 the last two, for MIXED_PRECISION
    ``quantized_layers``. ``kv_cache_quant_algo`` may be null, but must be present. Types are
    checked in both files; malformed lists and entries are QC407, a null algorithm is QC408.

    **Why it happens.** The file was written by hand, or by a different version of an exporter.

    **Impact.** vLLM raises ValueError before it loads anything. If config.json has a declaration,
    too, vLLM never reads the other file, and a missing field there is a warning.

    **Fix.** Write the field with its expected type.
    """
    declarations = ctx.candidate.declarations
    for declaration in (declarations.inline, declarations.file):
        if declaration is None or not declaration.modelopt:
            continue
        raw = _raw(ctx, declaration.file)
        nested = raw.get("quantization")
        body = nested if isinstance(nested, Mapping) else raw
        where = Where(None, declaration.file)
        severity: Severity = "error" if declaration is declarations.effective else "warning"
        if isinstance(nested, Mapping):
            for key in REQUIRED.get(declaration.algo or "", ()):
                ctx.tally.see()
                if key not in body:
                    yield ctx.finding(
                        f"{declaration.algo} requires {key}",
                        cause=f"missing {key}",
                        where=where,
                        observed="absent",
                        expected=key,
                        severity=severity,
                    )
        for key, expected, fits in _field_types(body):
            ctx.tally.see()
            if not fits:
                yield ctx.finding(
                    f"{key} has the wrong type",
                    cause=f"type {key}",
                    where=where,
                    observed=json_text(body[key], 60),
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


def _field_types(body: Mapping[str, Any]) -> Iterator[tuple[str, str, bool]]:
    """Yield (field, expected type, whether it fits) for each field that no other rule checks."""
    for key in ("exclude_modules", "ignore", "quantized_layers"):
        if key in body and body[key] is None:  # `parse` records other wrong types, for QC407
            yield key, _OBJECT if key == "quantized_layers" else _LIST, False
    if "group_size" in body:
        value = body["group_size"]
        yield "group_size", "a whole number", value is None or (type(value) is int and value > 0)
    key = "kv_cache_quant_algo"
    if key in body:
        yield key, _STRING_OR_NULL, isinstance(body[key], str | None)
    key = "kv_cache_scheme"
    if key in body:
        yield key, f"{_OBJECT} or null", isinstance(body[key], Mapping | str | None)
    key = "config_groups"
    if key in body:
        groups = body[key]
        fits = isinstance(groups, Mapping) and all(map(_is_group, groups.values()))
        yield key, "an object of groups with weights and targets", fits
    key = "producer"
    if key in body:
        yield key, _OBJECT, isinstance(body[key], Mapping | None)


def _is_group(value: object) -> bool:
    """Whether a value has the types of a group in ``config_groups``."""
    if not isinstance(value, Mapping) or not isinstance(value.get("targets", []), list):
        return False
    return isinstance(value.get("weights"), Mapping | None)
