# SPDX-License-Identifier: Apache-2.0
"""Merges the reports on all subsets of a checkpoint into one, equal to that of one run over all
modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from verifier.errors import ContentError, UsageError
from verifier.findings import (
    READABLE_VERSIONS,
    Coverage,
    Effect,
    Finding,
    Report,
    Where,
    current_verdict,
)
from verifier.rules import Rule, all_rules
from verifier.run.fingerprints import fingerprinted
from verifier.run.group import group
from verifier.run.subset import subset_of
from verifier.run.unchecked import totals
from verifier.run.verdict import severity_rank, verdict_of
from verifier.summary import Fetched, NotChecked, ReportedOptions, Summary, summary_of
from verifier.text import counted, listed


def report_of(value: Any) -> Report:
    """Return the report that its JSON form holds.

    Raises:
        ContentError: it is not a report, or one of a version that cannot be read.
    """
    try:
        version = value["schema_version"]
        if version not in READABLE_VERSIONS:
            raise ContentError(
                f"a report with schema_version {version!r}; "
                f"{' and '.join(READABLE_VERSIONS)} can be read"
            )
        return Report(
            current_verdict(value["verdict"]),
            value["uri"],
            value["base"],
            tuple(map(_finding, value["findings"])),
            tuple(Coverage(**c) for c in value["coverage"]),
            summary_of(value["stats"]),
        )
    except (AttributeError, KeyError, TypeError) as error:
        raise ContentError(
            f"not a report of `ckptgate check --format json`: {type(error).__name__}: {error}"
        ) from None


def _finding(value: Any) -> Finding:
    effects = tuple(
        Effect(engine, e["severity"], e["what"]) for engine, e in value["effects"].items()
    )
    places = tuple(value.get("places", ()))
    where = Where(**value["where"])
    return Finding(**{**value, "where": where, "effects": effects, "places": places})


def merge_reports(reports: Iterable[Report]) -> Report:
    """Return the report on all modules from one report on each subset.

    Findings, coverage, verdict and exit code are those of one run over all modules; ``seconds`` is
    the sum.

    Args:
        reports: of `verifier.check` with ``subset``, in any order.

    Raises:
        UsageError: a subset is missing.
        ContentError: a subset is there twice, a report is not of a subset or the
            checkpoint could not be read, or two are of different checkpoints or options.
    """
    parts = _in_order(list(reports))
    rules, first = all_rules(), parts[0]
    _require_equal(parts, rules)
    findings, coverage, stopped = _results(parts, rules)
    options = replace(_options(first), subset=None)
    contents = first.summary.contents
    quantized = contents is not None and bool(contents.formats)
    left_out = _not_checked(parts)
    verdict, reason = verdict_of(
        quantized, findings, coverage, options.require, options.fail_on, left_out
    )
    summary = replace(
        first.summary,
        options=options,
        stopped=stopped,
        seconds=round(sum(p.summary.seconds or 0.0 for p in parts), 3),
        fetched=_fetched(parts),
        inconclusive=reason,
        not_checked=left_out,
        scale_bytes_read=_scale_bytes(parts),
        advice={rule: advice for part in parts for rule, advice in part.summary.advice.items()},
    )
    return Report(verdict, first.uri, first.base, tuple(findings), tuple(coverage), summary)


def _results(
    parts: Sequence[Report], rules: Mapping[str, Rule]
) -> tuple[list[Finding], list[Coverage], dict[str, str]]:
    """Return findings and coverage over all subsets, and the rules that could not finish."""
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    stopped: dict[str, str] = {}
    for part in reversed(parts):
        stopped |= part.summary.stopped
    for i, covered in enumerate(parts[0].coverage):
        split = rules[covered.rule].split and covered.ran
        if split:
            covered = _sum([p.coverage[i] for p in parts], covered.rule in stopped)
        of_rule = [f for p in (parts if split else parts[:1]) for f in p.by_rule(covered.rule)]
        findings += group(sorted(of_rule, key=severity_rank), covered.of)
        coverage.append(covered)
    return fingerprinted(sorted(findings, key=severity_rank)), coverage, stopped


def _fetched(parts: Sequence[Report]) -> Fetched | None:
    """Return what all subsets fetched, None where they read local directories."""
    amounts = [p.summary.fetched for p in parts if p.summary.fetched is not None]
    requests, nbytes = sum(a.requests for a in amounts), sum(a.bytes for a in amounts)
    return Fetched(requests, nbytes) if amounts else None


def _not_checked(parts: Sequence[Report]) -> tuple[NotChecked, ...]:
    """Return what all subsets left unexamined: every one has read all headers, and the values of
    its own modules.
    """
    of_headers = [e for e in parts[0].summary.not_checked if e.kind not in ("values", "weights")]
    entries = [e for p in parts for e in p.summary.not_checked]
    values = (e for e in entries if e.kind == "values")
    weights = (e for e in entries if e.kind == "weights")
    return totals([*of_headers, *values, *weights])


def _scale_bytes(parts: Sequence[Report]) -> int | None:
    """Return the bytes of the scales that were read in all subsets, None where none reads all."""
    amounts = [p.summary.scale_bytes_read for p in parts if p.summary.scale_bytes_read is not None]
    return sum(amounts) if amounts else None


def _in_order(reports: list[Report]) -> list[Report]:
    """Return the reports in the order of their subsets, all of which are there once."""
    if not reports:
        raise UsageError("no report to merge")
    by_number: dict[int, Report] = {}
    of = 0
    for report in reports:
        subset = subset_of(_options(report).subset or "")
        if of not in (0, subset.of):
            raise ContentError(f"a report of the subset {subset} among those of n = {of}")
        if subset.number in by_number:
            raise ContentError(f"two reports are of the subset {subset}")
        by_number[subset.number], of = report, subset.of
    missing = [n for n in range(1, of + 1) if n not in by_number]
    if missing:
        names = listed((f"{number}/{of}" for number in missing), 4)
        raise UsageError(f"no report for {names}: {counted(len(missing), 'subset')} missing")
    if any(r.summary.contents is None for r in reports):
        raise ContentError("a report of a checkpoint that could not be read")
    return [by_number[n] for n in sorted(by_number)]


def _options(report: Report) -> ReportedOptions:
    """Return the options of a report on a subset."""
    options = report.summary.options
    if options is None or not isinstance(options.subset, str):
        raise ContentError(
            f"the report on {report.uri} ({report.verdict}) is not of a subset"
            " (`check --subset k/n`)"
        )
    return options


def _require_equal(parts: Sequence[Report], rules: Mapping[str, Rule]) -> None:
    first = _identity(parts[0], rules)
    for part in parts[1:]:
        if _identity(part, rules) != first:
            raise ContentError(
                f"the reports on {_options(parts[0]).subset} and {_options(part).subset} are of"
                " different checkpoints, options or versions"
            )


def _identity(report: Report, rules: Mapping[str, Rule]) -> object:
    """Return what the reports on all subsets of one checkpoint have in common."""
    unknown = [c.rule for c in report.coverage if c.rule not in rules]
    if unknown:
        raise ContentError(
            f"a report that knows the rule {unknown[0]}, which this version does not"
        )
    return (
        [(c.rule, c.unit) for c in report.coverage],
        [c for c in report.coverage if rules[c.rule].depth == "header"],
        replace(_options(report), subset=None, base=None, merged_from=None),
        _common(report.summary),
        [f for f in report.findings if rules[f.rule].depth == "header"],
    )


def _common(summary: Summary) -> Summary:
    """Return a summary without what differs from subset to subset."""
    return replace(
        summary,
        options=None,
        fetched=None,
        stopped={},
        seconds=None,
        inconclusive="",
        not_checked=(),
        scale_bytes_read=None,
        evaluation=None,
        advice={},
    )


def _sum(parts: Sequence[Coverage], stopped: bool) -> Coverage:
    """Return a rule's coverage over all subsets; the reason is the first that one of them has."""
    reason = next((c.reason for c in parts if c.reason), "")
    checked = 0 if stopped else sum(c.checked for c in parts)
    return replace(parts[0], checked=checked, of=sum(c.of for c in parts), reason=reason)
