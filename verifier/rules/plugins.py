# SPDX-License-Identifier: Apache-2.0
"""All rules: the built-in ones, those of installed packages (entry-point group ``ckptgate.rules``)
and those of files (``--plugin``).
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import re
import sys
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from verifier.errors import CkptgateError, MachineError, UsageError
from verifier.findings import SEVERITIES, Finding
from verifier.rules.context import Context
from verifier.rules.registry import DEPTHS, Check, Rule, built_in_rules, collecting, registered

GROUP = "ckptgate.rules"
NEEDS = ("base", "merged_from")
_ID = re.compile(r"[A-Z]{2,12}[0-9]{3,4}")
_NUMBER = itertools.count()


def all_rules(plugins: Sequence[str | os.PathLike[str]] = ()) -> dict[str, Rule]:
    """Return every rule by id: the built-in ones in order, those of installed packages, and those
    of some Python files.

    Files are run again at each call and leave nothing behind; installed packages are imported once.

    Raises:
        UsageError: a plugin cannot be loaded, registers no rule, or registers an id that belongs to
            ckptgate or to a different plugin.
    """
    rules = dict(built_in_rules())
    imported: set[str] = set()
    for rule in registered():
        if rule.id not in rules:
            imported.add(rule.check.__module__.partition(".")[0])
            _join(rules, [rule], f"the module {rule.check.__module__}")
    for entry in sorted(entry_points(group=GROUP), key=lambda e: (e.name, e.value)):
        owner = f"the package {entry.dist.name} ({entry.value})" if entry.dist else entry.value
        registered_now = _of_entry(entry, owner)
        # A package that was imported before has registered its rules already.
        if registered_now or entry.module.partition(".")[0] not in imported:
            _join(rules, registered_now, owner)
    for file in plugins:
        _join(rules, _of_file(Path(file)), os.fspath(file))
    return rules


_LOADED: dict[str, tuple[Rule, ...]] = {}


def _of_entry(entry: EntryPoint, owner: str) -> tuple[Rule, ...]:
    if entry.value not in _LOADED:
        table: dict[str, Rule] = {}
        with collecting(table):
            try:
                entry.load()
            except Exception as error:
                raise UsageError(
                    f"the rules of {owner} cannot be loaded: {_described(error)}"
                ) from error
        _LOADED[entry.value] = tuple(table.values())
    return _LOADED[entry.value]


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
            raise UsageError(f"{path} cannot be loaded: {_described(error)}") from error
        finally:
            del sys.modules[name]
    return tuple(table.values())


def _described(error: BaseException) -> str:
    """Return type, message and location of an error in a plugin."""
    frames = traceback.extract_tb(error.__traceback__)
    text = f"{type(error).__name__}: {error}"
    if not frames or isinstance(error, SyntaxError):
        return text
    return f"{text} ({frames[-1].filename}:{frames[-1].lineno})"


def _join(rules: dict[str, Rule], new: Sequence[Rule], owner: str) -> None:
    """Add a plugin's rules.

    Raises:
        UsageError: it has none, or one of them is not well-formed.
    """
    if not new:
        raise UsageError(f"{owner} registers no rule; decorate a function with verifier.rules.rule")
    for rule in new:
        known = rules.get(rule.id)
        if rule.id.startswith("QC"):
            raise UsageError(
                f"{owner}: {rule.id}: ids that begin with QC are ckptgate's own; choose other"
                " letters"
            )
        if known is not None:
            raise UsageError(
                f"{owner}: {rule.id} is already a rule of {known.origin or 'ckptgate'}"
            )
        problem = _problem(rule)
        if problem:
            raise UsageError(f"{owner}: {rule.id}: {problem}")
        rules[rule.id] = replace(rule, check=_guarded(rule, owner), origin=owner)


def _problem(rule: Rule) -> str:
    """Return what is not well-formed, or ''."""
    if not _ID.fullmatch(rule.id):
        return "an id is 2 to 12 capital letters and 3 or 4 digits, as in ACME101"
    if rule.depth not in DEPTHS:
        return f"no depth {rule.depth!r}; one of {', '.join(DEPTHS)}"
    if rule.severity not in SEVERITIES:
        return f"no severity {rule.severity!r}; one of {', '.join(SEVERITIES)}"
    for name in "|".join(rule.needs).split("|"):
        if name and name not in NEEDS:
            return f"cannot need {name!r}; one of {', '.join(NEEDS)}"
    if not (rule.doc and rule.unit and rule.title):
        return "it has no title, no unit or no docstring to explain it"
    return ""


def _guarded(rule: Rule, owner: str) -> Check:
    """Return a check whose own defects end as one message that names the plugin."""

    def check(ctx: Context) -> Iterator[Finding]:
        try:
            yield from rule.check(ctx)
        except CkptgateError:
            raise
        except Exception as error:
            message = f"the rule {rule.id} of {owner} failed: {_described(error)}"
            raise MachineError(message) from error

    return check
