# SPDX-License-Identifier: Apache-2.0
"""Run every rule that the depth and the inputs allow, and reach a verdict."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import ContainerError, ContentError, UsageError
from verifier.findings import Coverage, Finding, Report, Severity, Verdict, Where
from verifier.rules import DEPTHS, Context, Depth, Rule, Tally, all_rules
from verifier.run.group import group

Path = str | os.PathLike[str]


def check(
    uri: Path,
    *,
    base: Path | None = None,
    merged_from: Path | None = None,
    depth: Depth = "header",
    require: Sequence[str] = (),
    fail_on: Severity = "error",
) -> Report:
    """Judge a checkpoint and return the report; nothing is written.

    Args:
        uri: the folder, a path or an fsspec URL.
        base: the unquantized (or less quantized) checkpoint to judge against.
        merged_from: the checkpoint whose bytes a mixed export keeps.
        depth: ``header`` reads headers and configs; ``payload`` every scale and unquantized tensor as well, and with a
            base or ``merged_from`` every weight.
        require: rules that must run; one that did not makes the verdict unproven.
        fail_on: ``warning`` lets warnings fail too.

    Raises:
        UsageError: a folder that does not exist, an unknown rule or depth.
        ContentError: the base cannot be read as a checkpoint.
        MachineError: reading failed.
    """
    with _rare_collections():
        return _check(uri, base, merged_from, depth, require, fail_on)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the collector of cycles look once a million objects: names and headers make many, and no cycles."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(1_000_000, before[0]), *before[1:])  # 0 is: never
    try:
        yield
    finally:
        gc.set_threshold(*before)


def _check(
    uri: Path, base: Path | None, merged_from: Path | None, depth: Depth, require: Sequence[str], fail_on: Severity
) -> Report:
    rules = all_rules()
    if depth not in DEPTHS[:2]:
        raise UsageError(f"no depth {depth!r}; one of header, payload")
    unknown = [r for r in require if r not in rules]
    if unknown:
        raise UsageError(f"no rule {unknown[0]!r}; `ckptgate rules` lists them")
    if fail_on not in ("error", "warning"):
        raise UsageError(f"cannot fail on {fail_on!r}; error or warning")
    started = time.perf_counter()
    others = {"base": base, "merged_from": merged_from}
    options = {"depth": depth, "require": list(require), "fail_on": fail_on} | {
        k: os.fspath(v) if v is not None else None for k, v in others.items()
    }
    opened = {k: open_checkpoint(v) if v is not None else None for k, v in others.items()}
    try:
        candidate = open_checkpoint(uri)
    except ContainerError as error:
        finding = Finding("QC104", "error", str(error), Where())
        return Report("failed", os.fspath(uri), options["base"], (finding,), (), {"options": options})  # type: ignore[arg-type]
    ctx = Context(candidate, opened["base"], opened["merged_from"])
    inputs = {k for k, v in opened.items() if v is not None}
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    for rule in rules.values():
        reason = _why_not(rule, depth, inputs)
        if reason:
            coverage.append(Coverage(rule.id, False, 0, 0, rule.unit, reason))
            continue
        found, covered = _run(rule, ctx)
        findings += found
        coverage.append(covered)
    findings.sort(key=lambda f: ("error", "warning", "info").index(f.severity))
    verdict, why = _verdict(ctx, findings, coverage, require, fail_on)
    stats = _stats(ctx, candidate) | {"options": options, "seconds": round(time.perf_counter() - started, 3)}
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


def _run(rule: Rule, ctx: Context) -> tuple[list[Finding], Coverage]:
    ctx.tally, ctx.rule_id, ctx.rule_severity = Tally(), rule.id, rule.severity
    found: list[Finding] = []
    try:
        found.extend(rule.check(ctx))
    except ContentError as error:
        # A file that is shorter than its checked header: it changed under the run.
        ctx.tally.miss(1, str(error))
        ctx.tally.checked = 0
    tally = ctx.tally
    return group(found, tally.of), Coverage(rule.id, True, tally.checked, tally.of, rule.unit, tally.reason)


def _verdict(
    ctx: Context, findings: Iterable[Finding], coverage: Iterable[Coverage], require: Sequence[str], fail_on: Severity
) -> tuple[Verdict, str]:
    failing = ("error",) if fail_on == "error" else ("error", "warning")
    if any(f.severity in failing for f in findings):
        return "failed", ""
    if not ctx.quantized_modules:
        return "unproven", "no quantized tensor"
    for c in coverage:
        if c.ran and c.of and not c.checked:
            return "unproven", f"{c.rule} examined none of {c.of:,} {c.unit}: {c.reason}"
        if c.rule in require and (not c.ran or not c.checked):
            why = f"did not run: {c.reason}" if not c.ran else "found nothing to examine"
            return "unproven", f"{c.rule} is required and {why}"
    return "passed", ""


def _stats(ctx: Context, candidate: Checkpoint) -> dict[str, object]:
    formats = Counter((m.shown.algo if m.shown else "undetermined") for m in ctx.quantized_modules)
    plain = Counter(m.weight.dtype for m in ctx.modules.values() if not m.quantized and m.weight)
    scales = sum(t.nbytes for m in ctx.quantized_modules for leaf, t in m.parts.items() if leaf in m.scales)
    return {
        "tensors": len(candidate.tensors), "shards": len(candidate.shards), "bytes": candidate.nbytes,
        "scale_bytes": scales, "formats": dict(formats), "unquantized": dict(plain), "model_type": candidate.model_type,
    }  # fmt: skip
