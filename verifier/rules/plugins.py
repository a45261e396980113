# SPDX-License-Identifier: Apache-2.0
"""Rules of others: from installed packages (entry-point group ``ckptgate.rules``) and from files
(``--plugin``).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import get_args

from verifier.errors import CkptgateError, MachineError, UsageError
from verifier.findings import Finding, Severity
from verifier.rules.context import Context
from verifier.rules.registry import DEPTHS, Check, Rule, built_in_rules, collecting, registered

GROUP = "ckptgate.rules"
NEEDS = ("base", "merged_from")
_ID = re.compile(r"[A-Z]{2,12}[0-9]{3,4}")
_NUMBER = itertools.count()


def with_plugins(files: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Rule]:
    """Return every rule by id: the built-in ones, those of installed packages, and those of some
    Python files.

    Files are run anew at each call and leave nothing behind; installed packages are imported once.

    Raises:
        UsageError: a plugin cannot be loaded, registers no rule, or one whose id is not its own to
            give.
    """
    rules = dict(built_in_rules())
    imported: set[str] = set()
    for rule in registered():
        if rule.id not in rules:
            imported.add(rule.check.__module__.partition(".")[0])
            _join(rules, [rule], f"the module {rule.check.__module__}")
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = f"the package {entry.dist.name} ({entry.value})" if entry.dist else entry.value
        found = _of_entry(entry, owner)
        if (
            found or entry.module.partition(".")[0] not in imported
        ):  # one that was imported before has registered
            _join(rules, found, owner)
    for file in files:
        _join(rules, _of_file(Path(file)), os.fspath(file))
    return rules


_LOADED: dict[str, tuple[Rule, ...]] = {}


def _of_entry(entry: EntryPoint, owner: str) -> tuple[Rule, ...]:
    found = _LOADED.get(entry.value)
    if found is None:
        table: dict[str, Rule] = {}
        with collecting(table):
            try:
                entry.load()
            except Exception as error:
                raise UsageError(
                    f"the rules of {owner} cannot be loaded: {_told(error)}"
                ) from error
        found = _LOADED[entry.value] = tuple(table.values())
    return found


def _of_file(path: Path) -> tuple[Rule, ...]:
    if not path.is_file():
        raise UsageError(f"{path}: no such file; --plugin takes a Python file of rules")
    name = f"ckptgate_plugin_{next(_NUMBER)}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path}: not a Python file; its name must end in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    table: dict[str, Rule] = {}
    with collecting(table):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise UsageError(f"{path} cannot be loaded: {_told(error)}") from error
        finally:
            del sys.modules[name]
    return tuple(table.values())


def _told(error: BaseException) -> str:
    """Return kind, message and place of an error in a plugin."""
    frames = traceback.extract_tb(error.__traceback__)
    place = (
        f" ({frames[-1].filename}:{frames[-1].lineno})"
        if frames and not isinstance(error, SyntaxError)
        else ""
    )
    return f"{type(error).__name__}: {error}{place}"


def _join(rules: dict[str, Rule], found: Iterable[Rule], owner: str) -> None:
    """Add a plugin's rules.

    Raises:
        UsageError: it has none, or one of them is not well-formed.
    """
    count = 0
    for rule in found:
        count += 1
        known = rules.get(rule.id)
        if rule.id.startswith("QC"):
            raise UsageError(
                f"{owner}: {rule.id}: ids that begin with QC are ckptgate's own; take letters of your own"
            )
        if known is not None:
            raise UsageError(
                f"{owner}: {rule.id} is a rule of {known.origin or 'ckptgate'} already"
            )
        wrong = _wrong(rule)
        if wrong:
            raise UsageError(f"{owner}: {rule.id}: {wrong}")
        rules[rule.id] = replace(rule, check=_guarded(rule, owner), origin=owner)
    if not count:
        raise UsageError(f"{owner} registers no rule; decorate a function with verifier.rules.rule")


def _wrong(rule: Rule) -> str:
    """Return what is not well-formed, or ''."""
    if not _ID.fullmatch(rule.id):
        return "an id is 2 to 12 capital letters and 3 or 4 digits, as in ACME101"
    if rule.depth not in DEPTHS:
        return f"no depth {rule.depth!r}; one of {', '.join(DEPTHS)}"
    if rule.severity not in get_args(Severity):
        return f"no severity {rule.severity!r}; one of {', '.join(get_args(Severity))}"
    unknown = [n for need in rule.needs for n in need.split("|") if n not in NEEDS]
    if unknown:
        return f"cannot need {unknown[0]!r}; one of {', '.join(NEEDS)}"
    return (
        ""
        if rule.doc and rule.unit and rule.title
        else "it has no title, no unit or no docstring to explain it"
    )


def _guarded(rule: Rule, owner: str) -> Check:
    """Return a check whose own defects end as one message that names the plugin."""

    def check(ctx: Context) -> Iterator[Finding]:
        try:
            yield from rule.check(ctx)
        except CkptgateError:
            raise
        except Exception as error:
            raise MachineError(f"the rule {rule.id} of {owner} failed: {_told(error)}") from error

    return check
