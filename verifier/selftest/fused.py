# SPDX-License-Identifier: Apache-2.0
"""Defects of parts that loaders fuse or stack, each part sound by itself: QC604."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from verifier.selftest.corruptor import (
    DOWNS,
    MIXED,
    MXFP8,
    UPS,
    Corruptor,
    block_scale,
    declarations,
    edit,
    exclusions,
    expert_of,
    ids,
    is_expert,
    quantized,
    scale_leaf,
    sibling_of,
    target,
)
from verifier.selftest.edit import Folder, Place
from verifier.selftest.encode import Array, decoded, mxfp8

_EXPERTS = frozenset({"experts"})


def _values(folder: Folder, module: str) -> Array:
    return decoded({leaf: folder.array(t.name) for leaf, t in folder.modules()[module].items()})


def _rewrite(folder: Folder, module: str, parts: dict[str, Array]) -> None:
    """Give a module other tensors; what it had of other leaves goes."""
    known, file = folder.modules()[module], folder.tensors()[f"{module}.weight"].file
    folder.drop([t.name for leaf, t in known.items() if leaf not in parts])
    for leaf, values in parts.items():
        if leaf in known:
            folder.store(f"{module}.{leaf}", values)
        else:
            folder.add(f"{module}.{leaf}", values, file=file)


def _of_one_expert(folder: Folder) -> list[str]:
    down = target(folder, DOWNS)
    container, number, _ = expert_of(down)
    return [
        m for m in quantized(folder) if is_expert(m) and expert_of(m)[:2] == (container, number)
    ]


def expert_in_mxfp8(folder: Folder) -> Place:
    """Take one expert from an MXFP8 export, and say so in ``quantized_layers``."""
    modules = _of_one_expert(folder)
    leaf = next(s for p in folder.modules().values() if (s := scale_leaf(p)) and p[s].dtype == "U8")
    for module in modules:
        _rewrite(folder, module, mxfp8(_values(folder, module), leaf))

    def change(body: dict[str, Any]) -> None:
        body["quantized_layers"] |= {m: {"quant_algo": "MXFP8"} for m in modules}

    declarations(folder, change)
    return Place()


def expert_not_quantized(folder: Folder) -> Place:
    """Leave one expert in BF16, by name in the exclusions."""
    modules = _of_one_expert(folder)
    for module in modules:
        _rewrite(folder, module, {"weight": _values(folder, module).astype(ml_dtypes.bfloat16)})

    def change(body: dict[str, Any]) -> None:
        for module in modules:
            body.get("quantized_layers", {}).pop(module, None)

    declarations(folder, change)
    declarations(folder, exclusions(lambda listed: sorted([*listed, *modules])))
    return Place()


def scale_of_up_as_e8m0(folder: Folder) -> Place:
    """Give the scales of up the dtype F8_E8M0 where those of gate are U8; the bytes stay."""
    name = block_scale(folder, sibling_of(target(folder), UPS))
    return folder.replace(name, "F8_E8M0", folder.tensors()[name].shape, folder.read(name))


def scale_of_one_expert_as_e8m0(folder: Folder) -> Place:
    """Give the scales of one expert's down the dtype F8_E8M0; the bytes stay."""
    name = block_scale(folder, target(folder, DOWNS))
    return folder.replace(name, "F8_E8M0", folder.tensors()[name].shape, folder.read(name))


def _smoothed(value: float | None) -> Callable[[Folder], Place]:
    """Return a change that gives every gate and up of an expert a ``pre_quant_scale``, one up
    another one or none.
    """

    def apply(folder: Folder) -> Place:
        gate = target(folder)
        odd = sibling_of(gate, UPS)
        for module in [
            m for m in quantized(folder) if is_expert(m) and m.rpartition(".")[2] not in DOWNS
        ]:
            weight = folder.tensors()[f"{module}.weight"]
            scale = np.ones(
                weight.shape[1] * (2 if weight.dtype == "U8" else 1), ml_dtypes.bfloat16
            )
            if module == odd and value is not None:
                scale[7] = value
            if module != odd or value is not None:
                folder.add(f"{module}.pre_quant_scale", scale, file=weight.file)
        return Place(f"{odd}.pre_quant_scale")

    return apply


FUSED: tuple[Corruptor, ...] = (
    Corruptor(
        "QC604",
        "expert-in-another-format",
        edit(expert_in_mxfp8),
        "payload",
        formats=MIXED,
        traits=_EXPERTS,
        also=ids("605"),
    ),
    Corruptor(
        "QC604",
        "expert-not-quantized",
        edit(expert_not_quantized),
        "payload",
        traits=_EXPERTS,
        also=ids("605"),
    ),
    Corruptor("QC604", "scale-of-up-as-e8m0", edit(scale_of_up_as_e8m0), "payload", formats=MXFP8),
    Corruptor(
        "QC604",
        "scale-of-an-expert-as-e8m0",
        edit(scale_of_one_expert_as_e8m0),
        "payload",
        formats=MXFP8,
        traits=_EXPERTS,
    ),
    Corruptor("QC604", "smoothed-apart", edit(_smoothed(1.5)), "payload", traits=_EXPERTS),
)
