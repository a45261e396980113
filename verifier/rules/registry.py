# SPDX-License-Identifier: Apache-2.0
"""The table of rules: one file each below ``qc1xx`` … ``qc7xx``, registered by importing it."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from verifier.findings import Finding, Severity
from verifier.rules.context import Context

Depth = Literal["header", "payload", "load", "eval"]
DEPTHS: tuple[Depth, ...] = ("header", "payload", "load", "eval")
Engine = Literal["vllm", "sglang", "trtllm", "transformers"]
Check = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``unit`` is what it counts; ``needs`` names the inputs without which it is listed
    as not run.

    ``engines`` gives an engine's own severity of the defect, and what that engine does with it,
    where it differs from ``severity`` or is known from its code. ``split``: each module is judged
    by itself, so that the check may be run on parts of the modules (`Context.part`), in copies of
    the process and on several machines.
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
    origin: str = ""  # whose plugin it is of; '' for the built-in ones
    split: bool = False


_RULES: dict[str, Rule] = {}
_TABLE: ContextVar[dict[str, Rule]] = ContextVar("_TABLE", default=_RULES)


@contextmanager
def collecting(table: dict[str, Rule]) -> Iterator[None]:
    """Put the rules that are registered meanwhile into this table."""
    token = _TABLE.set(table)
    try:
        yield
    finally:
        _TABLE.reset(token)


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
    """Register the decorated function as the check of a rule; its docstring is what ``explain``
    prints.
    """

    def register(check: Check) -> Check:
        table = _TABLE.get()
        if id_ in table:
            raise ValueError(f"{id_} is registered twice")
        table[id_] = Rule(
            id_,
            title,
            severity,
            depth,
            unit,
            needs,
            consumers,
            sources,
            inspect.getdoc(check) or "",
            check,
            engines or {},
            split=split,
        )
        return check

    return register


@lru_cache(maxsize=1)
def built_in_rules() -> dict[str, Rule]:
    """Return ckptgate's own rules by id, in order."""
    import verifier.rules as package  # noqa: PLC0415  (the package imports this module)

    with collecting(_RULES):  # a plugin may be the first to ask
        for info in pkgutil.walk_packages(package.__path__, "verifier.rules."):
            if ".qc" in info.name:
                importlib.import_module(info.name)
    return dict(sorted((k, r) for k, r in _RULES.items() if k.startswith("QC")))


def registered() -> tuple[Rule, ...]:
    """Return the rules that were registered by an import, built-in or not."""
    return tuple(_RULES.values())


def all_rules(plugins: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Rule]:
    """Return every rule by id: ckptgate's own in order, those of installed packages, and those of
    some Python files.

    Raises:
        UsageError: a plugin cannot be loaded.
    """
    from verifier.rules.plugins import with_plugins  # noqa: PLC0415  (it imports this module)

    return with_plugins(plugins)
