# SPDX-License-Identifier: Apache-2.0
"""Exclusion patterns, and the five ways in which consumers read them.

    exact      the pattern is the module's name                                 TensorRT-LLM
    glob       fnmatch on the whole name; ``x*`` also means ``x`` and ``x.*``   ModelOpt, vLLM
    regex      ``re:`` and a regular expression on the whole name               compressed-tensors
    part       the glob matches one dot part, or a leading run of parts         SGLang, transformers
    substring  the pattern stands anywhere in the name                          vLLM

The first three are *strict*: all who read the pattern so agree on what it means. The other two are
*loose*, and so is the name of a parameter that an engine builds of several projections
(``in_proj_qkvz``). `Exclusions.excludes` puts them together as each engine does.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable
from functools import cached_property
from typing import Literal

from verifier.schemes.groups import FUSED_PARAMETERS, PACKED, fused_names
from verifier.schemes.patterns import Regex, compile_regex
from verifier.schemes.roles import stem

MAX_MATCHES = 1_000_000
MANY = 1000
Reader = Literal["vllm", "sglang", "trtllm"]
READERS: tuple[Reader, ...] = ("vllm", "sglang", "trtllm")
_WILD = "*?["


def _bare(module: str) -> str:
    """Return a name as engines ask for it that strip the tower's prefix."""
    return module.removeprefix("language_model.")


def _compiled(globs: Iterable[str]) -> re.Pattern[str] | None:
    found = [fnmatch.translate(g) for g in globs]
    return re.compile("|".join(found)) if found else None


_DIGITS = re.compile(r"\d+")


def _outline(text: str) -> str:
    """Return text with each run of digits as one ``0``. Where one text contains another, its
    outline contains the other's outline.
    """
    return _DIGITS.sub("0", text)


def _literals(pattern: str) -> list[str]:
    """Return pieces that every name which a glob matches must hold; of one with a class none are
    known.
    """
    return [] if "[" in pattern else [p for p in re.split(r"[*?]", pattern) if p]


class Exclusions:
    """A list of exclusion patterns, compiled once."""

    def __init__(self, patterns: Iterable[str]) -> None:
        self.patterns = tuple(patterns)
        self._exact = frozenset(self.patterns)
        # Answers already given: every rule on exclusions asks about every module.
        self._answers: dict[str, bool] = {}
        self._part_answers: dict[str, bool] = {}
        self._candidates: dict[str, tuple[str, ...]] = {}
        self._named_stems: dict[str, bool] = {}

    @cached_property
    def _globs(self) -> re.Pattern[str] | None:
        return _compiled(
            p for p in self.patterns if any(c in p for c in _WILD) and not p.startswith("re:")
        )

    @cached_property
    def _regexes(self) -> tuple[Regex, ...]:
        # A pattern that does not compile matches nothing, and is then reported dead.
        return tuple(
            r
            for p in self.patterns
            if p.startswith("re:") and (r := compile_regex(p[3:])) is not None
        )

    @cached_property
    def _plain(self) -> tuple[str, ...]:
        return tuple(
            p.strip("*") for p in self.patterns if not p.startswith("re:") and p.strip("*")
        )

    @cached_property
    def _plain_by_outline(self) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for pattern in self._plain:
            found.setdefault(_outline(pattern), []).append(pattern)
        return found

    def _stands_in(self, module: str) -> bool:
        """Whether a plain pattern is a substring of the name; only one whose outline is in the
        name's can be.
        """
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

    @cached_property
    def _vllm(self) -> tuple[tuple[str, ...], re.Pattern[str] | None]:
        """As vLLM 0.32 reads: ``x*`` becomes ``x`` and ``x.*``; the rest are substrings and
        globs.
        """
        spread = [
            e
            for p in self.patterns
            for e in ((p[:-1], f"{p[:-1]}.*") if p.endswith("*") and len(p) > 1 else (p,))
        ]
        return tuple(e for e in spread if e and not any(c in e for c in _WILD)), _compiled(
            e for e in spread if any(c in e for c in _WILD)
        )

    @cached_property
    def _readable(self) -> re.Pattern[str] | None:
        """Every pattern as a glob on a whole name: TensorRT-LLM; SGLang, which tries each part as
        well.
        """
        return _compiled(p for p in self.patterns if not p.startswith("re:"))

    def excludes(self, reader: Reader, module: str) -> bool:
        """Whether one engine excludes a module on disk; of an expert's projection it asks for the
        container too.

        Source: ``is_layer_excluded`` of vLLM 0.32 and SGLang 0.5.23, TensorRT-LLM's exclusion
            check. A fused
        projection is read through its members.
        """
        if module in self._exact and not module.startswith("re:"):
            return True
        if self._names_fused(module):
            return True
        if reader == "vllm":
            literals, globs = self._vllm
            return any(p in module for p in literals) or (
                globs is not None and globs.match(module) is not None
            )
        if self._readable is None:
            return False
        bare = _bare(module)
        names = [module, bare]
        if ".experts." in module:
            names += [f"{n[: n.index('.experts.')]}.experts" for n in (module, bare)]
        if reader == "sglang":
            names += module.split(".")
        return any(self._readable.match(n) for n in names)

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
            found = self._may_exclude(stem(module)) and (
                self._read(module) or self._names_fused(module)
            )
            self._answers[module] = found
        return found

    def _may_exclude(self, of_names: str) -> bool:
        """Whether a name of some stem may be excluded under any reading. Plain patterns exclude
        names that contain them, so one whose outline is not in the stem's excludes none.
        """
        found = self._named_stems.get(of_names)
        if found is None:
            outline = _outline(of_names)
            found = not self._only_plain or any(o in outline for o in self._plain_by_outline)
            self._named_stems[of_names] = found
        return found

    @cached_property
    def _only_plain(self) -> bool:
        """Whether no pattern is empty, a glob, a regular expression or the name of a fused
        parameter, and few differ in more than numbers.
        """
        plain = all(p and not p.startswith("re:") and not set(_WILD) & set(p) for p in self._exact)
        return plain and not self._fused_patterns and len(self._plain_by_outline) <= MANY

    def _names_fused(self, module: str) -> bool:
        """Whether a pattern is the name of a parameter that engines build of the module."""
        return self._fused_patterns and any(
            name in self._exact or (name.rpartition(".")[2] not in PACKED and self.strict(name))
            for name in fused_names(module)
        )

    @cached_property
    def _fused_patterns(self) -> bool:
        """Whether any pattern ends in the name of such a parameter."""
        ends = (p.rpartition(".")[2].strip("*") for p in self.patterns)
        return any(end in FUSED_PARAMETERS for end in ends)

    def _read(self, name: str) -> bool:
        """Whether a name is excluded under any reading."""
        found = self.strict(name) or self._has_piece(name) or self._matches_part(name)
        if not found and self._globs is not None and name != _bare(name):
            found = self._globs.match(_bare(name)) is not None
        return found

    def _has_piece(self, module: str) -> bool:
        """Whether any pattern stands somewhere in the name."""
        if len(self._plain) <= MANY or len(module) > MANY:
            return self._stands_in(module)
        # A list of every excluded expert by name has tens of thousands of entries and some ten
        # lengths.
        pieces = self._by_length
        return any(
            module[i : i + n] in found
            for n, found in pieces.items()
            for i in range(len(module) - n + 1)
        )

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

        At most `MAX_MATCHES` comparisons are made; a list with more wildcards is compared in part.
        """
        names = list(modules)
        if self._fused_patterns:
            names += dict.fromkeys(fused for name in names for fused in fused_names(name))
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
            if not pattern.startswith("re:") and any(
                part not in text for part in _literals(pattern)
            ):
                result.append(pattern)
                continue
            one = Exclusions([pattern])
            alive = next((i for i, n in enumerate(names) if one.loose(n)), None)
            left -= len(names) if alive is None else alive
            if alive is None:
                result.append(pattern)
        return result
