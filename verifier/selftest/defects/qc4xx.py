# SPDX-License-Identifier: Apache-2.0
"""Defects of config.json and hf_quant_config.json: QC401 to QC415."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import (
    EXCLUSION_KEYS,
    Array,
    Body,
    declare,
    declare_algo,
    edit_config,
    edit_exclusions,
    edit_quant_config,
    exclude,
    exclude_sorted,
    relabel,
    remove_files,
    replace_parts,
    unlist,
)
from verifier.selftest.corruptor import (
    MIXED,
    MXFP8,
    ONLY_NVFP4,
    UNIFORM,
    Change,
    add,
    defect,
    kind_of,
    on,
)
from verifier.selftest.editor import CONFIG, QUANT_CONFIG, CheckpointEditor
from verifier.selftest.pick import (
    DOWNS,
    UPS,
    attention_head,
    embedding,
    expert_of,
    plain_linear,
    quantized,
    sibling_of,
    target,
    weight,
)

_QUANT = "quantization_config"
_MTP = "mtp.layers.0"


def _leaf(module: str) -> str:
    return module.rpartition(".")[2]


# QC401 to QC405


@defect("QC401")
def excluded_by_name(ckpt: CheckpointEditor) -> Where:
    """Name a quantized module in the exclusion list."""
    module = target(ckpt)
    exclude(ckpt, module)
    parts = ckpt.modules()[module]
    scales = ("_scale", "_scale_2", "_scale_inv")
    return ckpt.where(next(t.name for leaf, t in parts.items() if leaf.endswith(scales)))


def _exclude_by(pattern: Callable[[str], str]) -> Change:
    """Exclude quantized modules by a pattern, made from the name of one of them."""

    def change(ckpt: CheckpointEditor) -> Where:
        exclude(ckpt, pattern(target(ckpt)))
        return Where()

    return change


def _layers_glob(module: str) -> str:
    return f"{module[: module.index('layers.')]}layers.*.{_leaf(module)}"


add("QC401", "excluded-by-glob", _exclude_by(_layers_glob))
add("QC401", "excluded-by-regex", _exclude_by(lambda module: f"re:.*\\.{_leaf(module)}$"))
add("QC401", "excluded-by-part", _exclude_by(_leaf), severity="warning")


def _rewrite_router_exclusion(patterns: Callable[[str], list[str]]) -> Change:
    """Replace the exclusion of the first unquantized linear layer by patterns made from it."""

    def change(ckpt: CheckpointEditor) -> Where:
        module = plain_linear(ckpt)

        def edit(listed: list[str]) -> list[str]:
            return [*(p for p in listed if p != module), *patterns(module)]

        edit_exclusions(ckpt, edit)
        return ckpt.where(f"{module}.weight")

    return change


add("QC402", "router-not-excluded", _rewrite_router_exclusion(lambda module: []), on(UNIFORM))
add(
    "QC405",
    "router-by-regex",
    _rewrite_router_exclusion(lambda module: [f"re:^{re.escape(module)}$"]),
    on(UNIFORM),
    severity="warning",
)
add(
    "QC405",
    "router-by-part",
    _rewrite_router_exclusion(lambda module: [_leaf(module)]),
    on(UNIFORM, traits="experts"),
    severity="warning",
)
add(
    "QC405",
    "router-by-substring",
    _rewrite_router_exclusion(lambda module: [module[2:]]),
    on(UNIFORM),
    severity="warning",
)


@defect("QC402", on(UNIFORM))
def no_exclusions(ckpt: CheckpointEditor) -> Where:
    """Empty the exclusion list."""
    edit_exclusions(ckpt, lambda listed: [])
    return Where()


def _add_exclusion(pattern: str) -> Change:
    """Add an exclusion that matches nothing."""

    def change(ckpt: CheckpointEditor) -> Where:
        exclude(ckpt, pattern)
        return Where(None, CONFIG)

    return change


add("QC404", "hard-coded-prefix", _add_exclusion("model.layers.language_model.layers.0.self_attn*"))
add("QC404", "regex-of-in-memory-names", _add_exclusion("re:^model\\.language_model\\.visual\\..*"))
add("QC404", "regex-that-does-not-compile", _add_exclusion("re:*self_attn*"))


# QC403


def _plain(rows: int, width: int) -> Array:
    values = np.random.default_rng(403).normal(0, 0.02, (rows, width))
    return values.astype(ml_dtypes.bfloat16)


@defect("QC403", on(UNIFORM), also="201")
def head_not_excluded(ckpt: CheckpointEditor) -> Where:
    """Copy the draft head from the source, and keep the exclusions of the model."""
    width = ckpt.tensors()[embedding(ckpt)].shape[1]
    for leaf in ("eh_proj", "self_attn.o_proj"):
        ckpt.add(f"{_MTP}.{leaf}.weight", _plain(width, width))
    return ckpt.where(f"{_MTP}.eh_proj.weight")


@defect("QC403", on(UNIFORM), also="201")
def numbered_head_not_excluded(ckpt: CheckpointEditor) -> Where:
    """Copy it as DeepSeek and GLM spell it: as the layer behind the last one."""
    config = ckpt.json(CONFIG)
    layers = config.get("num_hidden_layers") or config["text_config"]["num_hidden_layers"]
    name = re.sub(r"layers\.\d+\..*", f"layers.{layers}.eh_proj.weight", target(ckpt))
    width = ckpt.tensors()[embedding(ckpt)].shape[1]
    return ckpt.add(name, _plain(width, width))


def declare_quantized(ckpt: CheckpointEditor, modules: list[str], algo: str) -> None:
    """Add modules to ``quantized_layers``, if any, and remove them from the exclusions."""
    entry = {"quant_algo": algo} | ({"group_size": 16} if algo == "NVFP4" else {})

    def edit(body: Body) -> None:
        if "quantized_layers" in body:
            body["quantized_layers"] |= dict.fromkeys(modules, entry)
        for key in EXCLUSION_KEYS:
            if key in body:
                body[key] = [p for p in body[key] if p not in modules]

    declare(ckpt, edit)


def _copy_experts_to_mtp(ckpt: CheckpointEditor) -> list[str]:
    """Copy the experts of one layer into an MTP layer, and return the new modules."""
    container = expert_of(target(ckpt))[0]
    copies = []
    for module, parts in ckpt.modules().items():
        if module.startswith(f"{container}."):
            copies.append(f"{_MTP}.{module.partition('.layers.')[2].partition('.')[2]}")
            for leaf, tensor in parts.items():
                ckpt.add(f"{copies[-1]}.{leaf}", ckpt.array(tensor.name))
    declare_quantized(ckpt, copies, "NVFP4" if kind_of(ckpt) != "mxfp8" else "MXFP8")
    return copies


def _unquantize(ckpt: CheckpointEditor, modules: list[str]) -> Where:
    """Replace quantized modules by excluded BF16 weights; return the location of the first."""
    for module in modules:
        rows, width = ckpt.modules()[module]["weight"].unpacked
        replace_parts(ckpt, module, {"weight": _plain(rows, width)})
    unlist(ckpt, modules)
    exclude_sorted(ckpt, modules)
    return ckpt.where(f"{modules[0]}.weight")


@defect("QC403", on(traits="experts"), also="201")
def experts_partly_quantized(ckpt: CheckpointEditor) -> Where:
    """Quantize the experts of an MTP layer except for the last one, which is excluded."""
    modules = _copy_experts_to_mtp(ckpt)
    last = max(expert_of(m)[1] for m in modules)
    return _unquantize(ckpt, [m for m in modules if expert_of(m)[1] == last])


@defect("QC403", on(traits="experts"), severity="warning", also="201")
def down_projections_unquantized(ckpt: CheckpointEditor) -> Where:
    """Quantize gate and up of an MTP layer's experts, and exclude down."""
    return _unquantize(ckpt, [m for m in _copy_experts_to_mtp(ckpt) if _leaf(m) in DOWNS])


# QC406: a change of hf_quant_config.json alone


def _drop_last_exclusion(body: Body) -> None:
    body["exclude_modules"] = body["exclude_modules"][:-1]


def _drop_first_entry(body: Body) -> None:
    body["quantized_layers"].pop(next(iter(body["quantized_layers"])))


_KV_FP8 = {"kv_cache_quant_algo": "FP8"}
add("QC406", "kv-differs", edit_quant_config(lambda body: body.update(_KV_FP8)))
add("QC406", "algo-differs", edit_quant_config(lambda body: body.update({"quant_algo": "FP8"})))
add("QC406", "exclusions-differ", edit_quant_config(_drop_last_exclusion))
add("QC406", "layers-differ", edit_quant_config(_drop_first_entry), on(MIXED))


# QC407


@defect("QC407")
def not_declared(ckpt: CheckpointEditor) -> Where:
    """Copy config.json from the source, without hf_quant_config.json."""
    ckpt.edit_json(CONFIG, lambda config: config.pop(_QUANT))
    ckpt.remove(QUANT_CONFIG)
    return ckpt.where(f"{quantized(ckpt)[0]}.weight")


@defect("QC407")
def config_not_json(ckpt: CheckpointEditor) -> Where:
    """Put a proxy's error page in place of config.json."""
    (ckpt.path / CONFIG).write_text("<html>504 Gateway Time-out</html>")
    return Where(None, CONFIG)


@defect("QC407")
def quant_config_cut(ckpt: CheckpointEditor) -> Where:
    """Cut hf_quant_config.json in the middle."""
    file = ckpt.path / QUANT_CONFIG
    text = file.read_text()
    file.write_text(text[: len(text) // 2])
    return Where(None, QUANT_CONFIG)


def _exclusions_as_text(config: dict[str, Any]) -> None:
    config[_QUANT]["ignore"] = ", ".join(config[_QUANT]["ignore"])


def _declaration_as_text(config: dict[str, Any]) -> None:
    config[_QUANT] = str(config[_QUANT])


add("QC407", "config-absent", remove_files(CONFIG))
add("QC407", "declaration-is-text", edit_config(_declaration_as_text))
add("QC407", "exclusions-are-text", edit_config(_exclusions_as_text), on(UNIFORM), also="402 406")


# QC408 and QC409


def _declare_wrong_algo(algo: str | None) -> Change:
    """Declare an algorithm that engines do not know, or none."""

    def change(ckpt: CheckpointEditor) -> Where:
        declare_algo(algo)(ckpt)
        return Where(None, CONFIG)

    return change


def _declare_other_format(algo: str) -> Change:
    """Declare a format that the tensors do not have."""

    def change(ckpt: CheckpointEditor) -> Where:
        declare_algo(algo)(ckpt)
        return ckpt.where(f"{quantized(ckpt)[0]}.weight")

    return change


def _attention_output(ckpt: CheckpointEditor) -> str:
    return next(f"{m}.weight" for m in quantized(ckpt) if m.endswith(".o_proj"))


add("QC408", "algo-null", _declare_wrong_algo(None), also="401")
add("QC408", "algo-unknown", _declare_wrong_algo("NVFP5"))
add("QC408", "nvfp4-declared-mxfp8", _declare_other_format("MXFP8"), on(ONLY_NVFP4))
add("QC408", "mxfp8-declared-fp8", _declare_other_format("FP8"), on(MXFP8), also="304 306")
add("QC408", "weight-relabelled", relabel(weight(), "F8_E5M2"), on(MXFP8))
add(
    "QC408",
    "pass-through-weight-relabelled",
    relabel(_attention_output, "F8_E5M2"),
    on(MIXED),
    also="605",
)


@defect("QC408", on(MXFP8))
def method_of_integers(ckpt: CheckpointEditor) -> Where:
    """Declare a method of integer formats for FP8 tensors."""

    def edit(body: Body) -> None:
        body.pop("quant_algo", None)
        body["quant_method"] = "awq"

    declare(ckpt, edit)
    ckpt.remove(QUANT_CONFIG)
    return Where(None, CONFIG)


@defect("QC409", also="605")
def half_of_a_pair_unquantized(ckpt: CheckpointEditor) -> Where:
    """Leave the up projection of one pair in BF16, correctly declared, next to a quantized gate."""
    module = sibling_of(target(ckpt), UPS)
    shape = ckpt.modules()[module]["weight"].unpacked
    replace_parts(ckpt, module, {"weight": np.full(shape, 0.01, ml_dtypes.bfloat16)})
    unlist(ckpt, [module])
    exclude_sorted(ckpt, [module])
    return ckpt.where(f"{module}.weight")


# QC410: quantized_layers


def _edit_layers(
    edit: Callable[[dict[str, Any], str], object], pick: Callable[[CheckpointEditor], str] = target
) -> Change:
    """Edit ``quantized_layers``, given a module; return the location of its weight."""

    def change(ckpt: CheckpointEditor) -> Where:
        module = pick(ckpt)
        declare(ckpt, lambda body: edit(body["quantized_layers"], module))
        return ckpt.where(f"{module}.weight")

    return change


def _rename_in_memory(layers: dict[str, Any], module: str) -> None:
    layers[f"model.language_model.{module}"] = layers.pop(module)


def _declare_mxfp8(layers: dict[str, Any], module: str) -> None:
    layers[module] = {"quant_algo": "MXFP8"}


add("QC410", "entry-lost", _edit_layers(lambda layers, module: layers.pop(module)), on(MIXED))
add("QC410", "in-memory-entry", _edit_layers(_rename_in_memory), on(MIXED))
add("QC410", "wrong-algo-of-entry", _edit_layers(_declare_mxfp8), on(MIXED))
add("QC410", "entry-for-plain-weight", _edit_layers(_declare_mxfp8, plain_linear), on(MIXED))


@defect("QC410", on(MIXED))
def no_entries(ckpt: CheckpointEditor) -> Where:
    """Empty ``quantized_layers``."""
    declare(ckpt, lambda body: body["quantized_layers"].clear())
    return Where()


@defect("QC410", on(MIXED), severity="warning")
def entry_not_on_disk(ckpt: CheckpointEditor) -> Where:
    """Add an entry for a module of a different model."""
    declare(ckpt, lambda body: _declare_mxfp8(body["quantized_layers"], "mtp.layers.0.fc"))
    return Where(None, CONFIG)


@defect("QC410", on(MIXED), severity="warning")
def containers_instead(ckpt: CheckpointEditor) -> Where:
    """List the experts of one layer by their container, as two published mixed configs do."""
    container = expert_of(target(ckpt))[0]

    def edit(body: Body) -> None:
        layers = body["quantized_layers"]
        others = {k: v for k, v in layers.items() if not k.startswith(f"{container}.")}
        body["quantized_layers"] = others | {container: {"quant_algo": "NVFP4", "group_size": 16}}

    declare(ckpt, edit)
    return ckpt.where(next(f"{m}.weight" for m in quantized(ckpt) if m.startswith(f"{container}.")))


@defect("QC410", on(MIXED), severity="warning")
def packed_instead(ckpt: CheckpointEditor) -> Where:
    """List q, k and v of one layer by the engine's fused projection."""
    head = attention_head(ckpt)

    def edit(body: Body) -> None:
        for leaf in ("q_proj", "k_proj", "v_proj"):
            body["quantized_layers"].pop(f"{head}.{leaf}")
        _declare_mxfp8(body["quantized_layers"], f"{head}.qkv_proj")

    declare(ckpt, edit)
    return ckpt.where(f"{head}.q_proj.weight")


# QC411


def _drop_field(key: str) -> Change:
    return edit_quant_config(lambda body: body.pop(key))


@defect("QC411", on(UNIFORM))
def nested_form_alone_without_kv(ckpt: CheckpointEditor) -> Where:
    """Ship only hf_quant_config.json, without a field that vLLM requires."""
    ckpt.edit_json(CONFIG, lambda config: config.pop(_QUANT))
    return _drop_field("kv_cache_quant_algo")(ckpt)


def _null_exclusions(config: dict[str, Any]) -> None:
    config[_QUANT] |= {"modules_to_not_convert": None, "exclude_modules": None}


add(
    "QC411",
    "nested-form-without-kv",
    _drop_field("kv_cache_quant_algo"),
    on(UNIFORM),
    severity="warning",
)
add(
    "QC411",
    "nested-form-without-group-size",
    _drop_field("group_size"),
    on(ONLY_NVFP4),
    severity="warning",
)
add(
    "QC411", "group-size-as-text", edit_quant_config(lambda body: body.update({"group_size": "16"}))
)
add("QC411", "exclusions-null", edit_config(_null_exclusions), on(UNIFORM))


# QC412 and QC413: fields of config.json


def _text(config: dict[str, Any]) -> dict[str, Any]:
    text: dict[str, Any] = config.get("text_config") or config
    return text


def _contradict_tie(config: dict[str, Any]) -> None:
    tied = bool(config["tie_word_embeddings"])
    config["text_config"] = {**config.get("text_config", {}), "tie_word_embeddings": tied}
    config["tie_word_embeddings"] = not tied


def _drop_rope(config: dict[str, Any]) -> None:
    for key in ("rope_theta", "rope_scaling", "rope_parameters"):
        _text(config).pop(key, None)


def _change_rope_theta(config: dict[str, Any]) -> None:
    text = _text(config)
    if "rope_theta" in text:
        text["rope_theta"] = 12345.0
    else:
        text["rope_parameters"] = {**text["rope_parameters"], "rope_theta": 12345.0}


def _drop_fields(config: dict[str, Any]) -> None:
    config.pop("architectures", None)
    config.pop("bos_token_id", None)


_TIE_AS_TEXT = {"tie_word_embeddings": "false"}
add("QC412", "levels-differ", edit_config(_contradict_tie), severity="warning")
add("QC412", "flag-is-text", edit_config(lambda c: c.update(_TIE_AS_TEXT)), severity="warning")
for _name, _edit in (
    ("rope-lost", _drop_rope),
    ("rope-theta-default", _change_rope_theta),
    ("norm-epsilon", lambda config: _text(config).update({"rms_norm_eps": 0.125})),
    ("field-lost", _drop_fields),
):
    add("QC413", _name, edit_config(_edit), on(needs="base"), severity="warning")


# QC414 and QC415


@defect("QC414", on(traits="experts"), severity="info", also="201")
def shared_expert_unquantized(ckpt: CheckpointEditor) -> Where:
    """Add a shared expert in BF16, correctly declared, next to quantized routed experts."""
    gate = target(ckpt)
    shared = f"{expert_of(gate)[0].removesuffix('.experts')}.shared_experts.gate_proj"
    if shared in ckpt.modules():
        raise LookupError("the layer has shared experts")
    ckpt.add(f"{shared}.weight", _plain(*ckpt.modules()[gate]["weight"].unpacked))
    exclude_sorted(ckpt, [shared])
    return ckpt.where(f"{shared}.weight")


def _declare_kv(fields: dict[str, str]) -> Change:
    """Declare an FP8 KV cache in both files, in config.json by these fields."""

    def change(ckpt: CheckpointEditor) -> Where:
        ckpt.edit_json(CONFIG, lambda config: config[_QUANT].update(fields))
        edit_quant_config(lambda body: body.update(_KV_FP8))(ckpt)
        return Where(None, CONFIG)

    return change


add("QC415", "nested-field-in-flat-form", _declare_kv(_KV_FP8), severity="warning")
add("QC415", "scheme-as-text", _declare_kv({"kv_cache_scheme": "FP8"}), severity="warning")


# QC416 and QC417: what engines need besides the tensors


@defect("QC416", on(ONLY_NVFP4), severity="warning", also="205")
def head_tied_and_not_excluded(ckpt: CheckpointEditor) -> Where:
    """Tie the head to the embedding: its tensor and its exclusion go."""

    def tie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = True

    ckpt.edit_json(CONFIG, tie)
    ckpt.drop([name for name in ckpt.tensors() if name.endswith("lm_head.weight")])
    edit_exclusions(ckpt, lambda listed: [p for p in listed if not p.endswith("lm_head")])
    return Where()


def _spell_as_transformers(config: dict[str, Any]) -> None:
    """Write the fields of MiniMax-M3 as transformers saves them."""
    text, vision = config["text_config"], config["vision_config"]
    sparse, dense = text.pop("sparse_attention_config"), text.pop("moe_layer_freq")
    kinds = ("full_attention", "minimax_m3_sparse")
    text["layer_types"] = [kinds[flag] for flag in sparse["sparse_attention_freq"]]
    text["mlp_layer_types"] = [("dense", "sparse")[flag] for flag in dense]
    text["index_head_dim"] = sparse["sparse_index_dim"]
    text["index_n_heads"] = sparse["sparse_num_index_heads"]
    vision |= vision.pop("img_token_compression_config")


add(
    "QC417",
    "spelled-as-transformers-does",
    edit_config(_spell_as_transformers),
    on(traits="vision"),
    severity="warning",
)


@defect("QC409", on(MXFP8, traits="vision"), severity="warning", also="605")
def indexer_unquantized(ckpt: CheckpointEditor) -> Where:
    """Leave one projection of the indexer in BF16, correctly declared, next to quantized q/k/v."""
    module = next(m for m in ckpt.modules() if m.endswith(".index_k_proj"))
    shape = ckpt.modules()[module]["weight"].unpacked
    replace_parts(ckpt, module, {"weight": np.full(shape, 0.01, ml_dtypes.bfloat16)})
    unlist(ckpt, [module])
    exclude_sorted(ckpt, [module])
    return ckpt.where(f"{module}.weight")


@defect("QC418", on(ONLY_NVFP4, traits="mixtral"), severity="info", also="201 205 208")
def family_whose_experts_no_loader_reads(ckpt: CheckpointEditor) -> Where:
    """Name a family whose experts have the same names, but whose loader reads stacks alone."""
    ckpt.edit_json(CONFIG, lambda config: config.update({"model_type": "granitemoe"}))
    return Where()
