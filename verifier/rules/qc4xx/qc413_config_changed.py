# SPDX-License-Identifier: Apache-2.0
"""QC413: config.json differs from the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule
from verifier.text import json_text

# These do not describe the model, but how it was saved, by what, and in which dtype to load it.
_FREE = frozenset(
    {
        "quantization_config",
        "compression_config",
        "dtype",
        "torch_dtype",
        "transformers_version",
        "use_cache",
        "max_memory",
    }
)
_ROPE = ("rope_theta", "rope_scaling", "rope_parameters")
_MISSING = object()


@rule(
    "QC413",
    "config.json differs from the base's",
    severity="warning",
    depth="header",
    unit="fields",
    repairable=True,
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1693",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every field of the base's config.json is here, with the same value, at every level.

    **What it does.** Compares both config.json files. ``quantization_config``, ``dtype``,
    ``torch_dtype``, ``transformers_version``, ``use_cache``, names with a leading underscore and
    added fields may differ; ``rope_theta`` may be inside ``rope_parameters`` and vice versa.

    **Why it happens.** The config went through ``save_pretrained`` of a class that drops fields it
    does not know.

    **Impact.** Layer types, rope or scaling fall back to defaults: long contexts or whole layers
    are silently wrong.

    **Fix.** Copy the base's config.json and add ``quantization_config`` to it.
    """
    config, base = ctx.checkpoint.config, ctx.base.checkpoint.config if ctx.base else None
    if ctx.expectations.unrelated_base:
        ctx.tally.miss(1, "the base is a different model")
        return
    if base is None or config is None:
        ctx.tally.miss(1, "there is no config.json to compare with")
        return
    model_type, base_type = config.get("model_type"), base.get("model_type")
    if model_type != base_type:
        ctx.tally.see()
        ctx.tally.miss(len(base) - 1, "the base's config.json has a different model_type")
        yield _difference(ctx, "model_type", model_type, base_type)
        return
    yield from _compare(ctx, base, config, "")


def _compare(
    ctx: Context, base: Mapping[str, Any], config: Mapping[str, Any], path: str
) -> Iterator[Finding]:
    """Yield the fields of one level of the base's config that are missing here or different."""
    for key, base_value in base.items():
        if key in _FREE or key.startswith("_"):
            continue
        ctx.tally.see()
        value = config.get(key, _MISSING)
        if key in _ROPE:
            if _same_rope(base, config, key):
                continue
        elif isinstance(base_value, Mapping) and isinstance(value, Mapping):
            yield from _compare(ctx, base_value, value, f"{path}{key}.")
            continue
        if value is _MISSING:
            if base_value is not None:
                yield _difference(ctx, f"{path}{key}", value, base_value)
        elif not _same(base_value, value):
            yield _difference(ctx, f"{path}{key}", value, base_value)


def _difference(ctx: Context, name: str, value: object, base_value: object) -> Finding:
    missing = value is _MISSING
    problem = "is missing; the base's config.json has it" if missing else "differs from the base's"
    return ctx.finding(
        f"{name} {problem}",
        where=Where(None, "config.json"),
        observed="absent" if missing else json_text(value),
        expected=json_text(base_value),
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(a == b)  # 1 and 1.0 are one number


def _same_rope(base: Mapping[str, Any], config: Mapping[str, Any], key: str) -> bool:
    """Whether a rope field agrees: by itself if both configs use its name, else with all others."""
    if base.get(key) is not None and config.get(key) is not None:
        return _rope({key: base[key]}) == _rope({key: config[key]})
    return _rope(base) == _rope(config)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rope fields of a config as transformers 5 names them, without defaults."""
    rope: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        rope["rope_theta"] = config["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            rope |= value
        elif value is not None:
            rope[key] = value
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    return {k: v for k, v in rope.items() if v is not None and (k, v) != ("rope_type", "default")}
