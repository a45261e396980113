# SPDX-License-Identifier: Apache-2.0
"""The report as JUnit XML: one test case for each rule, and one for the verdict.

A rule that did not run is skipped with its reason, findings that fail the check are a failure,
other findings are output. An inconclusive check, or one that ended in an error, is an error of the
case ``verdict``: readers of JUnit alone must not see green.
"""

from __future__ import annotations

from collections.abc import Iterable

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from verifier.findings import Coverage, Finding, Report
from verifier.report.wording import MAX_PER_RULE, reason, sentence, verdict_line
from verifier.text import printable


def render_junit(report: Report) -> str:
    """Return a JUnit document."""
    suite = TestSuite("ckptgate")
    suite.add_property("uri", printable(report.uri, 2000))
    suite.add_property("verdict", report.verdict)
    covered = {c.rule: c for c in report.coverage}
    bad = {id(f) for f in report.failing}
    for rule in sorted({*covered, *(f.rule for f in report.findings)}):
        suite.add_testcase(_case(rule, covered.get(rule), report.by_rule(rule), bad))
    overall = TestCase("verdict", "ckptgate")
    if report.verdict in ("inconclusive", "error"):
        error = Error(reason(report) or report.verdict, report.verdict)
        error.text = verdict_line(report)
        overall.result = [error]
    suite.add_testcase(overall)
    document = JUnitXml("ckptgate")
    document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    data: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return f'<?xml version="1.0" encoding="utf-8"?>\n{data.decode("utf-8").rstrip()}\n'


def _case(
    rule: str, covered: Coverage | None, findings: tuple[Finding, ...], bad: set[int]
) -> TestCase:
    case = TestCase(
        f"{rule} {printable(covered.title)}".strip() if covered else rule, f"ckptgate.{rule[:3]}"
    )
    failing = [f for f in findings if id(f) in bad]
    if failing:
        failure = Failure(printable(failing[0].message), rule)
        failure.text = _lines(failing)
        case.result = [failure]
    elif covered is not None and not covered.ran:
        case.result = [Skipped(printable(covered.reason))]
    output = _lines([f for f in findings if id(f) not in bad])
    if covered is not None and covered.ran:
        output += f"checked {covered.checked:,} of {covered.of:,} {printable(covered.unit)}\n"
        if covered.checked < covered.of:
            output += f"{printable(covered.reason)}\n"
    if output:
        case.system_out = output
    return case


def _lines(findings: Iterable[Finding]) -> str:
    lines = [f"{f.severity} {sentence(f)}\n" for f in findings]
    rest = len(lines) - MAX_PER_RULE
    return "".join(lines[:MAX_PER_RULE]) + (f"and {rest} more\n" if rest > 0 else "")
