# SPDX-License-Identifier: Apache-2.0
"""The table of rules: one file each below ``qc1xx`` … ``qc6xx``, registered by importing it."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from verifier.findings import Finding, Severity
from verifier.rules.context import Context

Depth = Literal["header", "payload", "load"]
DEPTHS: tuple[Depth, ...] = ("header", "payload", "load")
Engine = Literal["vllm", "sglang", "trtllm", "transformers"]
Check = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``unit`` is what it counts; ``needs`` names the inputs without which it is listed as not run.

    ``engines`` gives an engine's own severity of the defect, and what that engine does with it, where it differs from
    ``severity`` or is known from its code. ``split``: each module is judged by itself, so that the check may be run on
    parts of the modules (`Context.part`), in threads and on several machines.
    """

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
    engines: Mapping[Engine, tuple[Severity, str]] = field(default_factory=dict)
    split: bool = False


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
    engines: Mapping[Engine, tuple[Severity, str]] | None = None,
    split: bool = False,
) -> Callable[[Check], Check]:
    """Register the decorated function as the check of a rule; its docstring is what ``explain`` prints."""

    def register(check: Check) -> Check:
        if id_ in _RULES:
            raise ValueError(f"{id_} is registered twice")
        _RULES[id_] = Rule(
            id_, title, severity, depth, unit, needs, consumers, sources, inspect.getdoc(check) or "", check, engines or {},
            split,
        )  # fmt: skip
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
