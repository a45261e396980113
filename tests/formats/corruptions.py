# SPDX-License-Identifier: Apache-2.0
"""The corruptions, as data: one edit of a clean checkpoint each, and which finding names it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from tests.formats.declarations import Config
from tests.formats.files import BF16, E4M3, E8M0, Array, Checkpoint
from tests.formats.formats import Format
from tests.formats.models import MODELS

FLOATS = (BF16, np.dtype(np.float16), np.dtype(np.float32))
POWERS = (np.dtype(np.uint8), E8M0)
LISTS = ("ignore", "exclude_modules", "modules_to_not_convert", "exclude", "llm_int8_skip_modules")
ABSENT = "no_layer_of_this_name"


class NotApplicable(Exception):
    """The format has no place for this corruption."""


Edit = Callable[[Checkpoint, Format], str]
"""Edits a copy of a clean checkpoint and returns the place: a part of the name of the tensor that a
finding must be about, '' for the declaration."""


@dataclass(frozen=True)
class Corruption:
    """One way to break a checkpoint.

    Attributes:
        name: its name.
        what: what is broken, for a table.
        edit: the edit.
        rules: the rules that name it, '' for any at the place.
        words: pattern that the finding's message must match.
        needs_base: whether nobody can know it without the base.
    """

    name: str
    what: str
    edit: Edit
    rules: str = ""
    words: str = ""
    needs_base: bool = False


# --- Tensors


def _name(fmt: Format, role: str, module: str = "") -> str:
    leaf = getattr(fmt.roles, role)
    if not leaf:
        raise NotApplicable
    return f"{module or fmt.target}{'_' if fmt.model == 'gpt_oss' else '.'}{leaf}"


def _find(checkpoint: Checkpoint, fmt: Format, role: str) -> str:
    """Return the name of the target's tensor of a role; a stack of experts stands for its parts."""
    name = _name(fmt, role)
    if name not in checkpoint.tensors:
        name = re.sub(r"experts\.\d+\.", "switch_mlp.", name)
    if name not in checkpoint.tensors:
        raise NotApplicable
    return name


def _module(fmt: Format, name: str) -> str:
    """Return the layer of a tensor; of a stack of experts the whole stack."""
    return name.rpartition(".")[0] if "switch_mlp." in name else fmt.target


def _values(role: str, change: Callable[[Array], Array]) -> Edit:
    """Return an edit of the values of the target's tensor of a role."""

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        name = _kv_name(checkpoint, fmt) if role == "kv" else _find(checkpoint, fmt, role)
        if change is negative and "biases" in str(checkpoint.tensors.keys()):
            raise NotApplicable
        checkpoint.tensors[name] = change(checkpoint.tensors[name])
        return fmt.target if fmt.model == "gpt_oss" else name

    return edit


def _kv_name(checkpoint: Checkpoint, fmt: Format) -> str:
    if fmt.kv is None:
        raise NotApplicable
    attention = MODELS[fmt.model].attention[-1]
    return next(n for n in checkpoint.tensors if n.startswith(attention) and _is_key_scale(n))


def _is_key_scale(name: str) -> bool:
    return name.endswith((".k_scale", "k_proj.output_scale"))


def _first(array: Array, value: Any) -> Array:
    """Return a copy whose middle element is another value."""
    changed = array.copy()
    changed.reshape(-1)[array.size // 2] = value
    return changed


def _byte(array: Array, value: int) -> Array:
    return _first(array.view(np.uint8), value).view(array.dtype)


def zero(array: Array) -> Array:
    """One zero; of powers of two, all of them: what a cast from float leaves."""
    return np.zeros_like(array) if array.dtype in POWERS else _first(array, 0)


def nan(array: Array) -> Array:
    """One NaN."""
    if array.dtype in POWERS:
        return _byte(array, 0xFF)
    if array.dtype == E4M3:
        return _byte(array, 0x7F)
    if array.dtype not in FLOATS:
        raise NotApplicable
    return _first(array, np.nan)


def inf(array: Array) -> Array:
    """One infinity."""
    if array.dtype not in FLOATS:
        raise NotApplicable
    return _first(array, np.inf)


def negative(array: Array) -> Array:
    """One value with its sign turned; affine integers of MLX may have such scales."""
    if array.dtype not in (*FLOATS, E4M3):
        raise NotApplicable
    value = array.reshape(-1)[array.size // 2].astype(np.float32)
    return _first(array, -value)


def recast(array: Array) -> Array:
    """Another dtype: float32 for a byte, int32 for a float."""
    return array.astype(np.float32 if array.dtype.itemsize == 1 else np.int32)


def half_cast(array: Array) -> Array:
    """BF16 for float32."""
    if array.dtype != np.float32:
        raise NotApplicable
    return array.astype(BF16)


def narrow(array: Array) -> Array:
    """One row or column less; two values for one."""
    if array.size == 1:
        return np.concatenate([array.reshape(1), array.reshape(1)])
    axis = max(a for a in range(array.ndim) if array.shape[a] > 1)
    return np.ascontiguousarray(np.delete(array, -1, axis))


def shorten(role: str) -> Edit:
    """Return an edit that takes the last row of the target's tensor."""

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        name = _find(checkpoint, fmt, role)
        array = checkpoint.tensors[name]
        axis = 1 if array.ndim > 2 else 0
        checkpoint.tensors[name] = np.ascontiguousarray(np.delete(array, -1, axis))
        return _module(fmt, name)

    return edit


def remove(role: str) -> Edit:
    """Return an edit that drops the target's tensor of a role."""

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        name = _kv_name(checkpoint, fmt) if role == "kv" else _find(checkpoint, fmt, role)
        del checkpoint.tensors[name]
        return name.rpartition(".")[0] if role == "kv" else _module(fmt, name)

    return edit


def remove_all(role: str) -> Edit:
    """Return an edit that drops every tensor of a role."""

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        leaf: str = getattr(fmt.roles, role)
        names = [n for n in checkpoint.tensors if leaf and n.endswith(f".{leaf}")]
        if not names:
            raise NotApplicable
        for name in names:
            del checkpoint.tensors[name]
        return leaf

    return edit


def missing_expert(checkpoint: Checkpoint, fmt: Format) -> str:
    """Drop all tensors of one expert."""
    expert = MODELS[fmt.model].expert
    names = [n for n in checkpoint.tensors if expert and n.startswith(f"{expert}.")]
    if not names:
        raise NotApplicable
    for name in names:
        del checkpoint.tensors[name]
    return expert


def swapped_codes(checkpoint: Checkpoint, fmt: Format) -> str:
    """Exchange the codes of two experts, which keep their own scales."""
    mine, other = (_name(fmt, "weight", m) for m in (fmt.target, MODELS[fmt.model].twin))
    tensors = checkpoint.tensors
    if mine not in tensors:
        raise NotApplicable
    tensors[mine], tensors[other] = tensors[other], tensors[mine]
    return ""


def lost_norm(checkpoint: Checkpoint, fmt: Format) -> str:
    """Drop a norm."""
    name = MODELS[fmt.model].norm
    del checkpoint.tensors[name]
    return name


def nan_norm(checkpoint: Checkpoint, fmt: Format) -> str:
    """Make one value of a norm NaN."""
    name = MODELS[fmt.model].norm
    checkpoint.tensors[name] = nan(checkpoint.tensors[name])
    return name


def wrong_zeros(known: bool) -> Edit:
    """Return an edit of one zero point; where the declaration says that all are the same, the
    edit is ``known``: of them all, as another version stores them.
    """

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        name = _find(checkpoint, fmt, "zeros")
        words = checkpoint.tensors[name]
        if fmt.symmetric != known:
            raise NotApplicable
        flipped = words.view(np.uint32)
        if known:
            bits = fmt_bits(checkpoint)
            ones = np.uint32(sum(1 << (bits * k) for k in range(32 // bits)))
            stored = int(flipped.reshape(-1)[0]) & ((1 << bits) - 1)
            changed = flipped - ones if stored in (8, 128) else flipped + ones
        else:
            changed = flipped ^ np.uint32(0x0F)
        checkpoint.tensors[name] = changed.view(words.dtype)
        return name if known else fmt.target

    return edit


def fmt_bits(checkpoint: Checkpoint) -> int:
    """Return the bits that a declaration gives."""
    return int(checkpoint.config["quantization_config"].get("bits", 4))


def wrong_order(checkpoint: Checkpoint, fmt: Format) -> str:
    """Put one input channel into a group that does not exist."""
    name = _find(checkpoint, fmt, "order")
    checkpoint.tensors[name] = _first(checkpoint.tensors[name], 99)
    return name


def wrong_shape(checkpoint: Checkpoint, fmt: Format) -> str:
    """Transpose the stored shape."""
    name = _find(checkpoint, fmt, "shape")
    checkpoint.tensors[name] = checkpoint.tensors[name][::-1].copy()
    return name


# --- Declarations


def parts(checkpoint: Checkpoint) -> Iterator[Config]:
    """Yield every declaration: each object that holds algorithm and exclusions."""
    for value in checkpoint.json.values():
        for holder in (value, value.get("text_config", {})):
            for key in ("quantization_config", "quantization"):
                if isinstance(holder.get(key), dict):
                    yield holder[key]
        if "checkpoint_format" in value:
            yield value


def lost_exclusion(checkpoint: Checkpoint, fmt: Format) -> str:
    """Exclude a layer no longer that is stored plain."""
    if not fmt.exclusion:
        raise NotApplicable
    for part in parts(checkpoint):
        for key in LISTS:
            if key in part:
                part[key] = [name for name in part[key] if name != fmt.exclusion]
        for key in ("extra_config", "dynamic"):
            for name in list(part.get(key, ())):
                if fmt.exclusion in name.replace("\\", ""):
                    del part[key][name]
    return fmt.exclusion.removeprefix("re:").strip(".*")


def extra_exclusion(checkpoint: Checkpoint, fmt: Format) -> str:
    """Exclude a layer that is stored quantized."""
    name = fmt.target
    for part in parts(checkpoint):
        keys = [key for key in LISTS if key in part]
        for key in keys:
            part[key] = [*part[key], name]
        if "extra_config" in part:
            part["extra_config"][name] = {"bits": 16, "data_type": "fp"}
        elif "dynamic" in part:
            part["dynamic"]["-:" + name.replace(".", r"\.") + "$"] = {}
        elif part.get("mode"):
            part[name] = False
        elif not keys:
            raise NotApplicable
    return name


def _changed(value: Any, key: str, change: Callable[[Any], Any]) -> bool:
    """Change every value of a key in nested objects and lists; return whether there was one."""
    found = False
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for name, item in list(items):
        new = change(item) if name == key else item
        if new is not item:
            value[name], found = new, True
        elif isinstance(item, dict | list) and name != "transform_config":
            found |= _changed(item, key, change)
    return found


OTHER_SIZES = {16: 32, 32: 64, 64: 32, 128: 64}


def _other_size(size: Any) -> Any:
    if isinstance(size, list):
        return [_other_size(n) for n in size]
    return OTHER_SIZES.get(size, size)


def _other(key: str, change: Callable[[Any], Any]) -> Edit:
    """Return an edit of a key in every declaration."""

    def edit(checkpoint: Checkpoint, fmt: Format) -> str:
        found = [_changed(part, key, change) for part in parts(checkpoint)]
        if not any(found):
            raise NotApplicable
        return ""

    return edit


def wrong_group_size(checkpoint: Checkpoint, fmt: Format) -> str:
    """Declare another group size, or another tile, than the scales have."""
    for key in ("weight_block_size", "block_structure", "block_size", "group_size"):
        try:
            return _other(key, _other_size)(checkpoint, fmt)
        except NotApplicable:
            continue
    raise NotApplicable


def wrong_bits(checkpoint: Checkpoint, fmt: Format) -> str:
    """Declare another number of bits than the codes have."""
    if fmt.roles.weight != "qweight" and not fmt.roles.shape:
        raise NotApplicable

    def change(bits: Any) -> Any:
        return {3: 4, 4: 8, 8: 4}.get(bits, bits)

    for key in ("bits", "num_bits"):
        try:
            return _other(key, change)(checkpoint, fmt)
        except NotApplicable:
            continue
    raise NotApplicable


def wrong_name(checkpoint: Checkpoint, fmt: Format) -> str:
    """Declare another format than the tensors have."""
    if fmt.misnamed is None:
        raise NotApplicable
    old, new = fmt.misnamed

    def walk(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: walk(v) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(v) for v in value]
        return new if value == old else value

    for part in parts(checkpoint):
        part |= walk(dict(part))
    return ""


# --- The table

_SCALE = "QC501 QC502 QC509 QC512"
_LOSS = "QC205 QC207 QC302 QC314 QC604"
_SHAPES = "QC208 QC305 QC306 QC307 QC308"


def _scalars(role: str, label: str, values: str, absent: str) -> Iterator[Corruption]:
    for name, change in (("zero", zero), ("nan", nan), ("inf", inf), ("negative", negative)):
        yield Corruption(f"{role}_{name}", f"{label}: {name}", _values(role, change), values)
    yield Corruption(f"{role}_missing", f"{label}: missing", remove(role), absent)
    yield Corruption(f"{role}_shape", f"{label}: shape", _values(role, narrow), "QC306 QC311 QC312")


CORRUPTIONS: tuple[Corruption, ...] = (
    Corruption("scale_zero", "weight scale: zero", _values("scale", zero), _SCALE),
    Corruption("scale_nan", "weight scale: NaN", _values("scale", nan), _SCALE),
    Corruption("scale_inf", "weight scale: infinite", _values("scale", inf), _SCALE),
    Corruption("scale_negative", "weight scale: negative", _values("scale", negative), _SCALE),
    Corruption("scale_missing", "weight scale: missing", remove("scale"), "QC302"),
    Corruption("scale_shape", "weight scale: shape", _values("scale", narrow), _SHAPES),
    Corruption("scale_dtype", "weight scale: dtype", _values("scale", recast), "QC304 QC315"),
    *_scalars("tensor_scale", "tensor scale", _SCALE, "QC302"),
    Corruption(
        "tensor_scale_dtype", "tensor scale: dtype", _values("tensor_scale", half_cast), "QC315"
    ),
    *_scalars("inputs", "input scale", "QC503", "QC301 QC303"),
    Corruption(
        "inputs_all_missing", "input scales: all missing", remove_all("inputs"), "QC301 QC303"
    ),
    *_scalars("smooth", "pre_quant_scale", "", "QC314 QC302"),
    *_scalars("kv", "KV scale", "", "QC312"),
    Corruption("zeros_wrong", "zero points of another version", wrong_zeros(True), "", "zero"),
    Corruption("zeros_moved", "zero points moved", wrong_zeros(False), "", needs_base=True),
    Corruption("zeros_missing", "zero points missing", remove("zeros"), "QC302"),
    Corruption("order_wrong", "g_idx out of range", wrong_order),
    Corruption("shape_wrong", "weight_shape transposed", wrong_shape),
    Corruption("weight_short", "weight: a row short", shorten("weight"), _SHAPES),
    Corruption("weight_missing", "weight: missing", remove("weight"), _LOSS),
    Corruption("expert_missing", "expert missing", missing_expert, "QC207 QC604"),
    Corruption(
        "codes_swapped",
        "codes of another expert",
        swapped_codes,
        "QC511 QC515 QC517",
        needs_base=True,
    ),
    Corruption("norm_lost", "norm lost", lost_norm, "QC205"),
    Corruption("norm_nan", "norm NaN", nan_norm, "QC508"),
    Corruption("exclusion_lost", "exclusion lost", lost_exclusion, "QC402"),
    Corruption("exclusion_extra", "exclusion extra", extra_exclusion, "QC401 QC410"),
    Corruption("group_size_wrong", "group size wrong", wrong_group_size, "QC308 QC306"),
    Corruption("bits_wrong", "bits wrong", wrong_bits, "QC408 QC305 QC308 QC208 QC518"),
    Corruption("name_wrong", "format name wrong", wrong_name, "QC305 QC408 QC410"),
)
BY_NAME = {c.name: c for c in CORRUPTIONS}
