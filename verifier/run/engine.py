# SPDX-License-Identifier: Apache-2.0
"""Run every rule that the depth and the inputs allow, and reach a verdict."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.compare.fingerprints import fingerprinted
from verifier.errors import ContainerError, ContentError, UsageError
from verifier.findings import Coverage, Finding, Report, Severity, Verdict, Where, failing
from verifier.rules import DEPTHS, Context, Depth, Rule, Tally, all_rules
from verifier.run.group import group
from verifier.run.select import Prefixes, Selection
from verifier.run.severity import Levels, Severities

if TYPE_CHECKING:
    from verifier.compare.baseline import Baseline

Path = str | os.PathLike[str]


def check(
    uri: Path,
    *,
    plugins: Sequence[Path] = (),
    base: Path | None = None,
    merged_from: Path | None = None,
    depth: Depth = "header",
    require: Prefixes = (),
    fail_on: Severity = "error",
    select: Prefixes = (),
    ignore: Prefixes = (),
    profile: str | None = None,
    severity: Levels | None = None,
    baseline: Path | None = None,
    tp: int | None = None,
    ep: int | None = None,
) -> Report:
    """Judge a checkpoint and return the report; nothing is written.

    Args:
        uri: the folder, a path or an fsspec URL.
        plugins: Python files of further rules; those of installed packages run anyway (docs/plugins.md).
        base: the unquantized (or less quantized) checkpoint to judge against.
        merged_from: the checkpoint whose bytes a mixed export keeps.
        depth: ``header`` reads headers and configs; ``payload`` every scale and unquantized tensor as well, and with a
            base or ``merged_from`` every weight.
        require: rules, by id or prefix, that must run; one that did not makes the verdict unproven.
        fail_on: ``warning`` lets warnings fail too.
        select: prefixes of rule ids (``QC5``, ``QC501,QC3``, ``ALL``): the rules that run; without any, all.
        ignore: prefixes of rules that do not run; of two prefixes that match a rule the longer one decides.
        profile: judge as one engine would: ``vllm``, ``sglang``, ``trtllm``, ``transformers``; ``all`` takes the worst of
            the four, ``strict`` makes errors of warnings.
        severity: a severity for each prefix of rules, or for each glob over tensor names: ``{"QC515": {"*.w2.*": "info"}}``.
        baseline: a file of accepted findings, which do not fail the check as long as they do not get worse.
        tp: the tensor parallel size to serve with; every linear is then divided as engines divide it (QC309).
        ep: the expert parallel size to serve with.

    Raises:
        UsageError: a folder that does not exist, an unknown rule, depth, profile or severity, a baseline that is none, no
            ranks.
        ContentError: the base cannot be read as a checkpoint.
        MachineError: reading failed.
    """
    rules = all_rules(plugins)
    if depth not in DEPTHS[:2]:
        raise UsageError(f"no depth {depth!r}; one of header, payload")
    chosen, severities = Selection(rules, select, ignore, require), Severities(rules, profile, severity)
    if fail_on not in ("error", "warning"):
        raise UsageError(f"cannot fail on {fail_on!r}; error or warning")
    for name, ranks in (("tp", tp), ("ep", ep)):
        if ranks is not None and ranks < 1:
            raise UsageError(f"cannot serve with {name} = {ranks}; 1 or more")
    started = time.perf_counter()
    others = {"base": base, "merged_from": merged_from}
    known = _baseline(baseline)
    options = {"depth": depth, "require": sorted(chosen.required), "fail_on": fail_on, "tp": tp, "ep": ep} | {
        k: os.fspath(v) if v is not None else None for k, v in (others | {"baseline": baseline}).items()
    }
    options |= {"select": list(chosen.select), "ignore": list(chosen.ignore), "profile": profile}
    options["plugins"] = [os.fspath(p) for p in plugins]
    opened = {k: open_checkpoint(v) if v is not None else None for k, v in others.items()}
    try:
        candidate = open_checkpoint(uri)
    except ContainerError as error:
        # Nothing could be judged: neither a profile nor a baseline makes that less than an error.
        (finding,) = fingerprinted([Finding("QC104", "error", str(error), Where())])
        return Report("failed", os.fspath(uri), options["base"], (finding,), (), {"options": options})  # type: ignore[arg-type]
    ctx = Context(candidate, opened["base"], opened["merged_from"], tp=tp, ep=ep)
    inputs = {k for k, v in opened.items() if v is not None}
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    for rule in rules.values():
        reason = chosen.why_not(rule.id) or _why_not(rule, depth, inputs)
        if reason:
            coverage.append(Coverage(rule.id, False, 0, 0, rule.unit, reason))
            continue
        found, covered = _run(rule, ctx, severities)
        findings += found
        coverage.append(covered)
    findings = fingerprinted(sorted(findings, key=lambda f: ("error", "warning", "info").index(f.severity)))
    coverage = [replace(c, title=rules[c.rule].title) for c in coverage]
    stats = _stats(ctx, candidate) | {"options": options}
    if known is not None and baseline is not None:
        judged = known.judge(findings, coverage)
        findings, stats["baseline"] = judged.findings, judged.stats(os.fspath(baseline))
    verdict, why = _verdict(ctx, findings, coverage, chosen.required, fail_on)
    stats["seconds"] = round(time.perf_counter() - started, 3)
    if why:
        stats["unproven"] = why
    return Report(verdict, os.fspath(uri), options["base"], tuple(findings), tuple(coverage), stats)  # type: ignore[arg-type]


def _why_not(rule: Rule, depth: Depth, inputs: set[str]) -> str:
    if DEPTHS.index(rule.depth) > DEPTHS.index(depth):
        return f"depth {rule.depth}"
    for need in rule.needs:
        if not set(need.split("|")) & inputs:
            return "needs " + " or ".join(f"--{n.replace('_', '-')}" for n in need.split("|"))
    return ""


def _baseline(file: Path | None) -> Baseline | None:
    if file is None:
        return None
    from verifier.compare.baseline import load  # noqa: PLC0415  (pydantic, which a check without a baseline does not need)

    return load(file)


def _run(rule: Rule, ctx: Context, severities: Severities) -> tuple[list[Finding], Coverage]:
    ctx.tally, ctx.rule_id, ctx.rule_severity = Tally(), rule.id, rule.severity
    found: list[Finding] = []
    try:
        found.extend(map(severities.judge, rule.check(ctx)))
    except ContentError as error:
        # A file that is shorter than its checked header: it changed under the run.
        ctx.tally.miss(1, str(error))
        ctx.tally.checked = 0
    tally = ctx.tally
    return group(found, tally.of), Coverage(rule.id, True, tally.checked, tally.of, rule.unit, tally.reason)


def _verdict(
    ctx: Context, findings: Iterable[Finding], coverage: Sequence[Coverage], require: Collection[str], fail_on: Severity
) -> tuple[Verdict, str]:
    if failing(findings, fail_on):
        return "failed", ""
    if not ctx.quantized_modules:
        return "unproven", "no quantized tensor"
    for c in coverage:
        if c.ran and c.of and not c.checked:
            return "unproven", f"{c.rule} examined none of {c.of:,} {c.unit}: {c.reason}"
        if c.rule in require and (not c.ran or not c.checked):
            why = f"did not run: {c.reason}" if not c.ran else "found nothing to examine"
            return "unproven", f"{c.rule} is required and {why}"
    if not any(c.checked for c in coverage):
        ran = any(c.ran for c in coverage)
        return "unproven", "the selected rules found nothing to examine" if ran else "none of the selected rules ran"
    return "passed", ""


def _stats(ctx: Context, candidate: Checkpoint) -> dict[str, object]:
    formats = Counter((m.shown.algo if m.shown else "undetermined") for m in ctx.quantized_modules)
    plain = Counter(m.weight.dtype for m in ctx.modules.values() if not m.quantized and m.weight)
    scales = sum(t.nbytes for m in ctx.quantized_modules for leaf, t in m.parts.items() if leaf in m.scales)
    return {
        "tensors": len(candidate.tensors), "shards": len(candidate.shards), "bytes": candidate.nbytes,
        "scale_bytes": scales, "formats": dict(formats), "unquantized": dict(plain), "model_type": candidate.model_type,
    }  # fmt: skip
