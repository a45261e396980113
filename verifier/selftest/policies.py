# SPDX-License-Identifier: Apache-2.0
"""Defects of what a release declares and chooses to quantize: QC403, QC405, QC411 to QC415,
QC513.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from verifier.selftest.corruptor import (
    DOWNS,
    LISTS,
    UNIFORM,
    Corruptor,
    declarations,
    edit,
    embedding,
    exclusions,
    expert_of,
    ids,
    kind_of,
    plain_linear,
    scale_leaf,
    target,
)
from verifier.selftest.edit import CONFIG, QUANT_CONFIG, Folder, Place
from verifier.selftest.encode import Array, mxfp8, nvfp4

_QUANT = "quantization_config"
_MTP = "mtp.layers.0"


def _exclude(folder: Folder, *names: str) -> None:
    declarations(folder, exclusions(lambda listed: sorted([*listed, *names])))


def _declare(folder: Folder, modules: list[str], algo: str) -> None:
    """List modules in ``quantized_layers`` where there is one, and take them out of the
    exclusions.
    """

    def change(body: dict[str, Any]) -> None:
        if "quantized_layers" in body:
            entry = {"quant_algo": algo} | ({"group_size": 16} if algo == "NVFP4" else {})
            body["quantized_layers"] |= dict.fromkeys(modules, entry)
        for key in LISTS:
            if key in body:
                body[key] = [p for p in body[key] if p not in modules]

    declarations(folder, change)


def _plain(rows: int, width: int) -> Array:
    values = np.random.default_rng(403).normal(0, 0.02, (rows, width))
    return values.astype(ml_dtypes.bfloat16)


def mtp_not_excluded(folder: Folder) -> Place:
    """Copy the draft head from the source, and leave the exclusions as they were for the model."""
    width = folder.tensors()[embedding(folder)].shape[1]
    for leaf in ("eh_proj", "self_attn.o_proj"):
        folder.add(f"{_MTP}.{leaf}.weight", _plain(width, width))
    return folder.place(f"{_MTP}.eh_proj.weight")


def numbered_mtp_not_excluded(folder: Folder) -> Place:
    """The same in the spelling of DeepSeek and GLM: the layer behind the last."""
    config = folder.json(CONFIG)
    layers = config.get("num_hidden_layers") or config["text_config"]["num_hidden_layers"]
    name = re.sub(r"layers\.\d+\..*", f"layers.{layers}.eh_proj.weight", target(folder))
    width = folder.tensors()[embedding(folder)].shape[1]
    return folder.add(name, _plain(width, width))


def _in_mtp(module: str) -> str:
    """Return the name that a module of a layer has in the MTP layer."""
    return f"{_MTP}.{module.partition('.layers.')[2].partition('.')[2]}"


def _mtp_experts(folder: Folder) -> list[str]:
    """Copy one layer's experts into an MTP layer; return the new modules."""
    container = expert_of(target(folder))[0]
    found = [m for m in folder.modules() if m.startswith(f"{container}.")]
    for module in found:
        for leaf, tensor in folder.modules()[module].items():
            folder.add(f"{_in_mtp(module)}.{leaf}", folder.array(tensor.name))
    new = [_in_mtp(m) for m in found]
    _declare(folder, new, "NVFP4" if kind_of(folder) != "mxfp8" else "MXFP8")
    return new


def mtp_experts_in_part(folder: Folder) -> Place:
    """Quantize the experts of an MTP layer but for the last one, which stays BF16 and is
    excluded.
    """
    new = _mtp_experts(folder)
    last = [m for m in new if expert_of(m)[1] == max(expert_of(n)[1] for n in new)]
    return _not_quantized(folder, last)


def _not_quantized(folder: Folder, modules: list[str]) -> Place:
    """Put BF16 weights in place of quantized ones, excluded by name; return the place of the
    first.
    """
    for module in modules:
        parts = folder.modules()[module]
        rows, width = parts["weight"].shape
        values = _plain(rows, width * 2 if parts["weight"].dtype == "U8" else width)
        folder.drop([t.name for leaf, t in parts.items() if leaf != "weight"])
        folder.store(f"{module}.weight", values)
    _unlist(folder, modules)
    return folder.place(f"{modules[0]}.weight")


def _unlist(folder: Folder, modules: list[str]) -> None:
    def change(body: dict[str, Any]) -> None:
        for module in modules:
            body.get("quantized_layers", {}).pop(module, None)

    declarations(folder, change)
    _exclude(folder, *modules)


def mtp_down_projections_plain(folder: Folder) -> Place:
    """Quantize gate and up of an MTP layer's experts and leave down in BF16, excluded by name."""
    new = _mtp_experts(folder)
    downs = [m for m in new if m.rpartition(".")[2] in DOWNS]
    return _not_quantized(folder, downs)


def _router_as(pattern: Callable[[str], str]) -> Callable[[Folder], Place]:
    """Return a change of the first unquantized linear's exclusion into another spelling."""

    def apply(folder: Folder) -> Place:
        module = plain_linear(folder)

        def change(listed: list[str]) -> list[str]:
            kept = [p for p in listed if p != module]
            return [*kept, pattern(module)]

        declarations(folder, exclusions(change))
        return folder.place(f"{module}.weight")

    return apply


def _without(file: str, key: str) -> Callable[[Folder], Place]:
    """Return the removal of a field from the nested form."""

    def apply(folder: Folder) -> Place:
        folder.edit_json(file, lambda value: value["quantization"].pop(key))
        return Place(None, file)

    return apply


def nested_alone_without_kv(folder: Folder) -> Place:
    """Ship hf_quant_config.json alone, and without the field that vLLM demands."""
    folder.edit_json(CONFIG, lambda value: value.pop(_QUANT))
    return _without(QUANT_CONFIG, "kv_cache_quant_algo")(folder)


def group_size_as_text(folder: Folder) -> Place:
    """Write the group size as a string."""
    folder.edit_json(QUANT_CONFIG, lambda value: value["quantization"].update({"group_size": "16"}))
    return Place(None, QUANT_CONFIG)


def exclusions_null(folder: Folder) -> Place:
    """Write null for an empty exclusion list, in a field beside the one that holds the list."""
    folder.edit_json(
        CONFIG,
        lambda value: value[_QUANT].update(
            {"modules_to_not_convert": None, "exclude_modules": None}
        ),
    )
    return Place(None, CONFIG)


def _config(change: Callable[[dict[str, Any]], Any]) -> Callable[[Folder], Place]:
    def apply(folder: Folder) -> Place:
        folder.edit_json(CONFIG, change)
        return Place(None, CONFIG)

    return apply


def _tied_above(config: dict[str, Any]) -> None:
    config["text_config"] = {
        **config.get("text_config", {}),
        "tie_word_embeddings": bool(config["tie_word_embeddings"]),
    }
    config["tie_word_embeddings"] = not config["tie_word_embeddings"]


def _rope_lost(config: dict[str, Any]) -> None:
    text = config.get("text_config") or config
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        text.pop(key, None)


def _rope_default(config: dict[str, Any]) -> None:
    text = config.get("text_config") or config
    if "rope_theta" in text:
        text["rope_theta"] = 12345.0
    else:
        text["rope_parameters"] = {**text["rope_parameters"], "rope_theta": 12345.0}


def _eps_changed(config: dict[str, Any]) -> None:
    (config.get("text_config") or config)["rms_norm_eps"] = 0.125


def shared_expert_plain(folder: Folder) -> Place:
    """Give one layer a shared expert in BF16 beside quantized routed experts, rightly declared."""
    gate = target(folder)
    container = expert_of(gate)[0]
    shared = f"{container.removesuffix('.experts')}.shared_experts.gate_proj"
    if shared in folder.modules():
        raise LookupError("the layer has shared experts")
    parts = folder.modules()[gate]["weight"]
    folder.add(
        f"{shared}.weight",
        _plain(parts.shape[0], parts.shape[1] * (2 if parts.dtype == "U8" else 1)),
    )
    _exclude(folder, shared)
    return folder.place(f"{shared}.weight")


def _kv(change: Callable[[dict[str, Any]], Any]) -> Callable[[Folder], Place]:
    """Return a change of config.json's declaration, with the same KV format in the other file."""

    def apply(folder: Folder) -> Place:
        folder.edit_json(CONFIG, lambda value: change(value[_QUANT]))
        folder.edit_json(
            QUANT_CONFIG, lambda value: value["quantization"].update({"kv_cache_quant_algo": "FP8"})
        )
        return Place(None, CONFIG)

    return apply


def _quantize(folder: Folder, module: str) -> Place:
    """Encode an unquantized weight in the checkpoint's own format and declare it so."""
    values = folder.array(f"{module}.weight")
    if kind_of(folder) == "nvfp4":
        parts, algo = nvfp4(values), "NVFP4"
    else:
        leaf = next(
            s for p in folder.modules().values() if (s := scale_leaf(p)) and p[s].dtype == "U8"
        )
        parts, algo = mxfp8(values, leaf), "MXFP8"
    file = folder.tensors()[f"{module}.weight"].file
    folder.store(f"{module}.weight", parts.pop("weight"))
    for leaf, tensor in parts.items():
        folder.add(f"{module}.{leaf}", tensor, file=file)
    _declare(folder, [module], algo)
    return folder.place(f"{module}.weight")


def router_quantized(folder: Folder) -> Place:
    """Quantize a router with everything else."""
    return _quantize(folder, next(m for m in folder.modules() if m.endswith(".gate")))


def embedding_quantized(folder: Folder) -> Place:
    """Quantize the token embedding."""
    return _quantize(folder, embedding(folder).removesuffix(".weight"))


def head_quantized(folder: Folder) -> Place:
    """Quantize the output head to four bits."""
    return _quantize(folder, next(m for m in folder.modules() if m.endswith("lm_head")))


_EXPERTS = frozenset({"experts"})
_BASE = ("base",)
POLICIES: tuple[Corruptor, ...] = (
    Corruptor(
        "QC403", "head-not-excluded", edit(mtp_not_excluded), formats=UNIFORM, also=ids("201")
    ),
    Corruptor(
        "QC403",
        "numbered-head-not-excluded",
        edit(numbered_mtp_not_excluded),
        formats=UNIFORM,
        also=ids("201"),
    ),
    Corruptor(
        "QC403", "experts-in-part", edit(mtp_experts_in_part), traits=_EXPERTS, also=ids("201")
    ),
    Corruptor(
        "QC403",
        "downs-plain",
        edit(mtp_down_projections_plain),
        traits=_EXPERTS,
        severity="warning",
        also=ids("201"),
    ),
    Corruptor(
        "QC405",
        "router-by-regex",
        edit(_router_as(lambda m: f"re:^{re.escape(m)}$")),
        formats=UNIFORM,
        severity="warning",
    ),
    Corruptor(
        "QC405",
        "router-by-part",
        edit(_router_as(lambda m: m.rpartition(".")[2])),
        formats=UNIFORM,
        traits=_EXPERTS,
        severity="warning",
    ),
    Corruptor(
        "QC405",
        "router-by-piece",
        edit(_router_as(lambda m: m[2:])),
        formats=UNIFORM,
        severity="warning",
    ),
    Corruptor(
        "QC411", "nested-form-alone-without-kv", edit(nested_alone_without_kv), formats=UNIFORM
    ),
    Corruptor(
        "QC411",
        "nested-form-without-kv",
        edit(_without(QUANT_CONFIG, "kv_cache_quant_algo")),
        formats=UNIFORM,
        severity="warning",
    ),
    Corruptor(
        "QC411",
        "nested-form-without-group-size",
        edit(_without(QUANT_CONFIG, "group_size")),
        formats=frozenset({"nvfp4"}),
        severity="warning",
    ),
    Corruptor("QC411", "group-size-as-text", edit(group_size_as_text)),
    Corruptor("QC411", "exclusions-null", edit(exclusions_null), formats=UNIFORM),
    Corruptor("QC412", "levels-differ", edit(_config(_tied_above)), severity="warning"),
    Corruptor(
        "QC412",
        "flag-is-text",
        edit(_config(lambda c: c.update({"tie_word_embeddings": "false"}))),
        severity="warning",
    ),
    Corruptor("QC413", "rope-lost", edit(_config(_rope_lost)), needs=_BASE, severity="warning"),
    Corruptor(
        "QC413", "rope-theta-default", edit(_config(_rope_default)), needs=_BASE, severity="warning"
    ),
    Corruptor(
        "QC413", "norm-epsilon", edit(_config(_eps_changed)), needs=_BASE, severity="warning"
    ),
    Corruptor(
        "QC413",
        "field-lost",
        edit(_config(lambda c: c.pop("bos_token_id", c.pop("architectures", None)))),
        needs=_BASE,
        severity="warning",
    ),
    Corruptor(
        "QC414",
        "shared-expert-plain",
        edit(shared_expert_plain),
        traits=_EXPERTS,
        severity="info",
        also=ids("201"),
    ),
    Corruptor(
        "QC415",
        "nested-field-in-flat-form",
        edit(_kv(lambda q: q.update({"kv_cache_quant_algo": "FP8"}))),
        severity="warning",
    ),
    Corruptor(
        "QC415",
        "scheme-as-text",
        edit(_kv(lambda q: q.update({"kv_cache_scheme": "FP8"}))),
        severity="warning",
    ),
    Corruptor("QC513", "router", edit(router_quantized), traits=_EXPERTS, severity="warning"),
    Corruptor("QC513", "embedding", edit(embedding_quantized), severity="warning"),
    Corruptor(
        "QC513", "head", edit(head_quantized), formats=frozenset({"nvfp4"}), severity="warning"
    ),
)
