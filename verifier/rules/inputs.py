# SPDX-License-Identifier: Apache-2.0
"""Scales of activations that a declaration requires."""

from __future__ import annotations

from typing import NamedTuple

from verifier.quantized import ModuleGroup
from verifier.rules.context import Context
from verifier.schemes import Format, Module, Sibling, required_siblings


class RequiredInput(NamedTuple):
    """A module that has to have a scale of its activations."""

    module: Module
    format: Format
    sibling: Sibling

    @property
    def present(self) -> bool:
        """Whether it has the scale."""
        return any(leaf in self.module.parts for leaf in self.sibling.leaves)


def required_inputs(ctx: Context) -> dict[str, list[RequiredInput]]:
    """Return the modules whose declared activations need a stored scale, by the format's name."""
    kinds: dict[str, list[RequiredInput]] = {}
    for group in ctx.candidate.module_groups:
        fmt, sibling = group.format, _required_input(group)
        if sibling is not None and fmt is not None:
            found = kinds.setdefault(fmt.name, [])
            found += (RequiredInput(module, fmt, sibling) for module in group.modules)
    return kinds


def _required_input(group: ModuleGroup) -> Sibling | None:
    """Return the scale of activations that a group of modules has to have; None for none."""
    if group.format is None:
        return None
    scheme = group.declared.scheme if group.declared else None
    required = required_siblings(group.format, scheme)
    return next((s for s in required if s.role == "input"), None)
