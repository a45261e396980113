# SPDX-License-Identifier: Apache-2.0
"""What the dialects share: fields of configs checked for their type, name patterns."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from verifier.schemes.exclusions import Exclusions
from verifier.schemes.patterns import Names, compile_regex

MAX_WILDCARDS = 1000
"""The most exclusions with wildcards; a release has some for each layer."""
EXCLUSION_KEYS = ("ignore", "exclude_modules", "ignored_layers", "modules_to_not_convert")


def integer(value: Any) -> int | None:
    """Return a whole number, None for anything else."""
    return value if type(value) is int else None


def group_of(value: Any) -> int | None:
    """Return a stated group size; None where there is one group (-1), or none is stated."""
    return value if type(value) is int and value > 0 else None


def text(value: Any) -> str:
    """Return a string, '' for anything else."""
    return value if isinstance(value, str) else ""


def pair(value: Any) -> tuple[int, int] | None:
    """Return two positive whole numbers of a list, None for anything else."""
    if not isinstance(value, list) or len(value) != 2:
        return None
    return (value[0], value[1]) if all(type(n) is int and n > 0 for n in value) else None


def mapping(value: Any) -> Mapping[str, Any]:
    """Return an object, {} for anything else."""
    return value if isinstance(value, Mapping) else {}


def name_lists(
    body: Mapping[str, Any], keys: Iterable[str], problems: list[str]
) -> tuple[str, ...]:
    """Return the names and patterns of some fields that hold lists of them, each once."""
    found: list[str] = []
    for key in keys:
        value = body.get(key)
        if value is None:
            continue
        if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
            problems.append(f"{key} is not a list of strings")
            continue
        wild = sum(any(c in v for c in "*?[") for v in value)
        if wild > MAX_WILDCARDS:
            problems.append(
                f"{key} holds {wild:,} patterns with wildcards; more than {MAX_WILDCARDS:,} are"
                " not read"
            )
        else:
            found += value
    return tuple(dict.fromkeys(found))


class NamedExclusions(Exclusions):
    """Exclusions that all readers match alike: exact names and ``re:`` patterns.

    Args:
        patterns: as the config lists them.
        prefix: what stands before the names that they mean.
    """

    def __init__(self, patterns: Iterable[str], prefix: str = "") -> None:
        super().__init__(patterns)
        self.names, self._prefix = Names(self.patterns), prefix

    def strict(self, module: str) -> bool:
        """Whether a pattern matches the module."""
        return self.pattern_for(module) is not None

    def loose(self, module: str) -> bool:
        """Whether a pattern matches the module: there is one reading."""
        return self.strict(module)

    def excludes(self, reader: str, module: str) -> bool:
        """Whether an engine excludes a module: they read such lists alike."""
        return self.strict(module)

    def pattern_for(self, module: str) -> str | None:
        """Return the pattern that matches the module."""
        inner = module.removeprefix(self._prefix) if self._prefix else module
        return self.names.by_name(inner) or self.names.by_name(module) or None

    def dead(self, modules: Iterable[str]) -> list[str]:
        """Return the patterns that match none of the modules."""
        names = list(modules)
        if self._prefix:
            names += [n.removeprefix(self._prefix) for n in names]
        known = set(names)
        dead = [p for p in self.patterns if not p.startswith("re:") and p not in known]
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                one = compile_regex(pattern[3:])
                if one is None or not any(one.match(n) for n in names):
                    dead.append(pattern)
        return [p for p in self.patterns if p in set(dead)]


class PartExclusions(Exclusions):
    """Exclusions that are pieces of names, as AWQ's and bitsandbytes' readers match them."""

    def strict(self, module: str) -> bool:
        """Whether a piece is part of the module's name."""
        return self._has_piece(module)

    def loose(self, module: str) -> bool:
        """Whether a piece is part of the module's name: there is one reading."""
        return self.strict(module)

    def excludes(self, reader: str, module: str) -> bool:
        """Whether an engine excludes a module: they read such lists alike."""
        return self.strict(module)

    def pattern_for(self, module: str) -> str | None:
        """Return the first piece that is part of the module's name."""
        return next((p for p in self.patterns if p and p in module), None)

    def dead(self, modules: Iterable[str]) -> list[str]:
        """Return the pieces that are part of no module's name."""
        joined = "\n".join(modules)
        return [p for p in self.patterns if p and p not in joined]


CLASS_NAME = re.compile(r"^[A-Z]\w*$")
"""A target that is a class name, not a module's."""
KNOWN_CLASSES = frozenset(
    {
        "Linear",
        "Embedding",
        "VocabParallelEmbedding",
        "ParallelLMHead",
        "RoutedExperts",
        "FusedMoE",
        "Conv1d",
        "Conv2d",
        "Conv3d",
    }
)
"""Classes that module names distinguish, and classes that hold no linear weight."""
