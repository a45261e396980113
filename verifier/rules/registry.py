# SPDX-License-Identifier: Apache-2.0
"""The table of rules: one file per rule in ``qc1xx`` … ``qc7xx``, registered when it is
imported.
"""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

from verifier.findings import Finding, Severity
from verifier.rules.context import Context

Depth = Literal["header", "payload", "load", "engine", "eval"]
DEPTHS: tuple[Depth, ...] = ("header", "payload", "load", "engine", "eval")
INCLUDED: Mapping[Depth, tuple[Depth, ...]] = {
    "header": ("header",),
    "payload": ("header", "payload"),
    "load": ("header", "payload", "load"),
    "engine": ("header", "payload", "engine"),
    "eval": ("header", "payload", "load", "eval"),
}
"""The depths whose rules run at each depth: an engine has its own interpreter, and needs neither
torch nor transformers here."""
Engine = Literal["vllm", "sglang", "trtllm", "transformers"]
Check = Callable[[Context], Iterator[Finding]]


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule.

    Attributes:
        id: two letters and three digits, as in ``QC501``.
        title: what it finds, for lists.
        severity: of its findings, unless one states its own.
        depth: at which it runs.
        unit: what its tally counts.
        needs: inputs without which it is listed as not run: ``base``, ``merged_from``, or
            ``base|merged_from`` for one of the two.
        consumers: the engines that the defect affects.
        sources: issues and reports of the defect.
        doc: what ``explain`` prints.
        check: yields the findings.
        engines: per engine, its own severity of the defect and what it does with it, where that
            differs from ``severity`` or is known from the engine's code.
        origin: the plugin it comes from, '' for a built-in rule.
        split: whether each module is checked by itself, so that the check may be run on parts of
            the modules (`Context.part`), in several processes and on several machines.
        across: of a split rule: yields the findings that take all modules together; it is run once.
        repairable: whether `ckptgate repair` fixes what the rule finds, or most of it.
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
    origin: str = ""
    split: bool = False
    across: Check | None = None
    repairable: bool = False


_RULES: dict[str, Rule] = {}
_TABLE: ContextVar[dict[str, Rule]] = ContextVar("_TABLE", default=_RULES)


@contextmanager
def collecting(table: dict[str, Rule]) -> Iterator[None]:
    """Register rules in this table within the ``with`` block."""
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
    across: Check | None = None,
    repairable: bool = False,
) -> Callable[[Check], Check]:
    """Register the decorated function as the check of a rule; ``explain`` prints its docstring.

    Arguments are as in `Rule`.
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
            across=across,
            repairable=repairable,
        )
        return check

    return register


@lru_cache(maxsize=1)
def built_in_rules() -> dict[str, Rule]:
    """Return ckptgate's own rules by id, in order."""
    with collecting(_RULES):  # a plugin may be the first to ask
        for info in pkgutil.walk_packages([os.path.dirname(__file__)], "verifier.rules."):
            if ".qc" in info.name:
                importlib.import_module(info.name)
    return dict(sorted((k, r) for k, r in _RULES.items() if k.startswith("QC")))


def registered() -> tuple[Rule, ...]:
    """Return the rules that an import registered, built-in or not."""
    return tuple(_RULES.values())
