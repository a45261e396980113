# SPDX-License-Identifier: Apache-2.0
"""Scales of activations that a declaration requires."""

from __future__ import annotations

from typing import NamedTuple

from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.schemes import Format, Sibling, required_siblings


class RequiredInput(NamedTuple):
    """Modules that have to have a scale of their activations: all of them have it, or none."""

    group: ModuleGroup
    format: Format
    sibling: Sibling

    @property
    def total(self) -> int:
        """The number of modules."""
        return len(self.group.modules)

    @property
    def present(self) -> bool:
        """Whether they have the scale."""
        return any(leaf in self.group.first.parts for leaf in self.sibling.leaves)


def required_inputs(ctx: Context) -> dict[str, list[RequiredInput]]:
    """Return the modules whose declared activations need a stored scale, by the format's name."""
    kinds: dict[str, list[RequiredInput]] = {}
    for group in ctx.candidate.module_groups:
        fmt, sibling = group.format, _required_input(group)
        if sibling is not None and fmt is not None:
            kinds.setdefault(fmt.name, []).append(RequiredInput(group, fmt, sibling))
    return kinds


def _required_input(group: ModuleGroup) -> Sibling | None:
    """Return the scale of activations that a group of modules has to have; None for none."""
    if group.format is None:
        return None
    scheme = group.declared.scheme if group.declared else None
    required = required_siblings(group.format, scheme)
    return next((s for s in required if s.role == "input"), None)
