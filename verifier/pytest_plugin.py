# SPDX-License-Identifier: Apache-2.0
"""``pytest --ckptgate PATH``: a check as tests, one per rule and one for the verdict.

pytest loads this module in every run if ckptgate is installed, so numpy and the rules are imported
only with ``--ckptgate``. The check runs once, in the first of its tests.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from verifier.text import counted

if TYPE_CHECKING:
    from verifier.findings import Coverage, Report
    from verifier.rules import Rule

NODE = "ckptgate"
DEPENDENT = ("base", "merged_from", "require", "plugin", "depth", "fail_on")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of the check."""
    group = parser.getgroup("ckptgate", "check a quantized checkpoint")
    group.addoption(
        "--ckptgate",
        metavar="PATH",
        dest="ckptgate_uri",
        help="Checkpoint to check, one test per rule.",
    )
    group.addoption(
        "--ckptgate-base",
        metavar="PATH",
        help="Unquantized or less quantized checkpoint to compare with.",
    )
    group.addoption(
        "--ckptgate-merged-from",
        metavar="PATH",
        help="Checkpoint whose bytes a mixed export keeps.",
    )
    group.addoption(
        "--ckptgate-depth",
        choices=("header", "payload", "load"),
        help="How deep to check; header by default.",
    )
    group.addoption(
        "--ckptgate-require",
        metavar="RULE",
        action="append",
        help="Rule that must run; repeatable.",
    )
    group.addoption(
        "--ckptgate-fail-on",
        choices=("error", "warning"),
        help="Lowest severity that fails the check; error by default.",
    )
    group.addoption(
        "--ckptgate-plugin",
        metavar="FILE.py",
        action="append",
        help="Python file with custom rules; repeatable.",
    )


def pytest_configure(config: pytest.Config) -> None:
    """Reject a wrong call before tests are collected; no checkpoint is read yet."""
    if config.getoption("ckptgate_uri") is None:
        stray = next((n for n in DEPENDENT if config.getoption(f"ckptgate_{n}")), None)
        if stray is not None:
            raise pytest.UsageError(f"--ckptgate-{stray.replace('_', '-')} needs --ckptgate PATH")
        return
    from verifier.checkpoint import open_source, require_checkpoint  # noqa: PLC0415  (numpy)
    from verifier.errors import CkptgateError  # noqa: PLC0415

    arguments = _arguments(config)
    try:
        rules = _rules(config)
        for uri in (arguments["uri"], arguments["base"], arguments["merged_from"]):
            if uri is not None:
                source = open_source(uri)
                require_checkpoint(source, source.files())
    except CkptgateError as error:
        raise pytest.UsageError(str(error)) from error
    unknown = [r for r in arguments["require"] if r not in rules]
    if unknown:
        raise pytest.UsageError(f"unknown rule {unknown[0]!r}; `ckptgate rules` lists all rules")


def pytest_report_header(config: pytest.Config) -> str | None:
    """Return the line that names the checkpoint."""
    if config.getoption("ckptgate_uri") is None:
        return None
    arguments = _arguments(config)
    parts = [f"ckptgate: {arguments['uri']}"]
    if arguments["base"]:
        parts.append(f"base {arguments['base']}")
    if arguments["merged_from"]:
        parts.append(f"merged from {arguments['merged_from']}")
    return ", ".join([*parts, f"depth {arguments['depth']}"])


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
    """The check of one checkpoint: one test per rule, then the verdict."""

    def collect(self) -> Iterator[pytest.Item]:
        """Yield the tests."""
        items: list[pytest.Item] = [
            RuleTest.from_parent(self, name=rule.id, rule=rule)
            for rule in _rules(self.config).values()
        ]
        items.append(VerdictTest.from_parent(self, name="verdict"))
        for item in items:
            if self.config.pluginmanager.hasplugin("xdist"):
                # In one group, so that only one worker runs the check.
                item.add_marker(pytest.mark.xdist_group(NODE))
            yield item


class CheckFailure(Exception):
    """The failure of a test of the check; its text is the whole message."""


class _Test(pytest.Item):
    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """Return the findings or the message; a traceback for an internal error only."""
        from verifier.errors import CkptgateError  # noqa: PLC0415

        if isinstance(excinfo.value, CheckFailure | CkptgateError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)


class RuleTest(_Test):
    """One rule. It fails if there are findings, or if it was required and did not run."""

    def __init__(self, *, rule: Rule, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.rule = rule

    def runtest(self) -> None:
        """Fail if the report has failing findings of the rule."""
        from verifier.report.text import findings_text  # noqa: PLC0415  (numpy, see above)

        report, arguments = _report(self.config), _arguments(self.config)
        findings = report.by_rule(self.rule.id)
        covered = next((c for c in report.coverage if c.rule == self.rule.id), None)
        if covered is not None:
            self.user_properties.append(
                ("ckptgate", f"{covered.checked} of {covered.of} {covered.unit}")
            )
        text = findings_text(findings)
        if any(f.rule == self.rule.id for f in report.failing):
            raise CheckFailure(
                f"{text}`ckptgate explain {self.rule.id}` explains the rule and the fix"
            )
        if text:
            self.add_report_section("call", "ckptgate", text)
        self._require_run(covered, self.rule.id in arguments["require"])

    def _require_run(self, covered: Coverage | None, required: bool) -> None:
        """Skip a rule that did not run; fail it if it was required, or if it checked none of the
        units that exist.
        """
        if covered is None or not covered.ran:
            reason = covered.reason if covered is not None else "the checkpoint could not be read"
            if required:
                raise CheckFailure(f"{self.rule.id} is required and did not run: {reason}")
            pytest.skip(reason)
        if covered.of and not covered.checked:
            raise CheckFailure(
                f"{self.rule.id} checked none of {covered.of:,} {covered.unit}: {covered.reason}"
            )
        if required and not covered.checked:
            raise CheckFailure(f"{self.rule.id} is required and found nothing to check")

    def reportinfo(self) -> tuple[os.PathLike[str], None, str]:
        """Return the checkpoint and the title; there is no line."""
        return Path(_arguments(self.config)["uri"]), None, f"{self.rule.id} {self.rule.title}"


class VerdictTest(_Test):
    """The verdict. It fails unless the check passed, so also if it was inconclusive."""

    def runtest(self) -> None:
        """Fail unless the verdict is passed."""
        report = _report(self.config)
        if report.verdict != "passed":
            errors = counted(report.count("error"), "error")
            warnings = counted(report.count("warning"), "warning")
            why = report.summary.inconclusive or f"{errors}, {warnings}"
            raise CheckFailure(
                f"{report.uri}: {report.verdict.upper()} ({why}); exit code {report.exit_code}"
            )

    def reportinfo(self) -> tuple[os.PathLike[str], None, str]:
        """Return the checkpoint and the title; there is no line."""
        return Path(_arguments(self.config)["uri"]), None, "verdict"


_REPORT = pytest.StashKey[Any]()
_RULES = pytest.StashKey[Any]()


def _arguments(config: pytest.Config) -> dict[str, Any]:
    """Return the arguments of `verifier.check`, with ``uri``."""
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
        config.stash[_RULES] = all_rules(_arguments(config)["plugins"])
    rules: dict[str, Rule] = config.stash[_RULES]
    return rules


def _report(config: pytest.Config) -> Report:
    """Return the report of the session's check, or raise its error."""
    from verifier.errors import CkptgateError  # noqa: PLC0415
    from verifier.run import check  # noqa: PLC0415

    if _REPORT not in config.stash:
        try:
            config.stash[_REPORT] = check(**_arguments(config))
        except CkptgateError as error:
            config.stash[_REPORT] = error
    result: Report | CkptgateError = config.stash[_REPORT]
    if isinstance(result, CkptgateError):
        raise result.with_traceback(None)
    return result


@pytest.fixture(scope="session")
def ckptgate_report(pytestconfig: pytest.Config) -> Report:
    """Return the report of the check; the test is skipped without ``--ckptgate PATH``."""
    if pytestconfig.getoption("ckptgate_uri") is None:
        pytest.skip("needs --ckptgate PATH")
    return _report(pytestconfig)


Layout = str | os.PathLike[str]


@pytest.fixture(scope="session")
def assert_same_layout() -> Callable[[Layout, Layout], None]:
    """Return a function that asserts that two checkpoints have the same names, dtypes and shapes;
    values may differ.
    """

    def same_layout(a: Layout, b: Layout) -> None:
        __tracebackhide__ = True
        from verifier.checkpoint import open_checkpoint  # noqa: PLC0415
        from verifier.inspect.diff import Diff, layout, problems_of, side_of  # noqa: PLC0415  (numpy)
        from verifier.inspect.render import diff_text  # noqa: PLC0415

        left, right = open_checkpoint(a), open_checkpoint(b)
        changes = layout(left, right)
        if changes or problems_of(left) or problems_of(right):
            common = len(left.tensors.keys() & right.tensors.keys())
            difference = Diff(side_of(left), side_of(right), common, tuple(changes))
            raise AssertionError(f"different layouts\n{diff_text(difference)}")

    return same_layout
