# SPDX-License-Identifier: Apache-2.0
"""QC413: config.json states another model than the base's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from verifier.findings import Finding, Where
from verifier.rules.context import Context
from verifier.rules.registry import rule

# Neither says anything of the model: how it was saved, by what, and in which dtype a framework
# shall hold it.
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
    needs=("base",),
    consumers=("vLLM", "SGLang", "TensorRT-LLM", "transformers"),
    sources=("NVIDIA/Model-Optimizer#1693",),
)
def check(ctx: Context) -> Iterator[Finding]:
    """Every field of the base's config.json is here with its value, at every level.

    ``quantization_config``, ``dtype``, ``torch_dtype``, ``transformers_version``, ``use_cache``,
    names with a leading underscore and fields added here are free; ``rope_theta`` may stand inside
    ``rope_parameters`` and the other way.
    **Why.** The config went through ``save_pretrained`` of a class that drops what it does not
    know.
    **Hurts.** Layer types, rope or scaling fall back to defaults: long contexts or whole layers are
    wrong, and nothing fails.
    **Mend.** Copy the base's config.json and add ``quantization_config`` to it.
    """
    theirs, ours = (ctx.base.checkpoint.config if ctx.base else None), ctx.checkpoint.config
    if theirs is None or ours is None or ctx.expectations.unrelated_base:
        ctx.tally.miss(
            1,
            "the base is another model"
            if ctx.expectations.unrelated_base
            else "there is no config.json to compare with",
        )
        return
    types = theirs.get("model_type"), ours.get("model_type")
    if types[0] != types[1]:
        ctx.tally.see()
        ctx.tally.miss(len(theirs) - 1, "the base's config.json is of another model_type")
        yield _told(ctx, "model_type", "has another value", types[1], types[0])
        return
    yield from _compare(ctx, theirs, ours, "")


def _compare(
    ctx: Context, theirs: Mapping[str, Any], ours: Mapping[str, Any], path: str
) -> Iterator[Finding]:
    rope = _rope(theirs) == _rope(ours)
    for key, wanted in theirs.items():
        if key in _FREE or key.startswith("_"):
            continue
        ctx.tally.see()
        got = ours.get(key, _MISSING)
        if key in _ROPE:
            # Spelled alike it is compared alone, spelled otherwise with all that is said of rope.
            alike = got is not _MISSING and got is not None and wanted is not None
            if _rope({key: wanted}) == _rope({key: got}) if alike else rope:
                continue
        if isinstance(wanted, Mapping) and isinstance(got, Mapping) and key not in _ROPE:
            yield from _compare(ctx, wanted, got, f"{path}{key}.")
        elif got is _MISSING and wanted is not None:
            yield _told(ctx, f"{path}{key}", "is lost", "absent", wanted)
        elif got is not _MISSING and not _same(wanted, got):
            yield _told(ctx, f"{path}{key}", "has another value", got, wanted)


def _told(ctx: Context, name: str, what: str, got: object, wanted: object) -> Finding:
    return ctx.finding(
        f"{name} {what} than in the base's config.json"
        if what.startswith("has")
        else f"{name} of the base's config.json {what}",
        where=Where(None, "config.json"),
        observed=str(got)[:80],
        expected=str(wanted)[:80],
    )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, bool) != isinstance(b, bool):
        return False
    return bool(a == b)  # 1 and 1.0 are one number


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a config says of rope, in transformers 5's spelling; defaults are left out."""
    found: dict[str, Any] = {}
    if config.get("rope_theta") is not None:
        found["rope_theta"] = config["rope_theta"]
    for key in ("rope_scaling", "rope_parameters"):
        value = config.get(key)
        if isinstance(value, Mapping):
            found |= value
        elif value is not None:
            found[key] = value
    if "type" in found:
        found.setdefault("rope_type", found.pop("type"))
    return {k: v for k, v in found.items() if v is not None and (k, v) != ("rope_type", "default")}
