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

_DIGITS = re.compile(r"\d+")


def _outline(text: str) -> str:
    """Return text with each run of digits as one ``0``: what stands in a text has an outline that stands in its outline."""
    return _DIGITS.sub("0", text)


class Exclusions:
    """A list of exclusion patterns, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact = frozenset(self.patterns)
        # Answers already given: every rule on exclusions asks about every module.
        self._answers: dict[str, bool] = {}
        self._part_answers: dict[str, bool] = {}
        self._candidates: dict[str, tuple[str, ...]] = {}

    @cached_property
    def _globs(self) -> re.Pattern[str] | None:
        globs = [p for p in self.patterns if any(c in p for c in "*?[") and not p.startswith("re:")]
        return re.compile("|".join(fnmatch.translate(p) for p in globs)) if globs else None

    @cached_property
    def _regexes(self) -> tuple[re.Pattern[str], ...]:
        found = []
        for pattern in self.patterns:
            if pattern.startswith("re:"):
                try:
                    found.append(re.compile(pattern[3:]))
                except re.error:
                    continue  # a pattern that does not compile matches nothing, and is then reported dead
        return tuple(found)

    @cached_property
    def _plain(self) -> tuple[str, ...]:
        return tuple(p.strip("*") for p in self.patterns if not p.startswith("re:") and p.strip("*"))

    @cached_property
    def _plain_by_outline(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for pattern in self._plain:
            found.setdefault(_outline(pattern), []).append(pattern)
        return found

    def _stands_in(self, module: str) -> bool:
        """Whether a plain pattern is a substring of the name; only one whose outline is in the name's can be."""
        outline = _outline(module)
        found = self._candidates.get(outline)
        if found is None:
            among = (patterns for o, patterns in self._plain_by_outline.items() if o in outline)
            found = self._candidates[outline] = tuple(p for patterns in among for p in patterns)
        return any(p in module for p in found) if found else False

    def _matches_part(self, module: str) -> bool:
        if self._parts is None:
            return False
        for part in module.split("."):
            found = self._part_answers.get(part)
            if found is None:
                found = self._part_answers[part] = self._parts.match(part) is not None
            if found:
                return True
        return False

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
        return bool(self._regexes) and any(r.match(module) for r in self._regexes)

    def loose(self, module: str) -> bool:
        """Whether the module is excluded under any reading at all."""
        found = self._answers.get(module)
        if found is None:
            found = self.strict(module) or self._stands_in(module) or self._matches_part(module)
            self._answers[module] = found
        return found

    def pattern_for(self, module: str) -> str | None:
        """Return the first pattern that excludes the module under any reading."""
        return next((p for p in self.patterns if Exclusions([p]).loose(module)), None)

    def dead(self, modules: Iterable[str]) -> list[str]:
        """Return the patterns that exclude none of the modules under any reading."""
        names = list(modules)
        known = set(names)
        text = "\n".join(names)
        result = []
        for pattern in self.patterns:
            if pattern in known or (pattern.strip("*") and not pattern.startswith("re:") and pattern.strip("*") in text):
                continue
            one = Exclusions([pattern])
            # With a dot and without a wildcard, what is in no name as it stands matches none.
            plain = "." in pattern and not any(c in pattern for c in "*?[") and not pattern.startswith("re:")
            if plain or not any(one.loose(n) for n in names):
                result.append(pattern)
        return result
