# SPDX-License-Identifier: Apache-2.0
"""``pytest --ckptgate URI``: the check as tests, one a rule and one for the verdict.

pytest loads this module in every run on a machine where ckptgate is installed, so numpy and the
rules are imported only where ``--ckptgate`` asks for them. The check runs once, in the first of its
tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from verifier.findings import Coverage, Finding, Report
    from verifier.rules import Rule

NODE = "ckptgate"
OTHERS = ("base", "merged_from", "require", "plugin", "depth", "fail_on")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the check."""
    group = parser.getgroup("ckptgate", "check a quantized checkpoint")
    group.addoption(
        "--ckptgate",
        metavar="URI",
        dest="ckptgate_uri",
        help="The checkpoint to judge, rule by rule.",
    )
    group.addoption(
        "--ckptgate-base", metavar="REF", help="The unquantized checkpoint to judge against."
    )
    group.addoption(
        "--ckptgate-merged-from",
        metavar="VENDOR",
        help="The checkpoint whose bytes a mixed export keeps.",
    )
    group.addoption(
        "--ckptgate-depth",
        choices=("header", "payload", "load"),
        help="What is read; header by default.",
    )
    group.addoption(
        "--ckptgate-require",
        metavar="RULE",
        action="append",
        help="A rule that must run; may be repeated.",
    )
    group.addoption(
        "--ckptgate-fail-on",
        choices=("error", "warning"),
        help="The least severity that fails; error.",
    )
    group.addoption(
        "--ckptgate-plugin", metavar="FILE.py", action="append", help="A file of further rules."
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what is wrong before anything is collected; nothing is read yet."""
    if config.getoption("ckptgate_uri") is None:
        stray = next((n for n in OTHERS if config.getoption(f"ckptgate_{n}")), None)
        if stray is not None:
            raise pytest.UsageError(f"--ckptgate-{stray.replace('_', '-')} needs --ckptgate URI")
        return
    from verifier.checkpoint import open_source  # noqa: PLC0415  (numpy, see above)
    from verifier.errors import CkptgateError  # noqa: PLC0415

    given = _given(config)
    try:
        rules = _rules(config)
        for uri in (given["uri"], given["base"], given["merged_from"]):
            if uri is not None:
                open_source(uri)
    except CkptgateError as error:
        raise pytest.UsageError(str(error)) from error
    unknown = [r for r in given["require"] if r not in rules]
    if unknown:
        raise pytest.UsageError(f"no rule {unknown[0]!r}; `ckptgate rules` lists them")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Say what is judged."""
    if config.getoption("ckptgate_uri") is None:
        return None
    given = _given(config)
    told = [
        f"{label} {given[k]}"
        for k, label in (("base", "base"), ("merged_from", "merged from"))
        if given[k]
    ]
    return ", ".join([f"ckptgate: {given['uri']}", *told, f"depth {given['depth']}"])


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(
    collector: pytest.Collector,
) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Add the check to what the session collects."""
    report = yield
    if (
        isinstance(collector, pytest.Session)
        and collector.config.getoption("ckptgate_uri") is not None
        and report.passed
    ):
        check = Check.from_parent(collector, name=NODE, nodeid=NODE)
        report.result = [*report.result, check]
    return report


class Check(pytest.Collector):
    """The check of one checkpoint: a test a rule, then the verdict."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the tests."""
        items: list[pytest.Item] = [
            RuleTest.from_parent(self, name=rule.id, rule=rule)
            for rule in _rules(self.config).values()
        ]
        items.append(VerdictTest.from_parent(self, name="verdict"))
        for item in items:
            if self.config.pluginmanager.hasplugin("xdist"):
                item.add_marker(
                    pytest.mark.xdist_group(NODE)
                )  # each worker would run the check again
            yield item


class Unsound(Exception):
    """What a test of the check fails with; its text is the whole message."""


class _Test(pytest.Item):
    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the findings or the one message alone; a traceback for what is a defect."""
        from verifier.errors import CkptgateError  # noqa: PLC0415

        if isinstance(excinfo.value, Unsound | CkptgateError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class RuleTest(_Test):
    """One rule: it fails with its findings, and where it was required and did not run."""

    def __init__(self, *, rule: Rule, **given: Any) -> None:
        super().__init__(**given)
        self.rule = rule

    def runtest(self) -> None:
        """Judge by the report."""
        report, given = _report(self.config), _given(self.config)
        found = report.by_rule(self.rule.id)
        covered = next((c for c in report.coverage if c.rule == self.rule.id), None)
        if covered is not None:
            self.user_properties.append(
                ("ckptgate", f"{covered.checked} of {covered.of} {covered.unit}")
            )
        failing = ("error",) if given["fail_on"] == "error" else ("error", "warning")
        text = _shown(report, found)
        if any(f.severity in failing for f in found):
            raise Unsound(
                f"{text}`ckptgate explain {self.rule.id}` says what it means and how to mend it"
            )
        if text:
            self.add_report_section("call", "ckptgate", text)
        self._require_run(covered, self.rule.id in given["require"])

    def _require_run(self, covered: Coverage | None, required: bool) -> None:
        """Skip a rule that did not run; fail one that had to, or that examined none of what is
        there.
        """
        if covered is None or not covered.ran:
            reason = covered.reason if covered is not None else "the checkpoint could not be read"
            if required:
                raise Unsound(f"{self.rule.id} is required and did not run: {reason}")
            pytest.skip(reason)
        if covered.of and not covered.checked:
            raise Unsound(
                f"{self.rule.id} examined none of {covered.of:,} {covered.unit}: {covered.reason}"
            )
        if required and not covered.checked:
            raise Unsound(f"{self.rule.id} is required and found nothing to examine")

    def reportinfo(self) -> tuple[os.PathLike[str], None, str]:
        """Return where the test is: nowhere in a file."""
        return Path(_given(self.config)["uri"]), None, f"{self.rule.id} {self.rule.title}"


class VerdictTest(_Test):
    """The whole: it fails where the check did not pass, also where nothing was found and nothing
    proved.
    """

    def runtest(self) -> None:
        """Judge by the verdict."""
        report = _report(self.config)
        if report.verdict != "passed":
            errors, warnings = report.count("error"), report.count("warning")
            why = (
                report.stats.get("inconclusive")
                or f"{errors} errors, {warnings} warnings in groups"
            )
            raise Unsound(
                f"{report.uri}: {report.verdict.upper()} ({why}); exit code {report.exit_code}"
            )

    def reportinfo(self) -> tuple[os.PathLike[str], None, str]:
        """Return where the test is: nowhere in a file."""
        return Path(_given(self.config)["uri"]), None, "verdict"


def _shown(report: Report, found: tuple[Finding, ...]) -> str:
    """Return findings as the text report shows them, without what it says of the whole."""
    from verifier.report import render_text  # noqa: PLC0415

    if not found:
        return ""
    lines = render_text(replace(report, findings=found, coverage=(), stats={})).splitlines(
        keepends=True
    )
    return "".join(takewhile(lambda line: not line.startswith("checked "), lines))


_REPORT = pytest.StashKey[Any]()
_RULES = pytest.StashKey[Any]()


def _given(config: pytest.Config) -> dict[str, Any]:
    """Return the options as `verifier.check` takes them, with ``uri``."""
    return {
        "uri": config.getoption("ckptgate_uri"),
        "base": config.getoption("ckptgate_base"),
        "merged_from": config.getoption("ckptgate_merged_from"),
        "depth": config.getoption("ckptgate_depth") or "header",
        "require": tuple(config.getoption("ckptgate_require") or ()),
        "fail_on": config.getoption("ckptgate_fail_on") or "error",
        "plugins": tuple(config.getoption("ckptgate_plugin") or ()),
    }


def _rules(config: pytest.Config) -> dict[str, Rule]:
    from verifier.rules import all_rules  # noqa: PLC0415  (numpy)

    if _RULES not in config.stash:
        config.stash[_RULES] = all_rules(_given(config)["plugins"])
    found: dict[str, Rule] = config.stash[_RULES]
    return found


def _report(config: pytest.Config) -> Report:
    """Return the report of the session's one check, or raise what it raised."""
    from verifier.errors import CkptgateError  # noqa: PLC0415
    from verifier.run import check  # noqa: PLC0415

    if _REPORT not in config.stash:
        try:
            config.stash[_REPORT] = check(**_given(config))
        except CkptgateError as error:
            config.stash[_REPORT] = error
    found: Report | CkptgateError = config.stash[_REPORT]
    if isinstance(found, CkptgateError):
        raise found.with_traceback(None)
    return found


@pytest.fixture(scope="session")
def ckptgate_report(pytestconfig: pytest.Config) -> Report:
    """Return the report of the check that ``--ckptgate URI`` asks for; without it the test is
    skipped.
    """
    if pytestconfig.getoption("ckptgate_uri") is None:
        pytest.skip("needs --ckptgate URI")
    return _report(pytestconfig)


Layout = str | os.PathLike[str]


@pytest.fixture(scope="session")
def assert_same_layout() -> Callable[[Layout, Layout], None]:
    """Return a function that holds two checkpoints to the same names, dtypes and shapes; values may
    differ.
    """

    def hold(a: Layout, b: Layout) -> None:
        __tracebackhide__ = True
        from verifier.checkpoint import open_checkpoint  # noqa: PLC0415
        from verifier.inspect.diff import Diff, layout, problems_of, side_of  # noqa: PLC0415  (numpy)
        from verifier.inspect.render import diff_text  # noqa: PLC0415

        left, right = open_checkpoint(a), open_checkpoint(b)
        changes = layout(left, right)
        if changes or problems_of(left) or problems_of(right):
            common = len(left.tensors.keys() & right.tensors.keys())
            raise AssertionError(
                f"another layout\n{diff_text(Diff(side_of(left), side_of(right), common, tuple(changes)))}"
            )

    return hold
