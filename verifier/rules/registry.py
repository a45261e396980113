# SPDX-License-Identifier: Apache-2.0
"""The table of rules: one file each below ``qc1xx`` … ``qc6xx``, registered by importing it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from verifier.findings import Finding, Severity
from verifier.rules.context import Context

Depth = Literal["header", "payload", "load"]
DEPTHS: tuple[Depth, ...] = ("header", "payload", "load")
Check = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``unit`` is what it counts; ``needs`` names the inputs without which it is listed as not run."""

    id: str
    title: str
    severity: Severity
    depth: Depth
    unit: str
    needs: tuple[str, ...]
    consumers: tuple[str, ...]
    sources: tuple[str, ...]
    doc: str
    check: Check


_RULES: dict[str, Rule] = {}


def rule(
    id_: str,
    title: str,
    *,
    severity: Severity,
    depth: Depth,
    unit: str,
    needs: tuple[str, ...] = (),
    consumers: tuple[str, ...] = (),
    sources: tuple[str, ...] = (),
) -> Callable[[Check], Check]:
    """Register the decorated function as the check of a rule; its docstring is what ``explain`` prints."""

    def register(check: Check) -> Check:
        if id_ in _RULES:
            raise ValueError(f"{id_} is registered twice")
        _RULES[id_] = Rule(
            id_, title, severity, depth, unit, needs, consumers, sources, inspect.getdoc(check) or "", check
        )
        return check

    return register


@lru_cache(maxsize=1)
def all_rules() -> dict[str, Rule]:
    """Return every rule by id, in order."""
    import verifier.rules as package  # noqa: PLC0415  (the package imports this module)

    for info in pkgutil.walk_packages(package.__path__, "verifier.rules."):
        if ".qc" in info.name:
            importlib.import_module(info.name)
    return dict(sorted(_RULES.items()))
