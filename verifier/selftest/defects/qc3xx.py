# SPDX-License-Identifier: Apache-2.0
"""Defects of scale tensors that headers show: QC301 to QC315."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import (
    Array,
    Body,
    cast,
    declare,
    declare_algo,
    drop,
    edit_quant_config,
    transform,
)
from verifier.selftest.corruptor import (
    MIXED,
    MXFP8,
    NVFP4,
    ONLY_NVFP4,
    UNIFORM,
    Change,
    add,
    defect,
    on,
)
from verifier.selftest.editor import CONFIG, CheckpointEditor
from verifier.selftest.pick import (
    DOWNS,
    UPS,
    block_scale,
    expert_of,
    is_expert,
    part,
    quantized,
    scale,
    scale_leaf,
    target,
    weight,
)


def _to_1d(values: Array) -> Array:
    return values.reshape(1)


# QC301 to QC303

add("QC301", "input-scale-of-one-expert", drop(part("input_scale")), on(NVFP4))
add("QC302", "weight-scale-2-lost", drop(part("weight_scale_2", DOWNS)), on(NVFP4))
add("QC302", "block-scale-lost", drop(scale(DOWNS)))


@defect("QC303", on(NVFP4))
def no_input_scales(ckpt: CheckpointEditor) -> Where:
    """Drop all input scales: weight-only tensors with the W4A4 tag."""
    names = [n for n in ckpt.tensors() if n.endswith(".input_scale")]
    first = next(m for m in quantized(ckpt) if f"{m}.input_scale" in names)
    ckpt.drop(names)
    return Where(f"{first}.input_scale")


@defect("QC303", on(NVFP4), severity="warning")
def tagged_weight_only(ckpt: CheckpointEditor) -> Where:
    """Declare weight-only NVFP4 for tensors with input scales."""
    module = next(m for m, parts in ckpt.modules().items() if "input_scale" in parts)

    def edit(body: Body) -> None:
        for entry in (body, *body.get("quantized_layers", {}).values()):
            if entry.get("quant_algo") == "NVFP4":
                entry["quant_algo"] = "W4A16_NVFP4"

    declare(ckpt, edit)
    return ckpt.where(f"{module}.input_scale")


# QC304 to QC306

add("QC304", "block-scale-as-f32", cast(scale(), np.float32))


def _unpack(packed: Array) -> Array:
    """Return packed FP4 values as F8_E4M3, one per byte."""
    values = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    unpacked: Array = values.view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn)
    return unpacked


add("QC305", "weight-not-packed", transform(weight(), _unpack), on(NVFP4))


@defect("QC305", on(MXFP8))
def mxfp8_declared_nvfp4(ckpt: CheckpointEditor) -> Where:
    """Declare NVFP4 for MXFP8 tensors."""
    declare_algo("NVFP4")(ckpt)
    return ckpt.where(f"{quantized(ckpt)[0]}.weight")


add("QC306", "one-column-short", transform(scale(), lambda v: v[:, :-1]))
add("QC306", "half-the-columns", transform(scale(), lambda v: v[:, ::2]))


@defect("QC306", on(NVFP4))
def input_scale_per_row(ckpt: CheckpointEditor) -> Where:
    """Write an activation scale once per output row."""
    module = target(ckpt)
    rows = ckpt.modules()[module]["weight"].shape[0]
    name = f"{module}.input_scale"
    return ckpt.store(name, np.full(rows, ckpt.array(name), np.float32))


# QC307


def _ragged_scale(ckpt: CheckpointEditor) -> str:
    """Return the block scale of a module whose rows do not fill tiles of 128."""
    for module, parts in ckpt.modules().items():
        if scale_leaf(parts) and parts["weight"].shape[0] % 128:
            return block_scale(ckpt, module)
    raise LookupError("all modules have a multiple of 128 rows")


def _pad(values: Array) -> Array:
    """Pad a block scale to multiples of 128 rows and 4 columns."""
    rows, columns = -len(values) % 128, -values.shape[1] % 4
    return np.pad(values.view(np.uint8), ((0, rows), (0, columns))).view(values.dtype)


def _swizzle(values: Array) -> Array:
    """Arrange a block scale in 128x4 tiles, as cuBLAS reads it."""
    padded = _pad(values)
    high, wide = len(padded) // 128, padded.shape[1] // 4
    # Within a tile: row = 32 a + b, column = c; stored as [b, a, c].
    tiles: Array = padded.reshape(high, 4, 32, wide, 4).transpose(0, 3, 2, 1, 4)
    return tiles


def _swizzled_tiles(values: Array) -> Array:
    return np.ascontiguousarray(_swizzle(values)).reshape(-(-len(values) // 128), -1, 32, 16)


def _swizzled_flat(values: Array) -> Array:
    return np.ascontiguousarray(_swizzle(values)).reshape(-1)


add("QC307", "padded-to-128-rows", transform(_ragged_scale, _pad), also="501")
add("QC307", "swizzled-flat", transform(_ragged_scale, _swizzled_flat), also="501")
add("QC307", "swizzled-tiles", transform(_ragged_scale, _swizzled_tiles), also="501")


# QC308 and QC309


def _declare_group_size(size: int) -> Change:
    """Declare a group size at every level of both configs."""

    def edit_all(node: Any) -> None:
        for key, value in node.items():
            if key == "group_size" and value is not None:
                node[key] = size
            elif isinstance(value, dict):
                edit_all(value)

    def edit(body: Body) -> None:
        edit_all(body)
        body["group_size"] = size

    def change(ckpt: CheckpointEditor) -> Where:
        declare(ckpt, edit)
        return ckpt.where(block_scale(ckpt, quantized(ckpt)[0]))

    return change


add("QC308", "group-size-32", _declare_group_size(32), on(ONLY_NVFP4))
add("QC308", "group-size-128", _declare_group_size(128), on(UNIFORM))


@defect("QC308", on(MXFP8), also="406")
def group_size_in_one_file(ckpt: CheckpointEditor) -> Where:
    """Declare blocks of 16 for MXFP8 in hf_quant_config.json only."""
    edit_quant_config(lambda body: body.update({"group_size": 16}))(ckpt)
    return Where()


@defect("QC308", on(MIXED))
def group_size_of_one_entry(ckpt: CheckpointEditor) -> Where:
    """Declare blocks of 32 in one entry of ``quantized_layers``."""
    module = target(ckpt)
    declare(ckpt, lambda body: body["quantized_layers"][module].update({"group_size": 32}))
    return ckpt.where(block_scale(ckpt, module))


def _eight_columns_less(values: Array) -> Array:
    return values[:, : -(4 if values.dtype == np.uint8 else 8)]


add("QC309", "ragged-width", transform(weight(DOWNS), _eight_columns_less), also="208")


# QC310

_OTHER_NAMES = {"weight_scale": "weight_scale_inv", "weight_scale_inv": "weight_scale"}


def _mxfp8_scales(ckpt: CheckpointEditor) -> list[str]:
    modules = ckpt.modules()
    mxfp8 = [m for m in quantized(ckpt) if modules[m]["weight"].dtype == "F8_E4M3"]
    return [block_scale(ckpt, m) for m in mxfp8]


def _other_name(name: str) -> str:
    module, _, leaf = name.rpartition(".")
    return f"{module}.{_OTHER_NAMES[leaf]}"


def _respell(ckpt: CheckpointEditor, names: list[str]) -> Where:
    ckpt.rename({n: _other_name(n) for n in names})
    return ckpt.where(_other_name(names[0]))


@defect("QC310", on(MXFP8 | MIXED), severity="warning")
def one_scale_with_other_name(ckpt: CheckpointEditor) -> Where:
    """Take one MXFP8 scale from a checkpoint with a different vendor's convention."""
    return _respell(ckpt, _mxfp8_scales(ckpt)[2:3])


@defect("QC310", on(MXFP8 | MIXED), severity="warning")
def all_scales_with_other_name(ckpt: CheckpointEditor) -> Where:
    """Name all MXFP8 scales by a different vendor's convention."""
    names = _mxfp8_scales(ckpt)
    minimax = "minimax" in str(ckpt.json(CONFIG).get("model_type"))
    if minimax and all(n.endswith(".weight_scale") for n in names):
        raise LookupError("the other name is the vendor's own")
    return _respell(ckpt, names)


@defect("QC310", on(MXFP8 | MIXED), severity="warning")
def scale_under_both_names(ckpt: CheckpointEditor) -> Where:
    """Write one MXFP8 scale under both names."""
    name = _mxfp8_scales(ckpt)[2]
    ckpt.add(_other_name(name), ckpt.array(name))
    return Where(f"{name.rpartition('.')[0]}.weight_scale_inv")


# QC311, QC312 and QC315: scalars, and scales of the KV cache

for _name in ("weight_scale_2", "input_scale"):
    add(
        "QC311",
        f"one-{_name.replace('_', '-')}-1d",
        transform(part(_name, UPS), _to_1d),
        on(NVFP4),
        severity="warning",
    )
add(
    "QC315",
    "weight-scale-2-as-bf16",
    cast(part("weight_scale_2", UPS), ml_dtypes.bfloat16),
    on(NVFP4),
)
add("QC315", "input-scale-as-f16", cast(part("input_scale", UPS), np.float16), on(NVFP4))


def _declare_kv(body: Body) -> None:
    if "kv_cache_quant_algo" in body:
        body["kv_cache_quant_algo"] = "FP8"
    else:
        body["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}


def _add_kv_scales(ckpt: CheckpointEditor) -> list[str]:
    """Add FP8 KV scales to every attention layer, and return the attention modules."""
    keys = [m for m in ckpt.modules() if m.endswith(".k_proj") and "vision" not in m]
    layers = [m.removesuffix(".k_proj") for m in keys]
    for layer in layers:
        for kv in "kv":
            ckpt.add(f"{layer}.{kv}_proj.{kv}_scale", np.asarray(0.03, np.float32))
    return layers


def _with_kv_scales(
    change: Callable[[CheckpointEditor, list[str]], Where], *, declared: bool = True
) -> Change:
    """Add KV scales to a checkpoint, then change it."""

    def apply(ckpt: CheckpointEditor) -> Where:
        layers = _add_kv_scales(ckpt)
        if declared:
            declare(ckpt, _declare_kv)
        return change(ckpt, layers)

    return apply


def _last_v_scale(change: Callable[[Callable[[CheckpointEditor], str]], Change]) -> Change:
    """Change the ``v_scale`` of the last layer."""

    def apply(ckpt: CheckpointEditor, layers: list[str]) -> Where:
        return change(lambda _: f"{layers[-1]}.v_proj.v_scale")(ckpt)

    return _with_kv_scales(apply)


def _drop_first_layer(ckpt: CheckpointEditor, layers: list[str]) -> Where:
    names = [f"{layers[0]}.{kv}_proj.{kv}_scale" for kv in "kv"]
    ckpt.drop(names)
    return Where(names[0])


def _k_scales_on_query(ckpt: CheckpointEditor, layers: list[str]) -> Where:
    names = {f"{m}.k_proj.k_scale": f"{m}.q_proj.k_scale" for m in layers}
    ckpt.rename(names)
    return ckpt.where(next(iter(names.values())))


def _first_k_scale(ckpt: CheckpointEditor, layers: list[str]) -> Where:
    return ckpt.where(f"{layers[0]}.k_proj.k_scale")


add(
    "QC311",
    "one-kv-scale-1d",
    _last_v_scale(lambda pick: transform(pick, _to_1d)),
    severity="warning",
)
add("QC312", "values-of-one-layer", _last_v_scale(drop))
add("QC312", "one-layer", _with_kv_scales(_drop_first_layer))
add("QC312", "keys-on-the-query", _with_kv_scales(_k_scales_on_query))
add("QC312", "not-declared", _with_kv_scales(_first_k_scale, declared=False), severity="warning")
add("QC315", "kv-scale-as-bf16", _last_v_scale(lambda pick: cast(pick, ml_dtypes.bfloat16)))


# QC313 and QC314


@defect("QC313")
def scales_of_other_pass(ckpt: CheckpointEditor) -> Where:
    """Take a weight from the source, and its scales from the quantized model."""
    name = f"{target(ckpt)}.weight"
    shape = ckpt.tensors()[name].unpacked
    return ckpt.store(name, np.full(shape, 0.02, ml_dtypes.bfloat16))


@defect("QC313", severity="warning")
def tied_head_stored(ckpt: CheckpointEditor) -> Where:
    """Declare the head tied, and store one."""
    ckpt.edit_json(CONFIG, lambda config: config.update({"tie_word_embeddings": True}))
    return ckpt.where("lm_head.weight")


def _pre_quant_scales(missing: Callable[[str, int], bool]) -> Change:
    """Give every expert a ``pre_quant_scale``, as AWQ does, except for some (layer, expert)."""

    def change(ckpt: CheckpointEditor) -> Where:
        first = ""
        for module in filter(is_expert, quantized(ckpt)):
            container, number, _ = expert_of(module)
            if missing(container, number):
                first = first or module
                continue
            tensor = ckpt.modules()[module]["weight"]
            ones = np.ones(tensor.unpacked[1], ml_dtypes.bfloat16)
            ckpt.add(f"{module}.pre_quant_scale", ones, file=tensor.file)
        return Where(f"{first}.pre_quant_scale")

    return change


add(
    "QC314",
    "pre-quant-scale-of-one-expert",
    _pre_quant_scales(lambda container, number: number == 3),
    on(NVFP4, traits="experts"),
)
add(
    "QC314",
    "pre-quant-scale-of-one-layer",
    _pre_quant_scales(lambda container, number: ".1." in container),
    on(NVFP4, traits="experts"),
    severity="warning",
)
