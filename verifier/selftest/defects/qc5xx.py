# SPDX-License-Identifier: Apache-2.0
"""Defects of values, which only the bytes show: QC501 to QC519."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import (
    EXCLUSION_KEYS,
    Array,
    Body,
    cast,
    declare,
    f32,
    multiply_scalar,
    parts_of,
    set_all_scalars,
    set_scalar,
    transform,
    write_parts,
)
from verifier.selftest.corruptor import (
    GPTQ,
    MXFP8,
    NVFP4,
    ONLY_NVFP4,
    UNIFORM,
    Change,
    add,
    defect,
    kind_of,
    on,
)
from verifier.selftest.defects.qc4xx import declare_quantized
from verifier.selftest.editor import CheckpointEditor
from verifier.selftest.encode import decoded, mxfp8, nvfp4
from verifier.selftest.pick import (
    DOWNS,
    UPS,
    attention_head,
    block_scale,
    e8m0_leaf,
    embedding,
    expert_of,
    norm,
    projection_of,
    quantized,
    router,
    scale_leaf,
    sibling_of,
    target,
    up_part,
    weight,
)

_ROW, _BLOCK = 5, 2
_NAN, _INF = float("nan"), float("inf")
_E4M3 = ml_dtypes.float8_e4m3fn


def _scalar_location(ckpt: CheckpointEditor, name: str) -> Where:
    tensor = ckpt.tensors()[name]
    return Where(name, tensor.file, byte=tensor.offset)


def _at_block(ckpt: CheckpointEditor, name: str) -> int:
    """Return the index of the element of a block scale that is changed."""
    return _ROW * ckpt.tensors()[name].shape[1] + _BLOCK


# QC501 and QC502: weight scales


def _scale_byte(value: int) -> Change:
    """Overwrite one byte of a block scale."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = block_scale(ckpt, target(ckpt))
        return ckpt.overwrite(name, _at_block(ckpt, name), bytes([value]))

    return change


for _rule, _name, _byte in (
    ("QC501", "zero-block-scale", 0x00),
    ("QC501", "negative-zero-block-scale", 0x80),
    ("QC502", "nan-block-scale", 0x7F),
    ("QC502", "negative-nan-block-scale", 0xFF),
    ("QC502", "negative-block-scale", 0xB8),
):
    add(_rule, _name, _scale_byte(_byte), on(NVFP4))
add("QC502", "nan-e8m0-scale", _scale_byte(0xFF), on(MXFP8))
for _rule, _name, _value, _also in (
    ("QC501", "zero-weight-scale-2", 0.0, "515"),
    ("QC502", "nan-weight-scale-2", _NAN, ""),
    ("QC502", "infinite-weight-scale-2", _INF, ""),
    ("QC502", "negative-weight-scale-2", -1.0, "515"),
):
    _change = set_scalar("weight_scale_2", _value)
    add(_rule, _name, _change, on(NVFP4), also=_also)


@defect("QC501", on(NVFP4))
def underflown_block_scales(ckpt: CheckpointEditor) -> Where:
    """Zero the block scales of one row and keep the values: a clamp is missing."""
    name = block_scale(ckpt, target(ckpt, DOWNS))
    scales = ckpt.array(name).view(np.uint8)
    scales[1, :] = 0
    ckpt.overwrite(name, 0, scales.tobytes())
    return ckpt.where(name, scales.shape[1])


@defect("QC501", on(NVFP4), severity="warning")
def zero_scale_of_a_zero_block(ckpt: CheckpointEditor) -> Where:
    """Zero the values of a block and its scale: nothing more is lost."""
    module = target(ckpt)
    name = block_scale(ckpt, module)
    element = _at_block(ckpt, name)
    # Sixteen values in eight bytes; 0x8 is a negative zero.
    ckpt.overwrite(f"{module}.weight", element * 8, bytes([0x00, 0x80, 0x08, 0x88, 0, 0, 0, 0]))
    return ckpt.overwrite(name, element, b"\0")


@defect("QC502", on(NVFP4), also="501")
def zero_expert(ckpt: CheckpointEditor) -> Where:
    """Write what ModelOpt 0.47 makes of an all-zero expert: NaN block scales, a zero global one."""
    module = target(ckpt, DOWNS)
    name = block_scale(ckpt, module)
    ckpt.overwrite(f"{module}.weight_scale_2", 0, f32(0.0))
    return ckpt.overwrite(name, 0, b"\x7f" * ckpt.tensors()[name].nbytes)


# QC503: input scales

for _name, _value in (
    ("zero-input-scale", 0.0),
    ("nan-input-scale", _NAN),
    ("infinite-input-scale", _INF),
    ("denormal-input-scale", 1e-39),
    ("negative-input-scale", -1.0),
):
    add("QC503", _name, set_scalar("input_scale", _value), on(NVFP4))
add(
    "QC503",
    "input-scale-far-from-siblings",
    set_scalar("input_scale", 1e9),
    on(NVFP4, traits="experts"),
    severity="warning",
)


# QC504 to QC506: scales of fused projections


@defect("QC504", on(NVFP4, traits="experts"))
def up_on_its_own_maximum(ckpt: CheckpointEditor) -> Where:
    """Calibrate up on its own maximum: a different global scale, and block scales to match."""
    where = multiply_scalar(up_part("weight_scale_2"), 2)(ckpt)
    name = up_part("weight_scale")(ckpt)
    scales = ckpt.array(name).astype(np.float32) / 2
    ckpt.store(name, scales.astype(_E4M3))
    return where


@defect("QC504", on(NVFP4, traits="experts"))
def last_bit(ckpt: CheckpointEditor) -> Where:
    """Make the global scales of a pair differ in the last bit."""
    name = up_part("weight_scale_2")(ckpt)
    bits = int(ckpt.array(name).view(np.uint32)) ^ 1
    return ckpt.overwrite(name, 0, bits.to_bytes(4, "little"))


add(
    "QC504",
    "tenfold",
    multiply_scalar(up_part("weight_scale_2"), 10),
    on(NVFP4, traits="experts"),
    also="515",
)


@defect("QC505", on(ONLY_NVFP4))
def separately_calibrated_attention(ckpt: CheckpointEditor) -> Where:
    """Quantize q, k and v of one layer, each with its own maximum."""
    head = attention_head(ckpt)
    modules = [f"{head}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    for i, module in enumerate(modules):
        values = ckpt.array(f"{module}.weight").astype(np.float32)
        write_parts(ckpt, module, nvfp4(values, float(np.abs(values).max()) * (1 + i)))
    children = [m for m in ckpt.modules() if m.startswith(f"{head}.") and not m.endswith("norm")]
    others = [m for m in children if m not in modules]
    globs = (f"{head}*", f"{head}.*")

    def edit(body: Body) -> None:
        for key in EXCLUSION_KEYS:
            listed = body.get(key)
            if isinstance(listed, list):
                remaining = [p for p in listed if p not in modules and p not in globs]
                body[key] = remaining + (others if any(p in listed for p in globs) else [])

    declare(ckpt, edit)
    return _scalar_location(ckpt, f"{modules[1]}.weight_scale_2")


@defect("QC506", on(NVFP4, traits="experts"), severity="warning")
def input_scale_of_up(ckpt: CheckpointEditor) -> Where:
    """Give up a different activation scale than its gate, which reads the same input."""
    multiply_scalar(up_part("input_scale"), 1.25)(ckpt)
    return _scalar_location(ckpt, up_part("input_scale")(ckpt))


# QC507


def _copy_to_next_expert(*leaves: tuple[str, ...]) -> Change:
    """Copy projections of one expert over those of the next expert."""

    def change(ckpt: CheckpointEditor) -> Where:
        gate = target(ckpt)
        container, number, _ = expert_of(gate)
        copies = []
        for names in leaves:
            source = sibling_of(gate, names) if names else gate
            copies.append(f"{container}.{number + 1}.{source.rpartition('.')[2]}")
            write_parts(ckpt, copies[-1], parts_of(ckpt, source))
        return ckpt.where(f"{copies[0]}.weight")

    return change


add(
    "QC507",
    "expert-copied",
    _copy_to_next_expert((), UPS, DOWNS),
    on(traits="experts", needs="base"),
)
add("QC507", "down-copied", _copy_to_next_expert(DOWNS), on(traits="experts", needs="base"))


# QC508


def _norm_value(value: float) -> Change:
    """Overwrite one value of a norm."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = norm(ckpt)
        return ckpt.overwrite(name, 3, np.asarray(value, ckpt.array(name).dtype).tobytes())

    return change


add("QC508", "nan-in-a-norm", _norm_value(_NAN), also="605")
add("QC508", "infinity-in-a-norm", _norm_value(-_INF), also="605")


# QC509


def _invert_scale(ckpt: CheckpointEditor, module: str) -> str:
    """Store 1/x for the scale of one projection, and return its name."""
    parts = ckpt.modules()[module]
    name = f"{module}.weight_scale_2" if "weight_scale_2" in parts else block_scale(ckpt, module)
    values = ckpt.array(name)
    if values.dtype == np.float32:
        ckpt.store(name, (np.float32(1) / values).astype(np.float32).reshape(values.shape))
    else:
        ckpt.store(name, np.uint8(254) - values)
    return name


@defect("QC509")
def one_scale(ckpt: CheckpointEditor) -> Where:
    """Store 1/x for the scale of one projection."""
    return _scalar_location(ckpt, _invert_scale(ckpt, target(ckpt, DOWNS)))


@defect("QC509", also="605")
def every_scale(ckpt: CheckpointEditor) -> Where:
    """Store 1/x for every scale, as after renaming from the other convention."""
    names = [_invert_scale(ckpt, m) for m in quantized(ckpt)]
    return _scalar_location(ckpt, names[0])


@defect("QC509", on(NVFP4), severity="warning")
def activations(ckpt: CheckpointEditor) -> Where:
    """Store divisors as activation scales."""
    names = set_all_scalars(ckpt, "input_scale", 2688 / 6.5)
    return _scalar_location(ckpt, names[0])


# QC510 and QC511: order of values

add(
    "QC510",
    "nibbles-swapped",
    transform(weight(), lambda values: (values << 4) | (values >> 4)),
    on(NVFP4, needs="base"),
)


def _swap(ckpt: CheckpointEditor, first: str, second: str) -> Where:
    """Swap the tensors of two modules; return the location of the first in file order."""
    order = list(ckpt.modules())
    parts = parts_of(ckpt, first), parts_of(ckpt, second)
    write_parts(ckpt, first, parts[1])
    write_parts(ckpt, second, parts[0])
    return ckpt.where(f"{min(first, second, key=order.index)}.weight")


@defect("QC511", on(needs="base"))
def gate_and_up_swapped(ckpt: CheckpointEditor) -> Where:
    """Take gate and up of one expert from the wrong halves of the fused tensor."""
    gate = target(ckpt)
    return _swap(ckpt, gate, sibling_of(gate, UPS))


@defect("QC511", on(needs="base"))
def gate_and_up_interleaved(ckpt: CheckpointEditor) -> Where:
    """Split a fused projection with interleaved rows in halves."""
    gate = target(ckpt)
    up = sibling_of(gate, UPS)
    both = [decoded(parts_of(ckpt, m)) for m in (gate, up)]
    rows = len(both[0])
    interleaved = np.stack(both, axis=1).reshape(2 * rows, -1)
    amax = float(np.abs(interleaved).max())
    for module, values in ((gate, interleaved[:rows]), (up, interleaved[rows:])):
        stored = ckpt.modules()[module]
        if stored["weight"].dtype == "U8":
            parts = nvfp4(values, amax)
            del parts["input_scale"]
        else:
            parts = mxfp8(values, scale_leaf(stored) or "weight_scale")
        write_parts(ckpt, module, parts)
    return ckpt.where(f"{gate}.weight")


# QC512


@defect("QC512", on(MXFP8))
def scales_cast_to_bytes(ckpt: CheckpointEditor) -> Where:
    """Write 0, which is 2^-127, for every E8M0 scale of a tensor: floats were cast to bytes."""
    name = block_scale(ckpt, target(ckpt))
    ckpt.overwrite(name, 0, bytes(ckpt.tensors()[name].nbytes))
    return ckpt.where(name)


@defect("QC512", on(MXFP8), severity="warning")
def a_few_exponents(ckpt: CheckpointEditor) -> Where:
    """Write 0 for three exponents of nonzero blocks."""
    name = block_scale(ckpt, target(ckpt))
    ckpt.overwrite(name, 4, bytes(3))
    tensor = ckpt.tensors()[name]
    return Where(name, tensor.file, byte=tensor.offset + 4)


# QC513


def _quantize(ckpt: CheckpointEditor, module: str) -> Where:
    """Quantize an unquantized weight in the checkpoint's own format, and declare it so."""
    name = f"{module}.weight"
    values = ckpt.array(name)
    if kind_of(ckpt) == "nvfp4":
        parts, algo = nvfp4(values), "NVFP4"
    else:
        parts, algo = mxfp8(values, e8m0_leaf(ckpt)), "MXFP8"
    write_parts(ckpt, module, parts)
    declare_quantized(ckpt, [module], algo)
    return ckpt.where(name)


@defect("QC513", on(traits="experts"), severity="warning")
def router_quantized(ckpt: CheckpointEditor) -> Where:
    """Quantize a router with everything else."""
    return _quantize(ckpt, projection_of(ckpt, ".gate"))


@defect("QC513", severity="warning")
def embedding_quantized(ckpt: CheckpointEditor) -> Where:
    """Quantize the token embedding."""
    return _quantize(ckpt, embedding(ckpt).removesuffix(".weight"))


@defect("QC513", on(ONLY_NVFP4), severity="warning")
def head_quantized(ckpt: CheckpointEditor) -> Where:
    """Quantize the output head to four bits."""
    return _quantize(ckpt, projection_of(ckpt, "lm_head"))


# QC514


def _same_input_scale(value: float) -> Change:
    """Set every activation scale to one value, without a manifest that explains it."""

    def change(ckpt: CheckpointEditor) -> Where:
        set_all_scalars(ckpt, "input_scale", value)
        (ckpt.path / "ckptgate_manifest.json").unlink(missing_ok=True)
        return Where()

    return change


add("QC514", "fallback-everywhere", _same_input_scale(0.0078125), on(NVFP4), severity="warning")
add("QC514", "one-without-policy", _same_input_scale(1.0), on(NVFP4), severity="info")


# QC515


@defect("QC515", on(traits="experts", needs="base"))
def experts_swapped(ckpt: CheckpointEditor) -> Where:
    """Swap the down projections of two experts during unstacking."""
    down = target(ckpt, DOWNS)
    container, number, leaf = expert_of(down)
    return _swap(ckpt, down, f"{container}.{number ^ 1}.{leaf}")


@defect("QC515", on(needs="base"))
def scales_doubled(ckpt: CheckpointEditor) -> Where:
    """Double the block scales of a whole tensor."""
    module = target(ckpt)
    name = block_scale(ckpt, module)
    scales = ckpt.array(name)
    if scales.dtype == np.uint8:
        ckpt.store(name, scales + np.uint8(1))
    else:
        doubled = np.minimum(scales.astype(np.float32) * 2, np.float32(448))
        ckpt.store(name, doubled.astype(_E4M3))
    return ckpt.where(f"{module}.weight")


@defect("QC515", on(MXFP8, needs="base"))
def nan_value(ckpt: CheckpointEditor) -> Where:
    """Write one NaN (0x7F) into an F8_E4M3 weight."""
    name = weight()(ckpt)
    ckpt.overwrite(name, _at_block(ckpt, name), b"\x7f")
    return ckpt.where(name)


def _clear_bits(mask: int) -> Callable[[Array], Array]:
    """Keep the bits of a mask in every byte: a coarser grid than the format's."""
    return lambda values: (values.view(np.uint8) & np.uint8(mask)).view(values.dtype)


add(
    "QC515",
    "rows-rolled",
    transform(weight(), lambda values: np.roll(values, 1, axis=0)),
    on(needs="base"),
)
for _name, _mask, _formats in (("nvfp4", 0xEE, NVFP4), ("mxfp8", 0xFC, MXFP8)):
    add(
        "QC515",
        f"coarse-{_name}",
        transform(weight(), _clear_bits(_mask)),
        on(_formats, needs="base"),
        severity="warning",
        instead="517",
    )


# QC516

add(
    "QC516",
    "router-recast",
    cast(router, ml_dtypes.bfloat16),
    on(traits="f32", needs="base|merged_from"),
)
add("QC516", "norm-widened", cast(norm, np.float32), on(needs="base|merged_from"))
add("QC516", "embedding-as-f16", cast(embedding, np.float16), on(needs="base|merged_from"))


# QC517


def _swap_row_pairs(values: Array) -> Array:
    values[[0, 1, 2, 3]] = values[[2, 3, 0, 1]]
    return values


add("QC517", "rows-swapped", transform(weight(), _swap_row_pairs), on(needs="base"))


@defect("QC517", on(needs="base"))
def tail_not_written(ckpt: CheckpointEditor) -> Where:
    """Leave the last sixteenth of a weight unwritten: zeros."""
    name = weight(DOWNS)(ckpt)
    tensor = ckpt.tensors()[name]
    count = tensor.nbytes // 16
    ckpt.overwrite(name, tensor.nbytes - count, bytes(count))
    return ckpt.where(name)


@defect("QC517", on(traits="experts", needs="base"))
def rows_of_other_expert(ckpt: CheckpointEditor) -> Where:
    """Overwrite four rows, values and scales, with those of a different expert."""
    down = target(ckpt, DOWNS)
    container, number, leaf = expert_of(down)
    other = parts_of(ckpt, f"{container}.{number ^ 1}.{leaf}")
    for part, values in parts_of(ckpt, down).items():
        if values.ndim == 2:
            values[4:8] = other[part][4:8]
            ckpt.store(f"{down}.{part}", values)
    return ckpt.where(f"{down}.weight")


# QC518


def _integers(leaf: str) -> Callable[[CheckpointEditor], str]:
    """Return a selector of one GPTQ tensor of integers."""
    return lambda ckpt: next(n for n in ckpt.tensors() if n.endswith(f"down_proj.{leaf}"))


def _zeros_of_version_2(words: Array) -> Array:
    return np.full_like(words.view(np.uint32), 0x88888888).view(np.int32)


def _one_zero_point(words: Array) -> Array:
    words.reshape(-1).view(np.uint32)[3] ^= np.uint32(0x0F)
    return words


def _group_beyond(index: Array) -> Array:
    index[5] = len(index)
    return index


def _group_too_large(index: Array) -> Array:
    index[-1] = 0
    return index


for _name, _leaf, _edit in (
    ("zeros-of-version-2", "qzeros", _zeros_of_version_2),
    ("one-zero-point", "qzeros", _one_zero_point),
    ("group-beyond-the-last", "g_idx", _group_beyond),
    ("group-of-one-too-many", "g_idx", _group_too_large),
):
    add("QC518", _name, transform(_integers(_leaf), _edit), on(GPTQ), also="515 517")


# QC519


@defect("QC519", on(UNIFORM | GPTQ, needs="base"))
def weights_of_a_later_revision(ckpt: CheckpointEditor) -> Where:
    """Change all unquantized values by about 1%, as further training does."""
    rng = np.random.default_rng(519)
    modules = set(quantized(ckpt))
    for name, tensor in sorted(ckpt.tensors().items()):
        if name.rpartition(".")[0] in modules or tensor.dtype not in ("BF16", "F16", "F32"):
            continue
        ckpt.store(name, _moved_a_little(ckpt.array(name), rng))
    return Where()


def _moved_a_little(values: Array, rng: np.random.Generator) -> Array:
    factors = 1 + rng.normal(0, 0.01, values.shape)
    return (values.astype(np.float32) * factors).astype(values.dtype)
