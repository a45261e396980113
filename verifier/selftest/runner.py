# SPDX-License-Identifier: Apache-2.0
"""Runs the self-test: tiny valid checkpoints must pass, and every injected defect must be caught.

It names no rule and no defect: it runs those of the registry and of the table of defects.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from verifier.errors import UsageError
from verifier.findings import Report, rules_of
from verifier.progress import Progress, no_progress
from verifier.rules import all_rules
from verifier.run import check
from verifier.selftest.corruptor import KINDS, Corruptor, traits_of
from verifier.selftest.defects import CORRUPTORS
from verifier.selftest.editor import CheckpointEditor
from verifier.selftest.tiny import TINY, TinyCheckpoint, make

Status = Literal["caught", "missed", "unfit", "skipped"]
DEPTHS = ("header", "payload")
"""The depths that are run: the others need torch and a model."""


@dataclass(frozen=True, slots=True)
class CleanResult:
    """The checks of a valid checkpoint, with a base and without.

    Attributes:
        name: of the checkpoint.
        family: its model type.
        kind: its format.
        rules: those that warned or failed, although nothing is wrong.
        notes: rules that reported something for information, with or without a defect.
        verdict: the worse one.
    """

    name: str
    family: str
    kind: str
    rules: tuple[str, ...] = ()
    notes: frozenset[str] = frozenset()
    verdict: str = "passed"

    @property
    def passed(self) -> bool:
        """Whether no rule warned or failed."""
        return not self.rules and self.verdict == "passed"


@dataclass(slots=True)
class Trial:
    """One defect, made in every checkpoint that it suits.

    Attributes:
        rule: the rule that must catch it.
        name: of the defect.
        caught: the checkpoints in which its rule caught it, at the severity that it states.
        missed: those in which it did not.
        unmade: those in which the defect could not be made, and why; it proves nothing there.
        others: other rules that reported it, without the notes of the valid checkpoint.
        unexpected: rules that failed, although the defect does not name them.
        skipped: why it was not tried.
    """

    rule: str
    name: str
    caught: list[str] = field(default_factory=list)
    missed: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    skipped: str = ""

    @property
    def status(self) -> Status:
        """The result in one word."""
        if self.missed or (self.unmade and not self.caught):
            return "missed"
        if self.caught:
            return "caught"
        return "skipped" if self.skipped else "unfit"


@dataclass(frozen=True, slots=True)
class SelftestResult:
    """The result of a self-test."""

    clean: tuple[CleanResult, ...]
    trials: tuple[Trial, ...]
    rules: tuple[str, ...]

    @property
    def unverified(self) -> dict[str, str]:
        """The rules of which no defect was caught, and why; `not_run` aside."""
        reasons: dict[str, str] = {}
        for rule in self.rules:
            trials = [t for t in self.trials if t.rule == rule]
            if not any(t.caught for t in trials) and rule not in self.not_run:
                reasons[rule] = _why_unverified(trials)
        return reasons

    @property
    def not_run(self) -> tuple[str, ...]:
        """The rules of depths load and eval, which the project's tests verify instead."""
        return tuple(r for r in self.rules if all_rules()[r].depth not in DEPTHS)

    @property
    def passed(self) -> bool:
        """Whether all valid checkpoints passed, all defects were caught and all rules verified."""
        missed = any(t.missed for t in self.trials)
        return all(c.passed for c in self.clean) and not missed and not self.unverified


def _why_unverified(trials: list[Trial]) -> str:
    if not trials:
        return "no defect"
    if any(t.missed for t in trials):
        return "missed"
    skipped = [t.skipped for t in trials if t.skipped]
    return skipped[0] if skipped else "its defects suit no built-in checkpoint"


def selftest(
    rules: Collection[str] = (),
    *,
    checkpoints: Collection[str] = (),
    progress: Progress = no_progress,
) -> SelftestResult:
    """Make the tiny checkpoints in a temporary directory, and every defect in each that it suits.

    Args:
        rules: the rules to verify; all if empty.
        checkpoints: the names of the tiny checkpoints to use; all if empty.
        progress: called with the tiny checkpoints that are done and their number.

    Raises:
        UsageError: an unknown rule or checkpoint.
    """
    known = all_rules()
    for name in rules:
        if name not in known:
            raise UsageError(f"unknown rule {name!r}; `ckptgate rules` lists them")
    names = [t.name for t in TINY]
    for name in checkpoints:
        if name not in names:
            raise UsageError(f"unknown checkpoint {name!r}; available: {', '.join(names)}")
    chosen = tuple(r for r in known if not rules or r in rules)
    corruptors = [c for c in CORRUPTORS if c.rule in chosen]
    trials = [Trial(c.rule, c.name) for c in corruptors]
    clean: list[CleanResult] = []
    with tempfile.TemporaryDirectory(prefix="ckptgate-selftest-") as directory:
        used = [spec for spec in TINY if not checkpoints or spec.name in checkpoints]
        for number, spec in enumerate(used):
            progress(number, len(used), spec.name)
            tiny = make(Path(directory), spec)
            traits = traits_of(CheckpointEditor(tiny.path))
            clean.append(_check_clean(tiny))
            for corruptor, trial in zip(corruptors, trials, strict=True):
                _try(tiny, traits, corruptor, trial, clean[-1].notes)
    return SelftestResult(tuple(clean), tuple(trials), chosen)


def _check_clean(tiny: TinyCheckpoint) -> CleanResult:
    reports = (_check(tiny, tiny.path), check(tiny.path, depth="payload"))
    rules = {f.rule for report in reports for f in report.findings if f.severity != "info"}
    notes = set().union(*(rules_of(report.findings, "info") for report in reports))
    verdict = next((r.verdict for r in reports if r.verdict != "passed"), "passed")
    spec = tiny.spec
    return CleanResult(
        spec.name, spec.family, spec.kind, tuple(sorted(rules)), frozenset(notes), verdict
    )


def _check(tiny: TinyCheckpoint, path: Path) -> Report:
    return check(path, base=tiny.base, merged_from=tiny.merged_from, depth="payload")


def _try(
    tiny: TinyCheckpoint,
    traits: frozenset[str],
    corruptor: Corruptor,
    trial: Trial,
    notes: frozenset[str],
) -> None:
    """Make a defect in a copy of a checkpoint if it suits, check it and record the result."""
    kind, conditions = tiny.spec.kind, corruptor.on
    stated = kind in conditions.kinds and conditions.traits <= traits
    # Other formats and dialects have no kind of their own: a defect of any format is tried on them
    # where it can be made.
    attempted = kind not in KINDS and KINDS <= conditions.kinds and conditions.traits <= traits
    if not (stated or attempted):
        return
    trial.skipped = _why_skipped(corruptor)
    if trial.skipped or not _has_inputs(tiny, corruptor):
        return
    copy = tiny.path.parent / "defect" / "ckpt"
    shutil.copytree(tiny.path, copy)
    try:
        try:
            corruptor.apply(copy)
        except (StopIteration, LookupError, ValueError, TypeError, OSError) as error:
            if stated:
                why = f"cannot be made: {type(error).__name__}: {error}"
                trial.unmade.append(f"{tiny.spec.name} ({why})")
            return
        report = _check(tiny, copy)
    finally:
        shutil.rmtree(copy.parent)
    _record(report, corruptor, trial, tiny.spec.name, stated, notes)


def _why_skipped(corruptor: Corruptor) -> str:
    """Return why a defect is tried on no checkpoint, or ''."""
    depth = all_rules()[corruptor.rule].depth
    if depth not in DEPTHS:
        return f"needs depth {depth}"
    for need in corruptor.on.needs:
        inputs = set(need.split("|"))
        if not inputs & {"base", "merged_from"}:
            return f"needs {' or '.join(sorted(inputs))}"
    return ""


def _has_inputs(tiny: TinyCheckpoint, corruptor: Corruptor) -> bool:
    """Whether a checkpoint comes with the inputs that a defect needs."""
    inputs = {"base", "merged_from"} if tiny.merged_from else {"base"}
    return all(set(need.split("|")) & inputs for need in corruptor.on.needs)


def _record(
    report: Report,
    corruptor: Corruptor,
    trial: Trial,
    name: str,
    stated: bool,
    notes: frozenset[str],
) -> None:
    """Add the report on a checkpoint with a defect to its trial.

    ``stated``: the defect names such a checkpoint; else only a catch counts.
    """
    findings = report.by_rule(corruptor.rule)
    caught = any(f.severity == corruptor.severity for f in findings)
    caught = caught or any(report.by_rule(rule) for rule in corruptor.instead)
    if not caught and not stated:
        return
    (trial.caught if caught else trial.missed).append(name)
    rules = {f.rule for f in report.findings if f.severity != "info" or f.rule not in notes}
    trial.others |= rules - {corruptor.rule}
    trial.unexpected |= rules_of(report.findings, "error") - {corruptor.rule} - corruptor.also


def lines(result: SelftestResult) -> Iterator[str]:
    """Yield the result as text, one line per valid checkpoint and per defect."""
    for clean in result.clean:
        failed = f"FAILED: {clean.verdict}, {', '.join(clean.rules) or 'no finding'}"
        yield f"clean   {clean.name:18} {clean.kind:16} {'passed' if clean.passed else failed}"
    for trial in result.trials:
        if trial.rule not in result.not_run:
            yield f"{trial.rule}  {trial.name:42} {_outcome(trial)}"
    for rule, why in result.unverified.items():
        yield f"{rule}  NOT VERIFIED: {why}"
    if result.not_run:
        why = "depths load and eval need torch, transformers and a model"
        yield f"not run here: {', '.join(result.not_run)} ({why})"
    caught = sum(t.status == "caught" for t in result.trials)
    tried = sum(t.status in ("caught", "missed") for t in result.trials)
    passed = sum(c.passed for c in result.clean)
    rules = len(result.rules) - len(result.not_run)
    yield (
        f"selftest: {'passed' if result.passed else 'FAILED'}: {caught}/{tried} defects caught,"
        f" {passed}/{len(result.clean)} clean checkpoints pass,"
        f" {rules - len(result.unverified)}/{rules} rules verified"
    )


def _outcome(trial: Trial) -> str:
    also = f" (also: {', '.join(sorted(trial.others))})" if trial.others else ""
    if trial.status == "missed":
        return f"MISSED in {', '.join(trial.missed or trial.unmade)}{also}"
    if trial.status == "caught":
        return f"caught {len(trial.caught)}/{len(trial.caught)}{also}"
    return f"skipped: {trial.skipped}" if trial.skipped else "suits no built-in checkpoint"


def as_json(result: SelftestResult) -> dict[str, object]:
    """Return the result as JSON values."""
    return {
        "passed": result.passed,
        "clean": [
            {
                "name": c.name,
                "family": c.family,
                "kind": c.kind,
                "passed": c.passed,
                "verdict": c.verdict,
                "findings": list(c.rules),
            }
            for c in result.clean
        ],
        "defects": [
            {
                "rule": t.rule,
                "name": t.name,
                "status": t.status,
                "caught": t.caught,
                "missed": t.missed,
                "others": sorted(t.others),
                "unexpected": sorted(t.unexpected),
                "skipped": t.skipped,
            }
            for t in result.trials
        ],
        "unverified": result.unverified,
        "not_run": list(result.not_run),
    }


__all__ = ["SelftestResult", "as_json", "lines", "selftest"]
