# SPDX-License-Identifier: Apache-2.0
"""Defects of values that compare tensors with one another or with a base: QC505 to QC517."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Literal

import numpy as np

from verifier.selftest.corruptor import (
    DOWNS,
    KINDS,
    LISTS,
    MXFP8,
    NVFP4,
    UPS,
    Corruptor,
    Kind,
    block_scale,
    declarations,
    edit,
    expert_of,
    ids,
    quantized,
    scale_leaf,
    sibling_of,
    target,
)
from verifier.selftest.edit import Folder, Place
from verifier.selftest.encode import Array, decoded, mxfp8, nvfp4

MANIFEST = "ckptgate_manifest.json"


def _write(folder: Folder, module: str, parts: dict[str, Array]) -> None:
    """Store tensors of a module beside its weight; those that it does not have yet are added."""
    known, file = folder.modules()[module], folder.tensors()[f"{module}.weight"].file
    for leaf, values in parts.items():
        if leaf in known:
            folder.store(f"{module}.{leaf}", values)
        else:
            folder.add(f"{module}.{leaf}", values, file=file)


def _parts(folder: Folder, module: str) -> dict[str, Array]:
    return {leaf: folder.array(t.name) for leaf, t in folder.modules()[module].items()}


def _scalar_place(folder: Folder, name: str) -> Place:
    return Place(name, folder.tensors()[name].file, byte=folder.tensors()[name].offset)


def attention_each_on_its_own(folder: Folder) -> Place:
    """Quantize q, k and v of one layer, each on its own maximum."""
    head = next(m for m in folder.modules() if m.endswith(".q_proj")).removesuffix(".q_proj")
    modules = [f"{head}.{leaf}" for leaf in ("q_proj", "k_proj", "v_proj")]
    for i, module in enumerate(modules):
        values = folder.array(f"{module}.weight").astype(np.float32)
        _write(folder, module, nvfp4(values, float(np.abs(values).max()) * (1 + i)))
    globs = [f"{head}*", f"{head}.*"]
    others = [
        m
        for m in folder.modules()
        if m.startswith(f"{head}.") and m not in modules and not m.endswith("norm")
    ]

    def change(body: dict[str, object]) -> None:
        for key in LISTS:
            listed = body.get(key)
            if isinstance(listed, list):
                kept = [p for p in listed if p not in modules and p not in globs]
                body[key] = kept + (
                    others if len(kept) < len(listed) and any(p in listed for p in globs) else []
                )

    declarations(folder, change)
    return _scalar_place(folder, f"{modules[1]}.weight_scale_2")


def input_scale_of_up(folder: Folder) -> Place:
    """Give up another activation scale than its gate, which reads the same input."""
    name = f"{sibling_of(target(folder), UPS)}.input_scale"
    folder.overwrite(name, 0, struct.pack("<f", float(folder.array(name)) * 1.25))
    return _scalar_place(folder, name)


def _copied(leaves: Iterable[str]) -> Callable[[Folder], Place]:
    """Return the copy of one expert's projections over the next expert's."""

    def apply(folder: Folder) -> Place:
        gate = target(folder)
        container, number, own = expert_of(gate)
        first = ""
        for leaf in leaves:
            module = (
                own
                if leaf == "gate"
                else sibling_of(gate, UPS if leaf == "up" else DOWNS).rpartition(".")[2]
            )
            for part, values in _parts(folder, f"{container}.{number}.{module}").items():
                folder.store(f"{container}.{number + 1}.{module}.{part}", values)
            first = first or f"{container}.{number + 1}.{module}.weight"
        return folder.place(first)

    return apply


def _inverted_scale(folder: Folder, module: str) -> str:
    parts = folder.modules()[module]
    name = f"{module}.weight_scale_2" if "weight_scale_2" in parts else block_scale(folder, module)
    values = folder.array(name)
    if values.dtype == np.float32:
        folder.store(name, (np.float32(1) / values).astype(np.float32).reshape(values.shape))
    else:
        folder.store(name, np.uint8(254) - values)
    return name


def one_scale_inverted(folder: Folder) -> Place:
    """Store 1/x for the scale of one projection."""
    return _scalar_place(folder, _inverted_scale(folder, target(folder, DOWNS)))


def all_scales_inverted(folder: Folder) -> Place:
    """Store 1/x for every scale, as after a rename from the other convention."""
    names = [_inverted_scale(folder, m) for m in quantized(folder)]
    return _scalar_place(folder, names[0])


def activations_inverted(folder: Folder) -> Place:
    """Store divisors for the activation scales."""
    names = [n for n in folder.tensors() if n.endswith(".input_scale")]
    for name in names:
        folder.overwrite(name, 0, struct.pack("<f", 2688 / 6.5))
    return _scalar_place(folder, names[0])


def _encoded(folder: Folder, module: str, values: Array, amax: float) -> None:
    leaf = scale_leaf(folder.modules()[module]) or "weight_scale"
    packed = folder.modules()[module]["weight"].dtype == "U8"
    parts = nvfp4(values, amax) if packed else mxfp8(values, leaf)
    parts.pop("input_scale", None)
    _write(folder, module, parts)


def gate_and_up_interleaved(folder: Folder) -> Place:
    """Split a fused projection in halves whose rows are gate and up in turn."""
    gate = target(folder)
    up = sibling_of(gate, UPS)
    both = [decoded(_parts(folder, m)) for m in (gate, up)]
    woven = np.stack(both, axis=1).reshape(2 * len(both[0]), -1)
    amax = float(np.abs(woven).max())
    _encoded(folder, gate, woven[: len(both[0])], amax)
    _encoded(folder, up, woven[len(both[0]) :], amax)
    return folder.place(f"{gate}.weight")


def a_few_exponents_zero(folder: Folder) -> Place:
    """Write 0 for three exponents whose blocks hold values."""
    name = block_scale(folder, target(folder))
    folder.overwrite(name, 4, bytes(3))
    return Place(name, folder.tensors()[name].file, byte=folder.tensors()[name].offset + 4)


def _input_scales(value: float) -> Callable[[Folder], Place]:
    """Return a change of every activation scale to one value, which no manifest explains."""

    def apply(folder: Folder) -> Place:
        names = [n for n in folder.tensors() if n.endswith(".input_scale")]
        for name in names:
            folder.overwrite(name, 0, struct.pack("<f", value))
        if (folder.path / MANIFEST).exists():
            folder.remove(MANIFEST)
        return Place()

    return apply


def rows_exchanged(folder: Folder) -> Place:
    """Exchange the codes of two pairs of rows, and not their scales."""
    name = f"{target(folder)}.weight"
    codes = folder.array(name)
    codes[[0, 1, 2, 3]] = codes[[2, 3, 0, 1]]
    folder.store(name, codes)
    return folder.place(name)


def tail_not_written(folder: Folder) -> Place:
    """Leave the last sixteenth of the codes unwritten: zeros."""
    name = f"{target(folder, DOWNS)}.weight"
    tensor = folder.tensors()[name]
    count = tensor.nbytes // 16
    folder.overwrite(name, tensor.nbytes - count, bytes(count))
    return folder.place(name)


def rows_of_another_expert(folder: Folder) -> Place:
    """Write four rows of another expert's codes and scales over this one's."""
    down = target(folder, DOWNS)
    container, number, leaf = expert_of(down)
    for part, tensor in folder.modules()[down].items():
        if len(tensor.shape) == 2:
            values = folder.array(tensor.name)
            values[4:8] = folder.array(f"{container}.{number ^ 1}.{leaf}.{part}")[4:8]
            folder.store(tensor.name, values)
    return folder.place(f"{down}.weight")


_EXPERTS = frozenset({"experts"})
_BASE = ("base",)
_ONLY_NVFP4: frozenset[Kind] = frozenset({"nvfp4"})


def _contents(
    rule: str,
    name: str,
    change: Callable[[Folder], Place],
    formats: frozenset[Kind] = KINDS,
    *,
    needs: tuple[str, ...] = (),
    experts: bool = False,
    also: str = "",
    severity: Literal["error", "warning", "info"] = "error",
) -> Corruptor:
    return Corruptor(
        rule,
        name,
        edit(change),
        "payload",
        needs,
        formats,
        _EXPERTS if experts else frozenset(),
        severity,
        ids(also),
    )


CONTENTS: tuple[Corruptor, ...] = (
    _contents("QC505", "attention-each-on-its-own", attention_each_on_its_own, _ONLY_NVFP4),
    _contents(
        "QC506", "input-scale-of-up", input_scale_of_up, NVFP4, experts=True, severity="warning"
    ),
    _contents("QC507", "expert-copied", _copied(("gate", "up", "down")), needs=_BASE, experts=True),
    _contents("QC507", "down-copied", _copied(("down",)), needs=_BASE, experts=True),
    _contents("QC509", "one-scale", one_scale_inverted),
    _contents("QC509", "every-scale", all_scales_inverted, also="605"),
    _contents("QC509", "activations", activations_inverted, NVFP4, severity="warning"),
    _contents("QC511", "gate-and-up-interleaved", gate_and_up_interleaved, needs=_BASE),
    _contents("QC512", "a-few-exponents", a_few_exponents_zero, MXFP8, severity="warning"),
    _contents("QC514", "fallback-everywhere", _input_scales(0.0078125), NVFP4, severity="warning"),
    _contents("QC514", "one-without-policy", _input_scales(1.0), NVFP4, severity="info"),
    _contents("QC517", "rows-exchanged", rows_exchanged, needs=_BASE),
    _contents("QC517", "tail-not-written", tail_not_written, needs=_BASE),
    _contents("QC517", "rows-of-another-expert", rows_of_another_expert, needs=_BASE, experts=True),
)
