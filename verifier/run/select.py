# SPDX-License-Identifier: Apache-2.0
"""Which rules run, by prefixes of their ids; of two prefixes that match the longer one decides."""

from __future__ import annotations

from collections.abc import Iterable

from verifier.errors import UsageError
from verifier.suggest import suggestions

ALL = "ALL"
Prefixes = str | Iterable[str]


def prefixes(texts: Prefixes, known: Iterable[str], option: str) -> tuple[str, ...]:
    """Return rule prefixes in upper case, each once; ``ALL`` means every rule.

    Args:
        texts: one text or several, each of one prefix or of several separated by commas.
        known: the rule ids.
        option: where the texts come from, for the message.

    Raises:
        UsageError: an empty prefix, or one that no rule begins with; it names the nearest.
    """
    ids = list(known)
    unique: dict[str, None] = {}
    for text in (texts,) if isinstance(texts, str) else texts:
        for part in text.split(","):
            prefix = part.strip().upper()
            if not prefix:
                raise UsageError(
                    f"{option} {text!r}: an empty rule id; `ckptgate rules` lists them"
                )
            if prefix != ALL and not any(i.startswith(prefix) for i in ids):
                near = nearest(prefix, [*ids, *sorted({i[:3] for i in ids})])
                raise UsageError(
                    f"{option}: no rule {part.strip()!r}; {near}`ckptgate rules` lists them"
                )
            unique[prefix] = None
    return tuple(unique)


def nearest(name: str, among: Iterable[str]) -> str:
    """Return the names similar to ``name``, as the beginning of a hint, or ''."""
    near = suggestions(name, among)
    return f"nearest: {', '.join(near)}; " if near else ""


def match(rule: str, among: Iterable[str]) -> str | None:
    """Return the longest prefix that a rule id begins with, or None; ``ALL`` is the shortest."""
    return max((p for p in among if p == ALL or rule.startswith(p)), key=_length, default=None)


class Selection:
    """The result of ``select``, ``ignore`` and ``require`` for each rule.

    Without ``select`` every rule is selected. Where a rule is both selected and ignored the longer
    prefix decides, and of two equal ones ``ignore``.

    Raises:
        UsageError: an unknown prefix, or a required prefix that matches no selected rule.
    """

    def __init__(
        self,
        known: Iterable[str],
        select: Prefixes = (),
        ignore: Prefixes = (),
        require: Prefixes = (),
    ) -> None:
        ids = list(known)
        self.select = prefixes(select, ids, "--select")
        self.ignore = prefixes(ignore, ids, "--ignore")
        self.required = frozenset(
            i for p in prefixes(require, ids, "--require") for i in self._require(p, ids)
        )

    def _require(self, prefix: str, ids: Iterable[str]) -> list[str]:
        matching = [i for i in ids if match(i, [prefix]) is not None]
        selected = [i for i in matching if not self.why_not(i)]
        if not selected:
            raise UsageError(f"{prefix} is required and {self.why_not(matching[0])}")
        return selected

    def why_not(self, rule: str) -> str:
        """Return why a rule is deselected, or '' where it is not."""
        selected = match(rule, self.select) if self.select else ALL
        if selected is None:
            return "not selected"
        ignored = match(rule, self.ignore)
        if ignored is None or _length(selected) > _length(ignored):
            return ""
        return f"ignored by {ignored}"


def _length(prefix: str) -> int:
    return 0 if prefix == ALL else len(prefix)
