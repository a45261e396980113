# SPDX-License-Identifier: Apache-2.0
"""Regular expressions out of a config, which nobody vouches for: matched in bounded time, or not at
all.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable
from functools import cache

MAX_PATTERN = 1000
STEPS = 5e7
"""The most backtracking that one match may cost: the ways to cut a name among k unbounded repeats
and what is left."""
SECONDS = 1.0
"""The processor time that one pattern may take on all names together."""


class Regex:
    """A compiled ``re:`` pattern; ``match`` is False for names that are too long for it, and once
    its time is used up.
    """

    def __init__(self, compiled: re.Pattern[str], repeats: int) -> None:
        self._compiled = compiled
        self.longest = _longest(repeats)
        self._left = SECONDS

    def match(self, name: str) -> bool:
        """Whether the pattern matches at the beginning of a name."""
        if len(name) > self.longest or self._left <= 0:
            return False
        started = time.process_time()
        found = self._compiled.match(name) is not None
        self._left -= time.process_time() - started
        return found


@cache
def _longest(repeats: int) -> int:
    """Return the length of the longest name that a pattern of so many unbounded repeats is matched
    with.
    """
    if not repeats:
        return 1 << 20
    low, high = 0, int(STEPS)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (
            (middle, high) if math.comb(middle + repeats, repeats) <= STEPS else (low, middle - 1)
        )
    return low


def compile_regex(pattern: str) -> Regex | None:
    """Return a pattern of a config, or None where it does not compile or could take exponential
    time.

    Refused are more than 1,000 characters, and an unbounded repeat of a group that itself repeats
    or has alternatives (``(a+)+``, ``(a|a)*``).
    """
    if len(pattern) > MAX_PATTERN:
        return None
    pattern = re.sub(
        r"(?<!\\)(?:\.\*){2,}", ".*", pattern
    )  # the same language, without the ways to share it out
    repeats = _repeats(pattern)
    if repeats is None:
        return None
    try:
        return Regex(re.compile(pattern), repeats)
    except (re.error, RecursionError, OverflowError):
        return None


def _repeats(pattern: str) -> int | None:
    """Return the number of unbounded repeats, or None where one repeats what repeats or has
    alternatives.
    """
    count, groups, closed = 0, [False], False
    i = 0
    while i < len(pattern):
        c = pattern[i]
        ended, closed = closed, False
        if c == "\\":
            i += 1
        elif c == "[":
            i = _end_of_class(pattern, i)
        elif c == "(":
            groups.append(False)
        elif c == ")" and len(groups) > 1:
            closed = groups.pop()
            groups[-1] = groups[-1] or closed
        elif c == "|":
            groups[-1] = True
        elif c in "*+" or (c == "{" and re.match(r"\{\d*,\d*\}|\{\d{2,}\}", pattern[i:])):
            if ended:
                return None
            count += 1
            groups[-1] = True
        i += 1
    return count


def _end_of_class(pattern: str, start: int) -> int:
    """Return the index of the bracket that ends a character class."""
    i = start + 1
    if pattern[i : i + 1] == "^":
        i += 1
    if pattern[i : i + 1] == "]":
        i += 1
    while i < len(pattern) and pattern[i] != "]":
        i += 2 if pattern[i] == "\\" else 1
    return i


class Names:
    """Names, ``re:`` patterns and class names, as compressed-tensors and Quark match them.

    Source: ``match_name`` and ``_match_class`` of compressed-tensors 0.20;
    ``is_equal_or_regex_match`` of vLLM 0.32.
    """

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact = frozenset(p for p in self.patterns if not p.startswith("re:"))
        compiled = {p: compile_regex(p[3:]) for p in self.patterns if p.startswith("re:")}
        self._regexes: tuple[tuple[str, Regex], ...] = tuple(
            (p, r) for p, r in compiled.items() if r is not None
        )
        self.uncompiled = tuple(p for p, r in compiled.items() if r is None)

    def by_name(self, module: str) -> str:
        """Return the first pattern that matches a module's name, '' where none does."""
        if module in self._exact:
            return module
        return next((p for p, r in self._regexes if r.match(module)), "")

    def by_class(self, classes: Iterable[str]) -> str:
        """Return the class name among the patterns that is one of a module's, '' for none."""
        return next((c for c in classes if c in self._exact), "")
