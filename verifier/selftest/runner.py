# SPDX-License-Identifier: Apache-2.0
"""Prove the rules where they are installed: tiny sound checkpoints stay silent, and every defect is
told.

Neither the rules nor the corruptors are named here; what the registry and the table hold is what is
tried.
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
from verifier.rules import all_rules
from verifier.run import check
from verifier.selftest.corruptor import KINDS, Corruptor, traits_of
from verifier.selftest.edit import Folder
from verifier.selftest.table import CORRUPTORS
from verifier.selftest.tiny import TINY, Made, make

Status = Literal["told", "silent", "unfit", "skipped"]


@dataclass(frozen=True, slots=True)
class Clean:
    """A sound checkpoint: ``found`` are the rules that warned or failed it all the same, with a
    base and without.

    ``notes`` are those that told something for information; the defects made in it do not explain
    these.
    """

    name: str
    family: str
    kind: str
    found: tuple[str, ...] = ()
    notes: frozenset[str] = frozenset()
    verdict: str = "passed"

    @property
    def silent(self) -> bool:
        """Whether no rule warned or failed it and the verdict was passed."""
        return not self.found and self.verdict == "passed"


@dataclass(slots=True)
class Trial:
    """One corruptor: on which checkpoints its rule spoke up at the severity that it states, and on
    which it did not.

    ``unmade`` are those where the defect cannot be made, which proves nothing either way.
    ``others`` are the other rules that spoke up, what they note of the clean one too aside;
    ``unexpected`` those at error level that the corruptor does not name.
    """

    rule: str
    name: str
    told: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    unmade: list[str] = field(default_factory=list)
    others: set[str] = field(default_factory=set)
    unexpected: set[str] = field(default_factory=set)
    skipped: str = ""

    @property
    def status(self) -> Status:
        """What became of it."""
        if self.silent or (self.unmade and not self.told):
            return "silent"
        if self.told:
            return "told"
        return "skipped" if self.skipped else "unfit"


@dataclass(frozen=True, slots=True)
class Result:
    """What a self-test found."""

    clean: tuple[Clean, ...]
    trials: tuple[Trial, ...]
    rules: tuple[str, ...]

    @property
    def unproved(self) -> dict[str, str]:
        """Rules of which no corruptor was told, and why; a rule beyond depth payload is none of
        them.
        """
        found: dict[str, str] = {}
        for rule in self.rules:
            mine = [t for t in self.trials if t.rule == rule]
            if any(t.told for t in mine) or rule in self.elsewhere:
                continue
            if not mine:
                found[rule] = "no corruptor"
            elif any(t.silent for t in mine):
                found[rule] = "silent"
            else:
                found[rule] = next(
                    (t.skipped for t in mine if t.skipped),
                    "no built-in checkpoint suits its corruptors",
                )
        return found

    @property
    def elsewhere(self) -> tuple[str, ...]:
        """The rules of depths load and eval, which take torch and a model: the project's tests
        prove them, not this.
        """
        return tuple(r for r in self.rules if all_rules()[r].depth not in ("header", "payload"))

    @property
    def passed(self) -> bool:
        """Whether every clean checkpoint was silent, every corruptor that suits one was told, and
        no rule is unproved.
        """
        return (
            all(c.silent for c in self.clean)
            and not any(t.silent for t in self.trials)
            and not self.unproved
        )


def selftest(rules: Collection[str] = (), *, checkpoints: Collection[str] = ()) -> Result:
    """Make the tiny checkpoints in a temporary folder and try every corruptor on every one that it
    suits.

    Args:
        rules: the rules to prove; all where empty.
        checkpoints: the names of the tiny checkpoints to use; all where empty.

    Raises:
        UsageError: an unknown rule or checkpoint.
    """
    known = all_rules()
    for name in rules:
        if name not in known:
            raise UsageError(f"no rule {name!r}; `ckptgate rules` lists them")
    for name in checkpoints:
        if name not in {t.name for t in TINY}:
            raise UsageError(f"no checkpoint {name!r}; one of {', '.join(t.name for t in TINY)}")
    chosen = tuple(r for r in known if not rules or r in rules)
    trials = [Trial(c.rule, c.name) for c in CORRUPTORS if c.rule in chosen]
    todo = [c for c in CORRUPTORS if c.rule in chosen]
    clean: list[Clean] = []
    with tempfile.TemporaryDirectory(prefix="ckptgate-selftest-") as folder:
        root = Path(folder)
        for tiny in TINY:
            if checkpoints and tiny.name not in checkpoints:
                continue
            made = make(root, tiny)
            clean.append(_clean(made))
            traits = traits_of(Folder(made.path))
            for corruptor, trial in zip(todo, trials, strict=True):
                _try(root, made, traits, corruptor, trial, clean[-1].notes)
    return Result(tuple(clean), tuple(trials), chosen)


def _clean(made: Made) -> Clean:
    reports = (_judge(made, made.path), check(made.path, depth="payload"))
    found = sorted({f.rule for report in reports for f in report.findings if f.severity != "info"})
    worst = next((r.verdict for r in reports if r.verdict != "passed"), "passed")
    notes = {r for report in reports for r in rules_of(report.findings, "info")}
    return Clean(
        made.tiny.name, made.tiny.family, made.tiny.kind, tuple(found), frozenset(notes), worst
    )


def _judge(made: Made, path: Path) -> Report:
    return check(path, base=made.base, merged_from=made.merged_from, depth="payload")


def _try(
    root: Path,
    made: Made,
    traits: frozenset[str],
    corruptor: Corruptor,
    trial: Trial,
    notes: frozenset[str],
) -> None:
    stated = made.tiny.kind in corruptor.formats and corruptor.traits <= traits
    # Other formats and dialects have no kind of their own: a defect of any format is tried on them
    # where it can be made.
    if not stated and not (
        made.tiny.kind not in KINDS and KINDS <= corruptor.formats and corruptor.traits <= traits
    ):
        return
    given = {"base"} | ({"merged_from"} if made.merged_from else set())
    for need in corruptor.needs:
        alternatives = set(need.split("|"))
        if not alternatives & given:
            if not alternatives & {"base", "merged_from"}:
                trial.skipped = f"needs {' or '.join(sorted(alternatives))}"
            return
    if str(corruptor.depth) not in ("header", "payload"):
        trial.skipped = f"needs depth {corruptor.depth}"
        return
    work = root / "work" / "ckpt"
    shutil.copytree(made.path, work)
    try:
        try:
            corruptor.apply(work)
        except (StopIteration, LookupError, ValueError, TypeError, OSError) as error:
            if stated:
                trial.unmade.append(
                    f"{made.tiny.name} (cannot be made: {type(error).__name__}: {error})"
                )
            return
        report = _judge(made, work)
    finally:
        shutil.rmtree(root / "work")
    told = any(f.severity == corruptor.severity for f in report.by_rule(corruptor.rule))
    told = told or any(report.by_rule(r) for r in corruptor.instead)
    if not told and not stated:
        return
    (trial.told if told else trial.silent).append(made.tiny.name)
    spoke = {f.rule for f in report.findings if f.severity != "info" or f.rule not in notes}
    trial.others |= spoke - {corruptor.rule}
    trial.unexpected |= rules_of(report.findings, "error") - {corruptor.rule} - corruptor.also


def lines(result: Result) -> Iterator[str]:
    """Yield the result as text, one line a checkpoint and a corruptor."""
    for clean in result.clean:
        said = (
            "silent"
            if clean.silent
            else f"NOT SILENT: {clean.verdict}, {', '.join(clean.found) or 'no finding'}"
        )
        yield f"clean   {clean.name:18} {clean.kind:16} {said}"
    for trial in result.trials:
        if trial.rule in result.elsewhere:
            continue
        count = len(trial.told) + len(trial.silent)
        said = f"{trial.status}{f' on {len(trial.told)} of {count}' if count else ''}"
        if trial.status == "silent":
            said = f"SILENT on {', '.join(trial.silent or trial.unmade)}"
        elif trial.status == "skipped":
            said = f"skipped: {trial.skipped}"
        others = f"   others: {', '.join(sorted(trial.others))}" if trial.others else ""
        yield f"{trial.rule}  {trial.name:42} {said}{others}"
    for rule, why in result.unproved.items():
        yield f"{rule}  NOT PROVED: {why}"
    if result.elsewhere:
        yield f"not run here: {', '.join(result.elsewhere)} (depths load and eval: torch, transformers and a model)"
    told = sum(t.status == "told" for t in result.trials)
    tried = sum(t.status in ("told", "silent") for t in result.trials)
    clean_ = sum(c.silent for c in result.clean)
    here = len(result.rules) - len(result.elsewhere)
    yield (
        f"selftest: {'passed' if result.passed else 'FAILED'}: {told} of {tried} defects told, "
        f"{clean_} of {len(result.clean)} clean checkpoints silent, "
        f"{here - len(result.unproved)} of {here} rules proved"
    )


def as_json(result: Result) -> dict[str, object]:
    """Return the result as JSON values."""
    return {
        "passed": result.passed,
        "clean": [
            {
                "name": c.name,
                "family": c.family,
                "kind": c.kind,
                "silent": c.silent,
                "verdict": c.verdict,
                "findings": list(c.found),
            }
            for c in result.clean
        ],
        "corruptors": [
            {
                "rule": t.rule,
                "name": t.name,
                "status": t.status,
                "told": t.told,
                "silent": t.silent,
                "others": sorted(t.others),
                "unexpected": sorted(t.unexpected),
                "skipped": t.skipped,
            }
            for t in result.trials
        ],
        "unproved": result.unproved,
        "not_run": list(result.elsewhere),
    }


__all__ = ["Result", "as_json", "lines", "selftest"]
