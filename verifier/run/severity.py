# SPDX-License-Identifier: Apache-2.0
"""The severity of a finding in this run. Rules know nothing of it; docs/add-a-rule.md states
the precedence.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import translate
from typing import NamedTuple

from verifier.errors import UsageError
from verifier.findings import SEVERITIES, Effect, Finding, Severity
from verifier.rules import Rule
from verifier.run.select import ALL, nearest, prefixes

ENGINES = ("vllm", "sglang", "trtllm", "transformers")
PROFILES = (*ENGINES, "strict", "all")
Levels = Mapping[str, str | Mapping[str, str]]


class _Setting(NamedTuple):
    """A severity that the user set for the rules with some prefix: for all tensors, or for those
    whose name a glob matches.
    """

    prefix: str
    glob: str
    level: Severity
    names: re.Pattern[str] | None

    def fits(self, finding: Finding) -> bool:
        if self.prefix != ALL and not finding.rule.startswith(self.prefix):
            return False
        return self.names is None or (
            finding.where.tensor is not None and bool(self.names.match(finding.where.tensor))
        )


class Severities:
    """Maps the severity that a rule gave a finding to the one it has under a profile and the user's
    own severities.

    Args:
        rules: the table of rules.
        profile: one of `PROFILES`, or None for the rules' own severities.
        levels: prefix of rule ids -> a severity, or -> glob over tensor names -> a severity.

    Raises:
        UsageError: an unknown profile, prefix or severity.
    """

    def __init__(
        self, rules: Mapping[str, Rule], profile: str | None = None, levels: Levels | None = None
    ) -> None:
        if profile is not None and profile not in PROFILES:
            raise UsageError(
                f"no profile {profile!r}; {nearest(profile, PROFILES)}one of {', '.join(PROFILES)}"
            )
        self._rules = rules
        self.profile = profile
        self._mapped: dict[tuple[object, ...], tuple[tuple[Effect, ...], Severity, str]] = {}
        self._set = sorted(_settings(levels or {}, rules), key=_order)

    def apply(self, finding: Finding) -> Finding:
        """Return the finding with its severity in this run, the origin of that severity, and what
        every engine does with the defect.
        """
        f = finding
        key = (f.rule, f.severity, f.effects)
        if key not in self._mapped:
            effects = self._effects(f)
            self._mapped[key] = (effects, *self._by_profile(f, effects))
        effects, severity, because = self._mapped[key]
        for setting in self._set:
            if setting.fits(f):
                glob = f" {setting.glob}" if setting.glob else ""
                severity, because = (
                    setting.level,
                    f"configuration: {setting.prefix}{glob} is {setting.level}",
                )
                break
        # Not dataclasses.replace, which is ten times slower: a rule may have a finding for every
        # expert.
        return Finding(
            f.rule,
            severity,
            f.message,
            f.where,
            f.observed,
            f.expected,
            f.count,
            f.of,
            effects,
            because,
            cause=f.cause,
        )

    def _effects(self, finding: Finding) -> tuple[Effect, ...]:
        """Return the effect on every engine, in order: the finding's, else the rule's where the
        severity is the rule's own.
        """
        own = {e.engine: e for e in finding.effects}
        rule = self._rules.get(finding.rule)
        if rule is not None and finding.severity == rule.severity:
            own = {engine: Effect(engine, *rest) for engine, rest in rule.engines.items()} | own
        return tuple(own.get(engine) or Effect(engine, finding.severity, "") for engine in ENGINES)

    def _by_profile(self, finding: Finding, effects: tuple[Effect, ...]) -> tuple[Severity, str]:
        if self.profile == "strict":
            return (
                ("error", "profile strict")
                if finding.severity == "warning"
                else (finding.severity, "")
            )
        if self.profile == "all":
            chosen = min(effects, key=lambda e: (SEVERITIES.index(e.severity), not e.what))
        else:
            known = [e for e in effects if e.engine == self.profile]
            if not known:
                return finding.severity, ""
            chosen = known[0]
        return chosen.severity, f"{chosen.engine}: {chosen.what}" if chosen.what else ""


def _order(setting: _Setting) -> tuple[bool, int]:
    """Globs before whole rules, and longer prefixes before shorter ones."""
    return setting.names is None, 0 if setting.prefix == ALL else -len(setting.prefix)


def _settings(levels: Levels, rules: Iterable[str]) -> Iterable[_Setting]:
    known = list(rules)
    for key, value in levels.items():
        if "," in key:
            raise UsageError(f"severity {key!r}: one rule or prefix for each key")
        (prefix,) = prefixes([key], known, "severity")
        if isinstance(value, str):
            yield _Setting(prefix, "", _level(prefix, value), None)
        else:
            # Of two globs that match, the later one decides.
            for glob, level in reversed(list(value.items())):
                yield _Setting(
                    prefix, glob, _level(f"{prefix} {glob}", level), re.compile(translate(glob))
                )


def _level(subject: str, value: str) -> Severity:
    for level in SEVERITIES:
        if value == level:
            return level
    near = nearest(str(value), SEVERITIES)
    raise UsageError(
        f"severity of {subject}: no level {value!r}; {near}one of {', '.join(SEVERITIES)}"
    )
