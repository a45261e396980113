# SPDX-License-Identifier: Apache-2.0
"""Changes that defects consist of: drop, rename, transform or overwrite a tensor, edit a config."""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from verifier.findings import Where
from verifier.selftest.corruptor import Change
from verifier.selftest.editor import CONFIG, QUANT_CONFIG, CheckpointEditor
from verifier.selftest.pick import DOWNS, Pick, target

Array = npt.NDArray[Any]
Body = dict[str, Any]
"""A quantization declaration, flat or nested."""
EXCLUSION_KEYS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")


# Tensors


def drop(pick: Pick) -> Change:
    """Drop one tensor."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        ckpt.drop([name])
        return Where(name)

    return change


def drop_module(pick: Pick) -> Change:
    """Drop all tensors of one module."""

    def change(ckpt: CheckpointEditor) -> Where:
        module = pick(ckpt)
        ckpt.drop(ckpt.siblings(module))
        return Where(f"{module}.weight")

    return change


def rename(pick: Pick, new_name: Callable[[str], str]) -> Change:
    """Rename one tensor."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        ckpt.rename({name: new_name(name)})
        return ckpt.where(new_name(name))

    return change


def rename_all(ckpt: CheckpointEditor, names: dict[str, str], leaf: str = "") -> Where:
    """Rename tensors, and return the location of the first whose new name ends with ``leaf``."""
    ckpt.rename(names)
    return ckpt.where(min(n for n in names.values() if n.endswith(leaf)))


def transform(pick: Pick, function: Callable[[Array], Array]) -> Change:
    """Replace one tensor by a function of it: values, shape or dtype."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        return ckpt.store(name, np.ascontiguousarray(function(ckpt.array(name))))

    return change


def cast(pick: Pick, dtype: npt.DTypeLike) -> Change:
    """Cast one tensor."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        return ckpt.store(name, ckpt.array(name).astype(dtype))

    return change


def relabel(pick: Pick, dtype: str) -> Change:
    """Change the dtype of one tensor in the header; its bytes stay."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        return ckpt.replace(name, dtype, ckpt.tensors()[name].shape, ckpt.read(name))

    return change


def f32(value: float) -> bytes:
    """Return the bytes of a float32."""
    return struct.pack("<f", value)


def set_scalar(leaf: str, value: float) -> Change:
    """Overwrite an F32 scalar of a down projection."""
    return lambda ckpt: ckpt.overwrite(f"{target(ckpt, DOWNS)}.{leaf}", 0, f32(value))


def multiply_scalar(pick: Pick, factor: float) -> Change:
    """Multiply an F32 scalar."""

    def change(ckpt: CheckpointEditor) -> Where:
        name = pick(ckpt)
        return ckpt.overwrite(name, 0, f32(float(ckpt.array(name)) * factor))

    return change


def set_all_scalars(ckpt: CheckpointEditor, leaf: str, value: float) -> list[str]:
    """Overwrite the F32 scalars of one leaf, and return their names."""
    names = [n for n in ckpt.tensors() if n.endswith(f".{leaf}")]
    for name in names:
        ckpt.overwrite(name, 0, f32(value))
    return names


def write_parts(ckpt: CheckpointEditor, module: str, parts: dict[str, Array]) -> None:
    """Store or add tensors of a module, by leaf, in the shard of its weight."""
    stored = ckpt.modules()[module]
    for leaf, values in parts.items():
        name = f"{module}.{leaf}"
        if leaf in stored:
            ckpt.store(name, values)
        else:
            ckpt.add(name, values, file=stored["weight"].file)


def replace_parts(ckpt: CheckpointEditor, module: str, parts: dict[str, Array]) -> None:
    """Give a module these tensors, by leaf, and no others."""
    stored = ckpt.modules()[module]
    ckpt.drop([t.name for leaf, t in stored.items() if leaf not in parts])
    write_parts(ckpt, module, parts)


def parts_of(ckpt: CheckpointEditor, module: str) -> dict[str, Array]:
    """Return the tensors of a module by leaf."""
    return {leaf: ckpt.array(t.name) for leaf, t in ckpt.modules()[module].items()}


# Files and declarations


def remove_files(*files: str) -> Change:
    """Delete files."""

    def change(ckpt: CheckpointEditor) -> Where:
        for file in files:
            ckpt.remove(file)
        return Where(None, files[0])

    return change


def edit_config(edit: Callable[[dict[str, Any]], object]) -> Change:
    """Edit config.json."""

    def change(ckpt: CheckpointEditor) -> Where:
        ckpt.edit_json(CONFIG, edit)
        return Where(None, CONFIG)

    return change


def edit_quant_config(edit: Callable[[Body], object]) -> Change:
    """Edit the declaration in hf_quant_config.json only."""

    def change(ckpt: CheckpointEditor) -> Where:
        ckpt.edit_json(QUANT_CONFIG, lambda value: edit(value["quantization"]))
        return Where(None, QUANT_CONFIG)

    return change


def declare(ckpt: CheckpointEditor, edit: Callable[[Body], object]) -> None:
    """Edit the declaration in both configs, so that they still agree."""
    ckpt.edit_json(CONFIG, lambda value: edit(value["quantization_config"]))
    if (ckpt.path / QUANT_CONFIG).exists():
        ckpt.edit_json(QUANT_CONFIG, lambda value: edit(value["quantization"]))


def declare_algo(algo: str | None) -> Callable[[CheckpointEditor], None]:
    """Declare an algorithm in both configs."""
    return lambda ckpt: declare(ckpt, lambda body: body.update({"quant_algo": algo}))


def edit_exclusions(ckpt: CheckpointEditor, edit: Callable[[list[str]], list[str]]) -> None:
    """Edit every exclusion list of both configs."""

    def change(body: Body) -> None:
        for key in EXCLUSION_KEYS:
            if key in body:
                body[key] = edit(body[key])

    declare(ckpt, change)


def exclude(ckpt: CheckpointEditor, *patterns: str) -> None:
    """Append exclusions."""
    edit_exclusions(ckpt, lambda listed: [*listed, *patterns])


def exclude_sorted(ckpt: CheckpointEditor, modules: Iterable[str]) -> None:
    """Add modules to the exclusions, as an exporter lists them: sorted."""
    names = list(modules)
    edit_exclusions(ckpt, lambda listed: sorted([*listed, *names]))


def unlist(ckpt: CheckpointEditor, modules: Iterable[str]) -> None:
    """Remove the entries of modules from ``quantized_layers``."""
    names = list(modules)

    def change(body: Body) -> None:
        for name in names:
            body.get("quantized_layers", {}).pop(name, None)

    declare(ckpt, change)
