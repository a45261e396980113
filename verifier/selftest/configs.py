# SPDX-License-Identifier: Apache-2.0
"""Defects of config.json and hf_quant_config.json: QC401 to QC410."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from verifier.selftest.corruptor import (
    MIXED,
    MXFP8,
    UNIFORM,
    UPS,
    Corruptor,
    declarations,
    edit,
    exclusions,
    expert_of,
    ids,
    is_expert,
    plain_linear,
    quantized,
    sibling_of,
    target,
)
from verifier.selftest.edit import CONFIG, QUANT_CONFIG, Folder, Place

_QUANT = "quantization_config"


def _exclude(folder: Folder, *patterns: str) -> None:
    declarations(folder, exclusions(lambda listed: [*listed, *patterns]))


def _scale_of(folder: Folder, module: str) -> Place:
    parts = folder.modules()[module]
    return folder.place(
        next(
            t.name
            for leaf, t in parts.items()
            if leaf.endswith(("_scale", "_scale_2", "_scale_inv"))
        )
    )


def _weight_of(folder: Folder, module: str) -> Place:
    return folder.place(f"{module}.weight")


def excluded_by_name(folder: Folder) -> Place:
    """Name a quantized module in the exclusion list."""
    module = target(folder)
    _exclude(folder, module)
    return _scale_of(folder, module)


def excluded_by_glob(folder: Folder) -> Place:
    """Exclude quantized modules by a glob."""
    module = target(folder)
    _exclude(folder, f"{module[: module.index('layers.')]}layers.*.{module.rpartition('.')[2]}")
    return Place()


def excluded_by_regex(folder: Folder) -> Place:
    """Exclude quantized modules by a ``re:`` pattern."""
    _exclude(folder, f"re:.*\\.{target(folder).rpartition('.')[2]}$")
    return Place()


def excluded_by_part(folder: Folder) -> Place:
    """Exclude quantized modules for those engines only that match parts of names."""
    _exclude(folder, target(folder).rpartition(".")[2])
    return Place()


def router_not_excluded(folder: Folder) -> Place:
    """Forget the router in the exclusion list: it is no nn.Linear in transformers 5."""
    module = plain_linear(folder)
    declarations(folder, exclusions(lambda listed: [p for p in listed if p != module]))
    return folder.place(f"{module}.weight")


def no_exclusions(folder: Folder) -> Place:
    """Empty the exclusion list."""
    declarations(folder, exclusions(lambda listed: []))
    return Place()


def dead_exclusion(folder: Folder) -> Place:
    """Add an exclusion with a hard-coded prefix that matches nothing."""
    _exclude(folder, "model.layers.language_model.layers.0.self_attn*")
    return Place(None, CONFIG)


def dead_regex(folder: Folder) -> Place:
    """Add a ``re:`` exclusion in the in-memory namespace."""
    _exclude(folder, "re:^model\\.language_model\\.visual\\..*")
    return Place(None, CONFIG)


def regex_that_does_not_compile(folder: Folder) -> Place:
    """Add a glob written as ``re:``, which is no regular expression."""
    _exclude(folder, "re:*self_attn*")
    return Place(None, CONFIG)


def _file_body(change: Callable[[dict[str, Any]], None]) -> Callable[[Folder], Place]:
    def apply(folder: Folder) -> Place:
        folder.edit_json(QUANT_CONFIG, lambda value: change(value["quantization"]))
        return Place(None, QUANT_CONFIG)

    return apply


def _drop_entry(body: dict[str, Any]) -> None:
    body["quantized_layers"].pop(next(iter(body["quantized_layers"])))


def _drop_last_exclusion(body: dict[str, Any]) -> None:
    body["exclude_modules"] = body["exclude_modules"][:-1]


def not_declared(folder: Folder) -> Place:
    """Copy config.json from the source and do not write hf_quant_config.json."""
    folder.edit_json(CONFIG, lambda value: value.pop(_QUANT))
    folder.remove(QUANT_CONFIG)
    return folder.place(f"{quantized(folder)[0]}.weight")


def config_absent(folder: Folder) -> Place:
    """Do not upload config.json."""
    folder.remove(CONFIG)
    return Place(None, CONFIG)


def config_not_json(folder: Folder) -> Place:
    """Put a proxy's error page in place of config.json."""
    (folder.path / CONFIG).write_text("<html>504 Gateway Time-out</html>")
    return Place(None, CONFIG)


def quant_config_cut(folder: Folder) -> Place:
    """Cut hf_quant_config.json in the middle."""
    text = (folder.path / QUANT_CONFIG).read_text()
    (folder.path / QUANT_CONFIG).write_text(text[: len(text) // 2])
    return Place(None, QUANT_CONFIG)


def declaration_is_text(folder: Folder) -> Place:
    """Serialise ``quantization_config`` twice: a string where an object belongs."""
    folder.edit_json(CONFIG, lambda value: value.update({_QUANT: str(value[_QUANT])}))
    return Place(None, CONFIG)


def exclusions_are_text(folder: Folder) -> Place:
    """Write the exclusion list of config.json as one string with commas."""
    folder.edit_json(
        CONFIG, lambda value: value[_QUANT].update({"ignore": ", ".join(value[_QUANT]["ignore"])})
    )
    return Place(None, CONFIG)


def _algo(value: str | None) -> Callable[[Folder], Place]:
    def apply(folder: Folder) -> Place:
        declarations(folder, lambda body: body.update({"quant_algo": value}))
        return Place(None, CONFIG)

    return apply


def _algo_of_others(value: str) -> Callable[[Folder], Place]:
    def apply(folder: Folder) -> Place:
        declarations(folder, lambda body: body.update({"quant_algo": value}))
        return folder.place(f"{quantized(folder)[0]}.weight")

    return apply


def method_of_integers(folder: Folder) -> Place:
    """Declare a method of integer formats over FP8 tensors."""
    declarations(
        folder,
        lambda body: (body.pop("quant_algo", None), body.update({"quant_method": "awq"})) and None,
    )
    folder.remove(QUANT_CONFIG)
    return Place(None, CONFIG)


def weight_relabelled(folder: Folder) -> Place:
    """Label the codes of one weight with another 8-bit dtype."""
    name = f"{target(folder)}.weight"
    tensor = folder.tensors()[name]
    folder.replace(name, "F8_E5M2", tensor.shape, folder.read(name))
    return folder.place(name)


def kept_weight_relabelled(folder: Folder) -> Place:
    """Label the codes of one MXFP8 weight of a mixed checkpoint with another 8-bit dtype."""
    module = next(m for m in quantized(folder) if m.endswith(".o_proj"))
    tensor = folder.modules()[module]["weight"]
    folder.replace(tensor.name, "F8_E5M2", tensor.shape, folder.read(tensor.name))
    return folder.place(tensor.name)


def entry_lost(folder: Folder) -> Place:
    """Drop a quantized module's entry of ``quantized_layers``."""
    module = target(folder)
    declarations(folder, lambda body: body["quantized_layers"].pop(module))
    return _weight_of(folder, module)


def no_entries(folder: Folder) -> Place:
    """Empty ``quantized_layers``."""
    declarations(folder, lambda body: body["quantized_layers"].clear())
    return Place()


def entry_of_memory(folder: Folder) -> Place:
    """Write one entry under the in-memory name of its module."""
    module = target(folder)

    def change(body: dict[str, Any]) -> None:
        body["quantized_layers"][f"model.language_model.{module}"] = body["quantized_layers"].pop(
            module
        )

    declarations(folder, change)
    return _weight_of(folder, module)


def containers_instead(folder: Folder) -> Place:
    """List one layer's experts through their container, as two of three published mixed configs
    do.
    """
    container = expert_of(target(folder))[0]

    def change(body: dict[str, Any]) -> None:
        layers = {
            k: v for k, v in body["quantized_layers"].items() if not k.startswith(f"{container}.")
        }
        body["quantized_layers"] = layers | {container: {"quant_algo": "NVFP4", "group_size": 16}}

    declarations(folder, change)
    return _weight_of(
        folder, next(m for m in quantized(folder) if is_expert(m) and expert_of(m)[0] == container)
    )


def packed_instead(folder: Folder) -> Place:
    """List one layer's q, k and v as the engine's fused projection."""
    head = next(m for m in quantized(folder) if m.endswith(".q_proj")).removesuffix(".q_proj")

    def change(body: dict[str, Any]) -> None:
        for leaf in ("q_proj", "k_proj", "v_proj"):
            body["quantized_layers"].pop(f"{head}.{leaf}")
        body["quantized_layers"][f"{head}.qkv_proj"] = {"quant_algo": "MXFP8"}

    declarations(folder, change)
    return _weight_of(folder, f"{head}.q_proj")


def wrong_algo_of_entry(folder: Folder) -> Place:
    """Declare MXFP8 for one module whose tensors are NVFP4."""
    module = target(folder)
    declarations(
        folder, lambda body: body["quantized_layers"].update({module: {"quant_algo": "MXFP8"}})
    )
    return _weight_of(folder, module)


def entry_for_plain_weight(folder: Folder) -> Place:
    """Declare an unquantized linear quantized."""
    module = plain_linear(folder)
    declarations(
        folder, lambda body: body["quantized_layers"].update({module: {"quant_algo": "MXFP8"}})
    )
    return folder.place(f"{module}.weight")


def entry_not_on_disk(folder: Folder) -> Place:
    """Add an entry for a module of another model."""
    declarations(
        folder,
        lambda body: body["quantized_layers"].update({"mtp.layers.0.fc": {"quant_algo": "MXFP8"}}),
    )
    return Place(None, CONFIG)


def half_of_a_pair_plain(folder: Folder) -> Place:
    """Leave the up projection of one pair in BF16, rightly declared, where its gate is
    quantized.
    """
    module = sibling_of(target(folder), UPS)
    parts = folder.modules()[module]
    out, width = parts["weight"].shape
    values = np.full(
        (out, width * (2 if parts["weight"].dtype == "U8" else 1)), 0.01, ml_dtypes.bfloat16
    )
    folder.drop([stored.name for leaf, stored in parts.items() if leaf != "weight"])
    folder.store(f"{module}.weight", values)

    def change(body: dict[str, Any]) -> None:
        body.get("quantized_layers", {}).pop(module, None)
        for key in ("ignore", "exclude_modules"):
            if key in body:
                body[key] = sorted([*body[key], module])

    declarations(folder, change)
    return folder.place(f"{module}.weight")


CONFIGS: tuple[Corruptor, ...] = (
    Corruptor("QC401", "excluded-by-name", edit(excluded_by_name)),
    Corruptor("QC401", "excluded-by-glob", edit(excluded_by_glob)),
    Corruptor("QC401", "excluded-by-regex", edit(excluded_by_regex)),
    Corruptor("QC401", "excluded-by-part", edit(excluded_by_part), severity="warning"),
    Corruptor("QC402", "router-not-excluded", edit(router_not_excluded), formats=UNIFORM),
    Corruptor("QC402", "no-exclusions", edit(no_exclusions), formats=UNIFORM),
    Corruptor("QC404", "dead-exclusion", edit(dead_exclusion)),
    Corruptor("QC404", "dead-regex", edit(dead_regex)),
    Corruptor("QC404", "regex-that-does-not-compile", edit(regex_that_does_not_compile)),
    Corruptor(
        "QC406",
        "kv-differs",
        edit(_file_body(lambda body: body.update({"kv_cache_quant_algo": "FP8"}))),
    ),
    Corruptor(
        "QC406", "algo-differs", edit(_file_body(lambda body: body.update({"quant_algo": "FP8"})))
    ),
    Corruptor("QC406", "exclusions-differ", edit(_file_body(_drop_last_exclusion))),
    Corruptor("QC406", "layers-differ", edit(_file_body(_drop_entry)), formats=MIXED),
    Corruptor("QC407", "not-declared", edit(not_declared)),
    Corruptor("QC407", "config-absent", edit(config_absent)),
    Corruptor("QC407", "config-not-json", edit(config_not_json)),
    Corruptor("QC407", "quant-config-cut", edit(quant_config_cut)),
    Corruptor("QC407", "declaration-is-text", edit(declaration_is_text)),
    Corruptor(
        "QC407",
        "exclusions-are-text",
        edit(exclusions_are_text),
        formats=UNIFORM,
        also=ids("402 406"),
    ),
    Corruptor("QC408", "algo-null", edit(_algo(None))),
    Corruptor("QC408", "algo-unknown", edit(_algo("NVFP5"))),
    Corruptor(
        "QC408",
        "nvfp4-declared-mxfp8",
        edit(_algo_of_others("MXFP8")),
        formats=frozenset({"nvfp4"}),
    ),
    Corruptor(
        "QC408",
        "mxfp8-declared-fp8",
        edit(_algo_of_others("FP8")),
        formats=MXFP8,
        also=ids("304 306"),
    ),
    Corruptor("QC408", "method-of-integers", edit(method_of_integers), formats=MXFP8),
    Corruptor("QC408", "weight-relabelled", edit(weight_relabelled), formats=MXFP8),
    Corruptor(
        "QC408",
        "kept-weight-relabelled",
        edit(kept_weight_relabelled),
        formats=MIXED,
        also=ids("605"),
    ),
    Corruptor("QC305", "mxfp8-declared-nvfp4", edit(_algo_of_others("NVFP4")), formats=MXFP8),
    Corruptor("QC409", "half-of-a-pair-plain", edit(half_of_a_pair_plain), also=ids("605")),
    Corruptor("QC410", "entry-lost", edit(entry_lost), formats=MIXED),
    Corruptor("QC410", "no-entries", edit(no_entries), formats=MIXED),
    Corruptor("QC410", "entry-of-memory", edit(entry_of_memory), formats=MIXED),
    Corruptor(
        "QC410", "containers-instead", edit(containers_instead), formats=MIXED, severity="warning"
    ),
    Corruptor("QC410", "packed-instead", edit(packed_instead), formats=MIXED, severity="warning"),
    Corruptor("QC410", "wrong-algo-of-entry", edit(wrong_algo_of_entry), formats=MIXED),
    Corruptor("QC410", "entry-for-plain-weight", edit(entry_for_plain_weight), formats=MIXED),
    Corruptor(
        "QC410", "entry-not-on-disk", edit(entry_not_on_disk), formats=MIXED, severity="warning"
    ),
)
