# SPDX-License-Identifier: Apache-2.0
"""Defects of scale tensors that headers show: QC301 to QC315."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from verifier.selftest.corruptor import (
    DOWNS,
    MIXED,
    MXFP8,
    NVFP4,
    UNIFORM,
    UPS,
    Corruptor,
    block_scale,
    declarations,
    edit,
    expert_of,
    ids,
    is_expert,
    quantized,
    scale_leaf,
    target,
)
from verifier.selftest.edit import CONFIG, QUANT_CONFIG, Folder, Place


def input_scale_lost(folder: Folder) -> Place:
    """Leave out the input_scale of one expert, to which calibration routed no token."""
    name = f"{target(folder)}.input_scale"
    folder.drop([name])
    return Place(name)


def scale_2_lost(folder: Folder) -> Place:
    """Drop the global scale of one projection."""
    name = f"{target(folder, DOWNS)}.weight_scale_2"
    folder.drop([name])
    return Place(name)


def block_scale_lost(folder: Folder) -> Place:
    """Drop the block scale of one projection."""
    name = block_scale(folder, target(folder, DOWNS))
    folder.drop([name])
    return Place(name)


def no_input_scales(folder: Folder) -> Place:
    """Drop all input scales: weight-only tensors under the W4A4 tag."""
    names = [n for n in folder.tensors() if n.endswith(".input_scale")]
    first = next(f"{m}.input_scale" for m in quantized(folder) if f"{m}.input_scale" in names)
    folder.drop(names)
    return Place(first)


def tagged_weight_only(folder: Folder) -> Place:
    """Declare weight-only NVFP4 over tensors with input scales."""
    module = next(m for m, p in folder.modules().items() if "input_scale" in p)

    def change(body: dict[str, Any]) -> None:
        if body.get("quant_algo") == "NVFP4":
            body["quant_algo"] = "W4A16_NVFP4"
        for entry in body.get("quantized_layers", {}).values():
            if entry["quant_algo"] == "NVFP4":
                entry["quant_algo"] = "W4A16_NVFP4"

    declarations(folder, change)
    return folder.place(f"{module}.input_scale")


def scale_as_f32(folder: Folder) -> Place:
    """Save a block scale as float32: values for NVFP4, codes for MXFP8."""
    name = block_scale(folder, target(folder))
    folder.store(name, folder.array(name).astype(np.float32))
    return folder.place(name)


def not_packed(folder: Folder) -> Place:
    """Lose the packing: one F8_E4M3 code a byte, declared NVFP4."""
    name = f"{target(folder)}.weight"
    packed = folder.array(name)
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(packed.shape[0], -1)
    folder.store(name, codes.view(ml_dtypes.float4_e2m1fn).astype(ml_dtypes.float8_e4m3fn))
    return folder.place(name)


def column_short(folder: Folder) -> Place:
    """Drop the last column of a block scale."""
    name = block_scale(folder, target(folder))
    folder.store(name, np.ascontiguousarray(folder.array(name)[:, :-1]))
    return folder.place(name)


def half_width(folder: Folder) -> Place:
    """Keep half the columns of a block scale, as if computed from packed bytes."""
    name = block_scale(folder, target(folder))
    folder.store(name, np.ascontiguousarray(folder.array(name)[:, ::2]))
    return folder.place(name)


def _ragged(folder: Folder) -> str:
    """Return the block scale of a module whose rows fill no tile of 128."""
    return next(
        block_scale(folder, m)
        for m, p in folder.modules().items()
        if scale_leaf(p) and p["weight"].shape[0] % 128
    )


def _pad(values: npt.NDArray[Any], rows: int, columns: int) -> npt.NDArray[Any]:
    high, wide = -len(values) % rows, -values.shape[1] % columns
    return np.pad(values.view(np.uint8), ((0, high), (0, wide))).view(values.dtype)


def padded(folder: Folder) -> Place:
    """Pad the rows of a block scale to a multiple of 128, a runtime layout."""
    name = _ragged(folder)
    return folder.store(name, _pad(folder.array(name), 128, 4))


def swizzled(folder: Folder) -> Place:
    """Write a block scale as the flat sequence of 128x4 tiles that cuBLAS reads."""
    name = _ragged(folder)
    tiles = _pad(folder.array(name), 128, 4)
    high, wide = len(tiles) // 128, tiles.shape[1] // 4
    # Within a tile: row = 32 a + b, column = c; stored as [b, a, c].
    turned = tiles.reshape(high, 4, 32, wide, 4).transpose(0, 3, 2, 1, 4)
    return folder.store(name, np.ascontiguousarray(turned).reshape(-1))


def tiled(folder: Folder) -> Place:
    """Write a block scale as [tiles, tiles, 32, 16]."""
    place = swizzled(folder)
    name = str(place.tensor)
    tensor = folder.modules()[name.rpartition(".")[0]]["weight"]
    values = folder.array(name)
    high = -(-tensor.shape[0] // 128)
    return folder.store(name, values.reshape(high, -1, 32, 16))


def input_scale_vector(folder: Folder) -> Place:
    """Write an activation scale once for each output row."""
    module = target(folder)
    rows = folder.modules()[module]["weight"].shape[0]
    name = f"{module}.input_scale"
    folder.store(name, np.full(rows, folder.array(name), np.float32))
    return folder.place(name)


def _group_size(folder: Folder, size: int) -> Place:
    def change(node: Any) -> None:
        for key, value in node.items():
            if key == "group_size" and value is not None:
                node[key] = size
            elif isinstance(value, dict):
                change(value)

    def both(body: dict[str, Any]) -> None:
        change(body)
        body["group_size"] = size

    declarations(folder, both)
    return folder.place(block_scale(folder, quantized(folder)[0]))


def group_size_32(folder: Folder) -> Place:
    """Declare blocks of 32 over scales for 16."""
    return _group_size(folder, 32)


def group_size_128(folder: Folder) -> Place:
    """Declare blocks of 128, the habit of integer formats."""
    return _group_size(folder, 128)


def group_size_in_file(folder: Folder) -> Place:
    """Declare blocks of 16 over MXFP8 in hf_quant_config.json, where config.json states no size."""
    folder.edit_json(QUANT_CONFIG, lambda value: value["quantization"].update({"group_size": 16}))
    return Place()


def group_size_of_entry(folder: Folder) -> Place:
    """Declare blocks of 32 in one entry of ``quantized_layers``."""
    module = target(folder)
    declarations(folder, lambda body: body["quantized_layers"][module].update({"group_size": 32}))
    return folder.place(block_scale(folder, module))


def ragged_width(folder: Folder) -> Place:
    """Quantize a projection whose input width is no multiple of the block: eight columns less."""
    name = f"{target(folder, DOWNS)}.weight"
    codes = folder.array(name)
    return folder.store(
        name, np.ascontiguousarray(codes[:, : -(4 if codes.dtype == np.uint8 else 8)])
    )


_SPELLINGS = {"weight_scale": "weight_scale_inv", "weight_scale_inv": "weight_scale"}


def _mxfp8(folder: Folder) -> list[str]:
    """Return the names of the E8M0 scales."""
    found = (
        block_scale(folder, m)
        for m, p in folder.modules().items()
        if scale_leaf(p) and p["weight"].dtype == "F8_E4M3"
    )
    return list(found)


def _respell(folder: Folder, names: list[str]) -> Place:
    made = {n: f"{n.rpartition('.')[0]}.{_SPELLINGS[n.rpartition('.')[2]]}" for n in names}
    folder.rename(made)
    return folder.place(made[names[0]])


def one_spelled_otherwise(folder: Folder) -> Place:
    """Take one MXFP8 scale from a checkpoint of the other vendor's convention."""
    return _respell(folder, _mxfp8(folder)[2:3])


def all_spelled_otherwise(folder: Folder) -> Place:
    """Name all MXFP8 scales by the other vendor's convention."""
    minimax = "minimax" in str(folder.json(CONFIG).get("model_type"))
    if minimax and all(n.endswith(".weight_scale") for n in _mxfp8(folder)):
        raise LookupError("the vendor's own convention is the other one")
    return _respell(folder, _mxfp8(folder))


def spelled_both_ways(folder: Folder) -> Place:
    """Write one MXFP8 scale under both names."""
    name = _mxfp8(folder)[2]
    other = f"{name.rpartition('.')[0]}.{_SPELLINGS[name.rpartition('.')[2]]}"
    folder.add(other, folder.array(name))
    return Place(f"{name.rpartition('.')[0]}.weight_scale_inv")


def _longer(leaf: str) -> Callable[[Folder], Place]:
    """Return a change of one scalar's shape from [] to [1]."""

    def apply(folder: Folder) -> Place:
        name = f"{target(folder, UPS)}.{leaf}"
        return folder.store(name, folder.array(name).reshape(1))

    return apply


def _as(leaf: str, dtype: npt.DTypeLike) -> Callable[[Folder], Place]:
    """Return a cast of one scalar."""

    def apply(folder: Folder) -> Place:
        name = f"{target(folder, UPS)}.{leaf}"
        return folder.store(name, folder.array(name).astype(dtype))

    return apply


def _kv(
    change: Callable[[Folder, list[str]], Place], declared: bool = True
) -> Callable[[Path], Place]:
    """Return a change of a checkpoint that has FP8 KV scales; ``change`` is given the attention
    modules.
    """

    def declare(body: dict[str, Any]) -> None:
        if "kv_cache_quant_algo" in body:
            body["kv_cache_quant_algo"] = "FP8"
        else:
            body["kv_cache_scheme"] = {"dynamic": False, "num_bits": 8, "type": "float"}

    def apply(folder: Folder) -> Place:
        layers = [
            m.removesuffix(".k_proj")
            for m in folder.modules()
            if m.endswith(".k_proj") and "vision" not in m
        ]
        for layer in layers:
            for one in "kv":
                folder.add(f"{layer}.{one}_proj.{one}_scale", np.asarray(0.03, np.float32))
        if declared:
            declarations(folder, declare)
        return change(folder, layers)

    return edit(apply)


def _kv_lost(folder: Folder, layers: list[str]) -> Place:
    """Leave one layer's values without a scale."""
    name = f"{layers[-1]}.v_proj.v_scale"
    folder.drop([name])
    return Place(name)


def _kv_layer_lost(folder: Folder, layers: list[str]) -> Place:
    """Leave one layer without both scales."""
    names = [f"{layers[0]}.{one}_proj.{one}_scale" for one in "kv"]
    folder.drop(names)
    return Place(names[0])


def _kv_misplaced(folder: Folder, layers: list[str]) -> Place:
    """Write the scales of keys on the query projection."""
    names = {f"{m}.k_proj.k_scale": f"{m}.q_proj.k_scale" for m in layers}
    folder.rename(names)
    return folder.place(next(iter(names.values())))


def _kv_kept(folder: Folder, layers: list[str]) -> Place:
    return folder.place(f"{layers[0]}.k_proj.k_scale")


def _kv_as_bf16(folder: Folder, layers: list[str]) -> Place:
    name = f"{layers[-1]}.v_proj.v_scale"
    return folder.store(name, folder.array(name).astype(ml_dtypes.bfloat16))


def _kv_longer(folder: Folder, layers: list[str]) -> Place:
    name = f"{layers[-1]}.v_proj.v_scale"
    return folder.store(name, folder.array(name).reshape(1))


def scales_of_another_pass(folder: Folder) -> Place:
    """Take a weight from the source and its scales from the quantized model."""
    name = f"{target(folder)}.weight"
    codes = folder.array(name)
    shape = (len(codes), codes.shape[1] * (2 if codes.dtype == np.uint8 else 1))
    return folder.store(name, np.full(shape, 0.02, ml_dtypes.bfloat16))


def tied_head_stored(folder: Folder) -> Place:
    """Declare the head tied, and store one."""
    folder.edit_json(CONFIG, lambda value: value.update({"tie_word_embeddings": True}))
    return folder.place("lm_head.weight")


def _smoothed(lost: Callable[[str, int], bool]) -> Callable[[Folder], Place]:
    """Return the loss of ``pre_quant_scale`` for some (layer, expert) where AWQ gave one to every
    expert.
    """

    def apply(folder: Folder) -> Place:
        experts = [m for m in quantized(folder) if is_expert(m)]
        missing = ""
        for module in experts:
            container, number, _ = expert_of(module)
            if lost(container, number):
                missing = missing or module
            else:
                weight = folder.modules()[module]["weight"]
                width = weight.shape[1] * (2 if weight.dtype == "U8" else 1)
                folder.add(
                    f"{module}.pre_quant_scale",
                    np.ones(width, ml_dtypes.bfloat16),
                    file=weight.file,
                )
        return Place(f"{missing}.pre_quant_scale")

    return apply


_EXPERTS = frozenset({"experts"})
SCALES: tuple[Corruptor, ...] = (
    Corruptor("QC301", "input-scale-of-one-expert", edit(input_scale_lost), formats=NVFP4),
    Corruptor("QC302", "weight-scale-2-lost", edit(scale_2_lost), formats=NVFP4),
    Corruptor("QC302", "block-scale-lost", edit(block_scale_lost)),
    Corruptor("QC303", "no-input-scales", edit(no_input_scales), formats=NVFP4),
    Corruptor(
        "QC303", "tagged-weight-only", edit(tagged_weight_only), formats=NVFP4, severity="warning"
    ),
    Corruptor("QC304", "block-scale-as-f32", edit(scale_as_f32)),
    Corruptor("QC305", "weight-not-packed", edit(not_packed), formats=NVFP4),
    Corruptor("QC306", "one-column-short", edit(column_short)),
    Corruptor("QC306", "half-the-columns", edit(half_width)),
    Corruptor("QC306", "input-scale-a-vector", edit(input_scale_vector), formats=NVFP4),
    Corruptor("QC307", "padded-to-128-rows", edit(padded), also=ids("501")),
    Corruptor("QC307", "swizzled-flat", edit(swizzled), also=ids("501")),
    Corruptor("QC307", "swizzled-tiles", edit(tiled), also=ids("501")),
    Corruptor("QC308", "group-size-32", edit(group_size_32), formats=frozenset({"nvfp4"})),
    Corruptor("QC308", "group-size-128", edit(group_size_128), formats=UNIFORM),
    Corruptor(
        "QC308", "group-size-in-one-file", edit(group_size_in_file), formats=MXFP8, also=ids("406")
    ),
    Corruptor("QC308", "group-size-of-one-entry", edit(group_size_of_entry), formats=MIXED),
    Corruptor("QC309", "ragged-width", edit(ragged_width), also=ids("208")),
    Corruptor(
        "QC310",
        "one-spelled-otherwise",
        edit(one_spelled_otherwise),
        formats=MXFP8 | MIXED,
        severity="warning",
    ),
    Corruptor(
        "QC310",
        "all-spelled-otherwise",
        edit(all_spelled_otherwise),
        formats=MXFP8 | MIXED,
        severity="warning",
    ),
    Corruptor(
        "QC310",
        "spelled-both-ways",
        edit(spelled_both_ways),
        formats=MXFP8 | MIXED,
        severity="warning",
    ),
    Corruptor(
        "QC311",
        "one-weight-scale-2-longer",
        edit(_longer("weight_scale_2")),
        formats=NVFP4,
        severity="warning",
    ),
    Corruptor(
        "QC311",
        "one-input-scale-longer",
        edit(_longer("input_scale")),
        formats=NVFP4,
        severity="warning",
    ),
    Corruptor("QC311", "one-kv-scale-longer", _kv(_kv_longer), severity="warning"),
    Corruptor("QC312", "values-of-one-layer", _kv(_kv_lost)),
    Corruptor("QC312", "one-layer", _kv(_kv_layer_lost)),
    Corruptor("QC312", "keys-on-the-query", _kv(_kv_misplaced)),
    Corruptor("QC312", "not-declared", _kv(_kv_kept, declared=False), severity="warning"),
    Corruptor("QC313", "scales-of-another-pass", edit(scales_of_another_pass)),
    Corruptor("QC313", "tied-head-stored", edit(tied_head_stored), severity="warning"),
    Corruptor(
        "QC314",
        "pre-quant-scale-of-one-expert",
        edit(_smoothed(lambda container, number: number == 3)),
        formats=NVFP4,
        traits=_EXPERTS,
    ),
    Corruptor(
        "QC314",
        "pre-quant-scale-of-one-layer",
        edit(_smoothed(lambda container, number: ".1." in container)),
        formats=NVFP4,
        traits=_EXPERTS,
        severity="warning",
    ),
    Corruptor(
        "QC315",
        "weight-scale-2-as-bf16",
        edit(_as("weight_scale_2", ml_dtypes.bfloat16)),
        formats=NVFP4,
    ),
    Corruptor("QC315", "input-scale-as-f16", edit(_as("input_scale", np.float16)), formats=NVFP4),
    Corruptor("QC315", "kv-scale-as-bf16", _kv(_kv_as_bf16)),
)
