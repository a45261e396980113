# SPDX-License-Identifier: Apache-2.0
"""Defects that a model shows once it is built: QC606 and QC608."""

from __future__ import annotations

from collections.abc import Callable

import ml_dtypes
import numpy as np

from verifier.selftest.corruptor import (
    DOWNS,
    Corruptor,
    declarations,
    edit,
    embedding,
    exclusions,
    ids,
    norm,
    target,
)
from verifier.selftest.edit import Folder, Place

_EXPERTS, _VISION = frozenset({"experts"}), frozenset({"vision"})


def part_of_a_stack_lost(folder: Folder) -> Place:
    """Lose one expert's down projection: the others stack to one fewer."""
    folder.drop(folder.siblings(target(folder, DOWNS)))
    return Place()


def norm_under_a_name_of_memory(folder: Folder) -> Place:
    """Write one norm under the name of another class's attribute."""
    name = norm(folder)
    folder.rename({name: name.replace("layernorm", "layer_norm")})
    return Place()


def tensor_left_over(folder: Folder) -> Place:
    """Ship a tensor that the model has no parameter for."""
    name = f"{norm(folder).removesuffix('.weight')}_copy.weight"
    return folder.add(name, folder.array(norm(folder)))


def norm_of_another_width(folder: Folder) -> Place:
    """Write half of a norm."""
    name = norm(folder)
    return folder.store(name, folder.array(name)[::2].copy())


def _final_norm(value: float) -> Callable[[Folder], Place]:
    """Return a change of every value of the last norm."""

    def apply(folder: Folder) -> Place:
        name = next(
            n for n in folder.tensors() if n.endswith((".norm.weight", ".final_layernorm.weight"))
        )
        values = folder.array(name)
        folder.store(name, np.full_like(values, value))
        return Place()

    return apply


def mtp_beside_the_model(folder: Folder) -> Place:
    """Keep the draft head, rightly excluded, which transformers does not build."""
    name = "mtp.layers.0.eh_proj"
    width = folder.tensors()[embedding(folder)].shape[1]
    values = (
        np.random.default_rng(606).normal(0, 0.02, (width, 2 * width)).astype(ml_dtypes.bfloat16)
    )
    declarations(folder, exclusions(lambda listed: [*listed, name]))
    return folder.add(f"{name}.weight", values)


RELOAD: tuple[Corruptor, ...] = (
    Corruptor(
        "QC606",
        "draft-head-not-loaded",
        edit(mtp_beside_the_model),
        "load",
        traits=_VISION,
        severity="info",
    ),
    Corruptor(
        "QC608",
        "part-of-a-stack-lost",
        edit(part_of_a_stack_lost),
        "load",
        traits=_EXPERTS,
        also=ids("207"),
    ),
    Corruptor(
        "QC608", "name-of-memory", edit(norm_under_a_name_of_memory), "load", also=ids("201 205")
    ),
    Corruptor("QC608", "tensor-left-over", edit(tensor_left_over), "load", also=ids("201")),
    Corruptor(
        "QC608", "norm-of-another-width", edit(norm_of_another_width), "load", also=ids("208")
    ),
    Corruptor("QC608", "last-norm-overflows", edit(_final_norm(3e38)), "load", also=ids("605")),
    Corruptor(
        "QC608", "last-norm-is-nan", edit(_final_norm(float("nan"))), "load", also=ids("508 605")
    ),
)
