# SPDX-License-Identifier: Apache-2.0
"""Defects of scale tensors that headers show: QC301 to QC308."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from verifier.corrupt.corruptor import (
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
    ids,
    quantized,
    target,
)  # fmt: skip
from verifier.corrupt.edit import QUANT_CONFIG, Folder, Place


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


def scale_2_as_bf16(folder: Folder) -> Place:
    """Cast a global scale to the model's dtype."""
    name = f"{target(folder, UPS)}.weight_scale_2"
    folder.store(name, folder.array(name).astype(ml_dtypes.bfloat16))
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


def padded(folder: Folder) -> Place:
    """Pad the rows of a block scale to a multiple of 128, a runtime layout."""
    name = block_scale(folder, target(folder))
    values = folder.array(name)
    rows = -(len(values) + 1) % 128 + 1
    folder.store(name, np.concatenate([values, np.zeros((rows, values.shape[1]), values.dtype)]))
    return folder.place(name)


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


SCALES: tuple[Corruptor, ...] = (
    Corruptor("QC301", "input-scale-of-one-expert", edit(input_scale_lost), formats=NVFP4),
    Corruptor("QC302", "weight-scale-2-lost", edit(scale_2_lost), formats=NVFP4),
    Corruptor("QC302", "block-scale-lost", edit(block_scale_lost)),
    Corruptor("QC303", "no-input-scales", edit(no_input_scales), formats=NVFP4),
    Corruptor("QC303", "tagged-weight-only", edit(tagged_weight_only), formats=NVFP4, severity="warning"),
    Corruptor("QC304", "block-scale-as-f32", edit(scale_as_f32)),
    Corruptor("QC304", "weight-scale-2-as-bf16", edit(scale_2_as_bf16), formats=NVFP4),
    Corruptor("QC305", "weight-not-packed", edit(not_packed), formats=NVFP4),
    Corruptor("QC306", "one-column-short", edit(column_short)),
    Corruptor("QC306", "half-the-columns", edit(half_width)),
    Corruptor("QC306", "padded-to-128-rows", edit(padded), also=ids("501")),
    Corruptor("QC306", "input-scale-a-vector", edit(input_scale_vector), formats=NVFP4),
    Corruptor("QC308", "group-size-32", edit(group_size_32), formats=frozenset({"nvfp4"})),
    Corruptor("QC308", "group-size-128", edit(group_size_128), formats=UNIFORM),
    Corruptor("QC308", "group-size-in-one-file", edit(group_size_in_file), formats=MXFP8, also=ids("406")),
    Corruptor("QC308", "group-size-of-one-entry", edit(group_size_of_entry), formats=MIXED),
)
