# SPDX-License-Identifier: Apache-2.0
"""One report of the reports on all subsets of a checkpoint, equal to that of one run over all
shards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from verifier.errors import ContentError
from verifier.findings import (
    OLD_VERDICTS,
    READABLE_VERSIONS,
    Coverage,
    Effect,
    Finding,
    Report,
    Where,
    current_verdict,
)
from verifier.rules import Rule, all_rules
from verifier.run.engine import judge, level
from verifier.run.fingerprints import fingerprinted
from verifier.run.group import group
from verifier.run.share import share_of


def report_of(value: Any) -> Report:
    """Return the report that its JSON form holds.

    Raises:
        ContentError: it is no report, or one of another version.
    """
    try:
        version = value["schema_version"]
        if version not in READABLE_VERSIONS:
            raise ContentError(
                f"a report with schema_version {version!r}; "
                f"{' and '.join(READABLE_VERSIONS)} can be read"
            )
        findings = tuple(map(_finding, value["findings"]))
        coverage = tuple(Coverage(**c) for c in value["coverage"])
        stats = {OLD_VERDICTS.get(key, key): v for key, v in value["stats"].items()}
        verdict = current_verdict(value["verdict"])
        return Report(verdict, value["uri"], value["base"], findings, coverage, stats)
    except (AttributeError, KeyError, TypeError) as error:
        raise ContentError(
            f"not a report of `ckptgate check --format json`: {type(error).__name__}: {error}"
        ) from None


def _finding(value: Any) -> Finding:
    effects = tuple(
        Effect(engine, e["severity"], e["what"]) for engine, e in value["effects"].items()
    )
    return Finding(**{**value, "where": Where(**value["where"]), "effects": effects})


def merge_reports(reports: Iterable[Report]) -> Report:
    """Return the report on all shards from one report on each subset.

    Findings, coverage, verdict and exit code are those of one run over all shards; ``seconds`` is
    the sum.

    Args:
        reports: of `verifier.check` with ``subset``, in any order.

    Raises:
        ContentError: a subset is missing or stands twice, a report is of no subset or of none that
            could be read, or two are not of the same checkpoint judged in the same way.
    """
    parts = _in_order(list(reports))
    rules = all_rules()
    first = parts[0]
    for part in parts[1:]:
        if _identity(part, rules) != _identity(first, rules):
            number, other = first.stats["options"]["subset"], part.stats["options"]["subset"]
            raise ContentError(
                f"the reports on {number} and {other} are of different checkpoints, options or versions"
            )
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    stopped = {k: v for p in reversed(parts) for k, v in p.stats.get("stopped", {}).items()}
    for i, covered in enumerate(first.coverage):
        split = rules[covered.rule].split and covered.ran
        whole = _sum([p.coverage[i] for p in parts], covered.rule in stopped) if split else covered
        found = sorted(
            (f for p in (parts if split else [first]) for f in p.by_rule(covered.rule)), key=level
        )
        findings += group(found, whole.of)
        coverage.append(whole)
    findings = fingerprinted(sorted(findings, key=level))
    options = {k: v for k, v in first.stats["options"].items() if k != "subset"}
    stats: dict[str, Any] = {
        k: v for k, v in first.stats.items() if k not in ("stopped", "inconclusive")
    }
    stats |= {"options": options, "seconds": round(sum(p.stats["seconds"] for p in parts), 3)}
    if "traffic" in stats:
        traffic = [p.stats["traffic"] for p in parts]
        stats["traffic"] = {k: sum(t[k] for t in traffic) for k in ("requests", "bytes")}
    if stopped:
        stats["stopped"] = stopped
    verdict, why = judge(
        bool(stats["formats"]), findings, coverage, options["require"], options["fail_on"]
    )
    if why:
        stats["inconclusive"] = why
    return Report(verdict, first.uri, first.base, tuple(findings), tuple(coverage), stats)


def _in_order(reports: list[Report]) -> list[Report]:
    """Return the reports by the number of their subset, which are all there and of as many."""
    if not reports:
        raise ContentError("no report to merge")
    found: dict[int, Report] = {}
    of = 0
    for report in reports:
        options = report.stats.get("options")
        text = options.get("subset") if isinstance(options, dict) else None
        if not isinstance(text, str):
            raise ContentError(
                f"a report on {report.uri} that is of no subset (`check --subset k/n`): {report.verdict}"
            )
        share = share_of(text)
        if of not in (0, share.of):
            raise ContentError(f"a report of the subset {share} among those of n = {of}")
        if share.number in found:
            raise ContentError(f"two reports are of the subset {share}")
        found[share.number], of = report, share.of
    missing = [n for n in range(1, of + 1) if n not in found]
    if missing:
        raise ContentError(
            f"{len(missing)} of {of} subsets have no report, {missing[0]}/{of} first"
        )
    if any("tensors" not in r.stats for r in reports):
        raise ContentError("a report of a checkpoint that could not be read")
    return [found[n] for n in sorted(found)]


def _identity(report: Report, rules: Mapping[str, Rule]) -> object:
    """Return what the reports on all subsets of one checkpoint have in common."""
    unknown = [c.rule for c in report.coverage if c.rule not in rules]
    if unknown:
        raise ContentError(
            f"a report that knows the rule {unknown[0]}, which this version does not"
        )
    headers = [c for c in report.coverage if rules[c.rule].depth == "header"]
    options = {
        k: v
        for k, v in report.stats["options"].items()
        if k not in ("subset", "base", "merged_from")
    }
    changing = ("seconds", "traffic", "options", "stopped", "inconclusive", "eval")
    return (
        [(c.rule, c.unit) for c in report.coverage],
        headers,
        options,
        {k: v for k, v in report.stats.items() if k not in changing},
        [f for f in report.findings if rules[f.rule].depth == "header"],
    )


def _sum(parts: Sequence[Coverage], stopped: bool) -> Coverage:
    """Return a rule's coverage of all subsets together; the reason is the first that one states."""
    reason = next((c.reason for c in parts if c.reason), "")
    checked = 0 if stopped else sum(c.checked for c in parts)
    return replace(parts[0], checked=checked, of=sum(c.of for c in parts), reason=reason)
