# SPDX-License-Identifier: Apache-2.0
"""Which findings follow from another finding, so that a report names the cause once.

Two causes make findings of other rules: a shard that is missing or cannot be read, and an exclusion
with the wrong prefix. A finding is explained only if all its places follow from the cause, and only
by a cause that is at least as severe: what cannot be proved from names stays a finding of its own.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from verifier.checkpoint import Checkpoint
from verifier.findings import SEVERITIES, Finding
from verifier.quantized import QuantizedCheckpoint
from verifier.schemes import Declaration

SHARDS = ("QC101", "QC104")
"""Rules that report a file whose tensors cannot be read."""
DEAD_EXCLUSIONS = ("QC404", "QC209")
"""Rules that report an exclusion, as ``observed``, that matches no module."""
TOTAL_SIZE, NOT_EXCLUDED = "QC106", "QC402"
MAX_PREFIX = 2
"""Leading parts by which an exclusion may differ from the module that it was written for."""


def explained(findings: Sequence[Finding], candidate: QuantizedCheckpoint) -> list[Finding]:
    """Return the findings, in order, with `Finding.explained_by` of those that follow from another.

    Args:
        findings: all of a run, with their fingerprints.
        candidate: the checkpoint.
    """
    result = _follow_from(_by_lost_shards(findings, candidate), findings)
    shown = [f for f in result if not f.explained_by]
    return _follow_from(_by_dead_exclusions(shown), result)


Explain = Callable[[Finding], Finding | None]
"""Returns the cause of a finding."""


def _follow_from(explain: Explain, findings: Iterable[Finding]) -> list[Finding]:
    result = []
    for f in findings:
        cause = None if f.explained_by else explain(f)
        if cause is not None and _outranks(cause, f):
            f = replace(f, explained_by=cause.fingerprint)
        result.append(f)
    return result


def _outranks(cause: Finding, finding: Finding) -> bool:
    accepted = cause.standing == "known" and finding.standing != "known"
    milder = SEVERITIES.index(cause.severity) > SEVERITIES.index(finding.severity)
    return not (accepted or milder)


def _places(finding: Finding) -> tuple[str, ...]:
    """Return the tensors of a finding."""
    own = (finding.where.tensor,) if finding.where.tensor else ()
    return finding.places or own


def _by_lost_shards(findings: Sequence[Finding], candidate: QuantizedCheckpoint) -> Explain:
    """Explain findings on tensors of a shard that is missing or broken, of the total size, and of
    exclusions that match modules of such tensors.
    """
    lost = _Lost(candidate.checkpoint, findings)
    alive = lost.exclusions(candidate.declaration)

    def explain(f: Finding) -> Finding | None:
        if f.rule in SHARDS:
            return None
        if f.rule == TOTAL_SIZE or (f.rule in DEAD_EXCLUSIONS and f.observed in alive):
            return lost.first
        return _common(map(lost.cause, _places(f)))

    return explain


class _Lost:
    """The tensors that cannot be read, and the findings on their shards."""

    def __init__(self, stored: Checkpoint, findings: Iterable[Finding]) -> None:
        self._stored = stored.tensors
        self._files = stored.index.weight_map if stored.index else None
        self._only = stored.shards[0].file if len(stored.shards) == 1 else ""
        self._shards = {
            f.where.file: f for f in findings if f.rule in SHARDS and f.where.file is not None
        }
        self.first = next(iter(self._shards.values()), None)

    def cause(self, name: str) -> Finding | None:
        """Return the finding on the shard of a tensor that cannot be read, None for another."""
        if name in self._stored:
            return None
        file = self._only if self._files is None else self._files.get(name)
        return self._shards.get(file or "")

    def exclusions(self, declaration: Declaration | None) -> set[str]:
        """Return the exclusions of modules that have such a tensor; without an index, all of a
        checkpoint of one shard.
        """
        if declaration is None or self.first is None:
            return set()
        patterns = set(declaration.exclude)
        if self._files is None:
            return patterns if not self._stored else set()
        modules = {name.rpartition(".")[0] for name in self._files if self.cause(name)}
        modules |= {name.rpartition(".")[0] for name in modules}
        return patterns - set(declaration.exclusions.dead(modules))


def _common(causes: Iterable[Finding | None]) -> Finding | None:
    """Return the first cause if there is one for each place."""
    found = list(causes)
    return found[0] if found and None not in found else None


def _by_dead_exclusions(findings: Sequence[Finding]) -> Explain:
    """Explain layers that are not excluded, where an exclusion that matches no module would match
    them with more, or fewer, leading parts.
    """
    patterns = [
        (_without_prefix(f.observed), f)
        for f in findings
        if f.rule in DEAD_EXCLUSIONS and f.observed and not f.observed.startswith("re:")
    ]

    def cause_of(weight: str) -> Finding | None:
        module = weight.rpartition(".")[0]
        return next((f for pattern, f in patterns if pattern.match(module)), None)

    def explain(f: Finding) -> Finding | None:
        return _common(map(cause_of, _places(f))) if f.rule == NOT_EXCLUDED else None

    return explain


def _without_prefix(pattern: str) -> re.Pattern[str]:
    """Return what matches a module, or a part of one, whose name differs from an exclusion in up to
    `MAX_PREFIX` leading parts; the exclusion itself matches nothing.
    """
    parts = pattern.split(".")
    shorter = [".".join(parts[n:]) for n in range(1, MAX_PREFIX + 1)]
    globs = [_glob(g) for g in shorter if g.strip("*")]
    more = rf"(?:[^.]+\.){{1,{MAX_PREFIX}}}{_glob(pattern)}"
    return re.compile("|".join(rf"(?:{glob})(?:\..*)?\Z" for glob in [more, *globs]), re.DOTALL)


def _glob(pattern: str) -> str:
    return fnmatch.translate(pattern).removesuffix(r"\Z")
