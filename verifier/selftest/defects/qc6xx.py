# SPDX-License-Identifier: Apache-2.0
"""Defects of a reload and a round trip: QC604 to QC608."""

from __future__ import annotations

import ml_dtypes
import numpy as np

from verifier.findings import Where
from verifier.selftest.changes import (
    Array,
    declare,
    drop_module,
    exclude,
    exclude_sorted,
    parts_of,
    relabel,
    replace_parts,
    transform,
    unlist,
)
from verifier.selftest.corruptor import MIXED, MXFP8, Change, add, defect, on
from verifier.selftest.editor import CheckpointEditor
from verifier.selftest.encode import decoded, mxfp8
from verifier.selftest.pick import (
    DOWNS,
    UPS,
    block_scale,
    e8m0_leaf,
    embedding,
    expert_of,
    is_expert,
    norm,
    quantized,
    router,
    scale,
    sibling_of,
    target,
)


def _values(ckpt: CheckpointEditor, module: str) -> Array:
    return decoded(parts_of(ckpt, module))


def _one_expert(ckpt: CheckpointEditor) -> list[str]:
    """Return the projections of one expert."""
    container, number, _ = expert_of(target(ckpt, DOWNS))
    return [m for m in quantized(ckpt) if m.startswith(f"{container}.{number}.")]


# QC604: parts of a fused parameter, each valid by itself


@defect("QC604", on(MIXED, traits="experts"), also="605")
def expert_in_other_format(ckpt: CheckpointEditor) -> Where:
    """Take one expert from an MXFP8 export, and declare it so."""
    modules = _one_expert(ckpt)
    leaf = e8m0_leaf(ckpt)
    for module in modules:
        replace_parts(ckpt, module, mxfp8(_values(ckpt, module), leaf))
    entries = {m: {"quant_algo": "MXFP8"} for m in modules}
    declare(ckpt, lambda body: body["quantized_layers"].update(entries))
    return Where()


@defect("QC604", on(traits="experts"), also="605")
def expert_not_quantized(ckpt: CheckpointEditor) -> Where:
    """Leave one expert in BF16, excluded by name."""
    modules = _one_expert(ckpt)
    for module in modules:
        values = _values(ckpt, module).astype(ml_dtypes.bfloat16)
        replace_parts(ckpt, module, {"weight": values})
    unlist(ckpt, modules)
    exclude_sorted(ckpt, modules)
    return Where()


def _up_scale(ckpt: CheckpointEditor) -> str:
    return block_scale(ckpt, sibling_of(target(ckpt), UPS))


add("QC604", "scale-of-up-as-e8m0", relabel(_up_scale, "F8_E8M0"), on(MXFP8), also="304")
add(
    "QC604",
    "scale-of-an-expert-as-e8m0",
    relabel(scale(DOWNS), "F8_E8M0"),
    on(MXFP8, traits="experts"),
    also="304",
)


@defect("QC604", on(traits="experts"))
def smoothed_separately(ckpt: CheckpointEditor) -> Where:
    """Give every expert's gate and up a ``pre_quant_scale``, and one up a different one."""
    up = sibling_of(target(ckpt), UPS)
    experts = [m for m in quantized(ckpt) if is_expert(m)]
    for module in [m for m in experts if m.rpartition(".")[2] not in DOWNS]:
        weight = ckpt.tensors()[f"{module}.weight"]
        values = np.ones(weight.unpacked[1], ml_dtypes.bfloat16)
        if module == up:
            values[7] = 1.5
        ckpt.add(f"{module}.pre_quant_scale", values, file=weight.file)
    return Where(f"{up}.pre_quant_scale")


# QC605: pass-through tensors


def _flip_bit(ckpt: CheckpointEditor, name: str, element: int) -> Where:
    """Flip the lowest bit of one element."""
    size = ckpt.tensors()[name].itemsize
    raw = bytearray(ckpt.read(name)[element * size : (element + 1) * size])
    raw[0] ^= 1
    return ckpt.overwrite(name, element, bytes(raw))


@defect("QC605", on(needs="base|merged_from"))
def one_bit_of_the_embedding(ckpt: CheckpointEditor) -> Where:
    """Flip one bit of the embedding."""
    name = embedding(ckpt)
    return _flip_bit(ckpt, name, 3 * ckpt.tensors()[name].shape[1] + 17)


add(
    "QC605",
    "router-cast-there-and-back",
    transform(router, lambda values: values.astype(ml_dtypes.float8_e4m3fn).astype(values.dtype)),
    on(needs="base|merged_from"),
)


def _passed_through(ckpt: CheckpointEditor) -> str:
    """Return a quantized module that a mixed export keeps."""
    return next(m for m in quantized(ckpt) if m.endswith(".q_proj"))


@defect("QC605", on(MIXED, needs="merged_from"))
def one_value_of_a_kept_tensor(ckpt: CheckpointEditor) -> Where:
    """Flip one bit of a weight that a mixed export keeps."""
    name = f"{_passed_through(ckpt)}.weight"
    return _flip_bit(ckpt, name, ckpt.tensors()[name].shape[1] + 9)


@defect("QC605", on(MIXED, needs="merged_from"), also="517")
def one_scale_of_a_kept_tensor(ckpt: CheckpointEditor) -> Where:
    """Flip one bit of a block scale that a mixed export keeps."""
    name = block_scale(ckpt, _passed_through(ckpt))
    return _flip_bit(ckpt, name, ckpt.tensors()[name].shape[1] + 1)


# QC606 and QC608: what a model shows once it is built


def _without_location(change: Change) -> Change:
    """Make a change; the finding may point anywhere."""

    def apply(ckpt: CheckpointEditor) -> Where:
        change(ckpt)
        return Where()

    return apply


@defect("QC606", on(traits="vision"), severity="info")
def draft_head_not_loaded(ckpt: CheckpointEditor) -> Where:
    """Keep the draft head, correctly excluded, which transformers does not build."""
    name = "mtp.layers.0.eh_proj"
    width = ckpt.tensors()[embedding(ckpt)].shape[1]
    values = np.random.default_rng(606).normal(0, 0.02, (width, 2 * width))
    exclude(ckpt, name)
    return ckpt.add(f"{name}.weight", values.astype(ml_dtypes.bfloat16))


@defect("QC608", also="201")
def tensor_left_over(ckpt: CheckpointEditor) -> Where:
    """Ship a tensor that the model has no parameter for."""
    name = f"{norm(ckpt).removesuffix('.weight')}_copy.weight"
    return ckpt.add(name, ckpt.array(norm(ckpt)))


@defect("QC608", also="201 205")
def in_memory_name(ckpt: CheckpointEditor) -> Where:
    """Write one norm under the name of a different class's attribute."""
    name = norm(ckpt)
    ckpt.rename({name: name.replace("layernorm", "layer_norm")})
    return Where()


def _last_norm(ckpt: CheckpointEditor) -> str:
    endings = (".norm.weight", ".final_layernorm.weight")
    return next(n for n in ckpt.tensors() if n.endswith(endings))


def _fill_last_norm(value: float) -> Change:
    return _without_location(transform(_last_norm, lambda values: np.full_like(values, value)))


add(
    "QC608",
    "part-of-a-stack-lost",
    _without_location(drop_module(lambda ckpt: target(ckpt, DOWNS))),
    on(traits="experts"),
    also="207",
)
add("QC608", "norm-of-other-width", transform(norm, lambda values: values[::2].copy()), also="208")
add("QC608", "last-norm-overflows", _fill_last_norm(3e38), also="605")
add("QC608", "last-norm-is-nan", _fill_last_norm(float("nan")), also="508 605")
