# SPDX-License-Identifier: Apache-2.0
"""Exclusion patterns, and the five ways in which consumers read them.

    exact      the pattern is the module's name                                 TensorRT-LLM
    glob       fnmatch on the whole name; ``x*`` also means ``x`` and ``x.*``   ModelOpt, vLLM
    regex      ``re:`` and a regular expression on the whole name               compressed-tensors
    part       the glob matches one dot part, or a leading run of parts         SGLang, transformers
    substring  the pattern stands anywhere in the name                          vLLM

The first three are *strict*: all who read the pattern so agree on what it means. The other two are *loose*.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import cached_property

from verifier.schemes.patterns import Regex, compile_regex

MAX_MATCHES = 1_000_000
MANY = 1000


def _literals(pattern: str) -> list[str]:
    """Return pieces that every name which a glob matches must hold; of one with a class none are known."""
    return [] if "[" in pattern else [p for p in re.split(r"[*?]", pattern) if p]


class Exclusions:
    """A list of exclusion patterns, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact = frozenset(self.patterns)

    @cached_property
    def _globs(self) -> re.Pattern[str] | None:
        globs = [p for p in self.patterns if any(c in p for c in "*?[") and not p.startswith("re:")]
        return re.compile("|".join(fnmatch.translate(p) for p in globs)) if globs else None

    @cached_property
    def _regexes(self) -> tuple[Regex, ...]:
        # A pattern that does not compile matches nothing, and is then reported dead.
        return tuple(r for p in self.patterns if p.startswith("re:") and (r := compile_regex(p[3:])) is not None)

    @cached_property
    def _plain(self) -> tuple[str, ...]:
        return tuple(p.strip("*") for p in self.patterns if not p.startswith("re:") and p.strip("*"))

    @cached_property
    def _parts(self) -> re.Pattern[str] | None:
        plain = [p for p in self.patterns if not p.startswith("re:") and "." not in p]
        return re.compile("|".join(fnmatch.translate(p) for p in plain)) if plain else None

    def strict(self, module: str) -> bool:
        """Whether the module is excluded under exact, glob or ``re:`` reading."""
        if module in self._exact:
            return True
        if self._globs is not None and self._globs.match(module):
            return True
        return any(r.match(module) for r in self._regexes)

    def loose(self, module: str) -> bool:
        """Whether the module is excluded under any reading at all."""
        if self.strict(module) or self._has_piece(module):
            return True
        return self._parts is not None and any(self._parts.match(part) for part in module.split("."))

    def _has_piece(self, module: str) -> bool:
        """Whether any pattern stands somewhere in the name."""
        if len(self._plain) <= MANY or len(module) > MANY:
            return any(p in module for p in self._plain)
        # A list of every excluded expert by name has tens of thousands of entries and some ten lengths.
        pieces = self._by_length
        return any(
            module[i : i + n] in found
            for n, found in pieces.items() for i in range(len(module) - n + 1)
        )  # fmt: skip

    @cached_property
    def _by_length(self) -> dict[int, frozenset[str]]:
        found: dict[int, set[str]] = {}
        for p in self._plain:
            found.setdefault(len(p), set()).add(p)
        return {n: frozenset(s) for n, s in found.items()}

    def pattern_for(self, module: str) -> str | None:
        """Return the first pattern that excludes the module under any reading."""
        return next((p for p in self.patterns if Exclusions([p]).loose(module)), None)

    def dead(self, modules: Iterable[str]) -> list[str]:
        """Return the patterns that exclude none of the modules under any reading.

        A list of so many wildcards that judging all would take more than `MAX_MATCHES` is judged in part.
        """
        names = list(modules)
        known = set(names)
        text = "\n".join(names)
        result = []
        left = MAX_MATCHES
        for pattern in self.patterns:
            if pattern in known or left <= 0:
                continue
            piece = "" if pattern.startswith("re:") else pattern.strip("*")
            at = text.find(piece) if piece else -1
            left -= (len(text) if at < 0 else at) // 1500
            if at >= 0:
                continue
            if not pattern.startswith("re:") and any(part not in text for part in _literals(pattern)):
                result.append(pattern)
                continue
            one = Exclusions([pattern])
            alive = next((i for i, n in enumerate(names) if one.loose(n)), None)
            left -= len(names) if alive is None else alive
            if alive is None:
                result.append(pattern)
        return result
