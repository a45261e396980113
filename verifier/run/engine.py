# SPDX-License-Identifier: Apache-2.0
"""Run every rule that the depth and the inputs allow, and reach a verdict."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import ContainerError, UsageError
from verifier.findings import Coverage, Finding, Report, Severity, Verdict, Where
from verifier.rules import DEPTHS, Context, Depth, Rule, all_rules
from verifier.run.group import MAX_GROUPS, group
from verifier.run.sample import Sample, sample_of
from verifier.run.schedule import MAX_KINDS, Outcome, run_rules, workers_of
from verifier.run.share import Share, share_of

Path = str | os.PathLike[str]


def check(
    uri: Path,
    *,
    base: Path | None = None,
    merged_from: Path | None = None,
    depth: Depth = "header",
    require: Sequence[str] = (),
    fail_on: Severity = "error",
    workers: int | None = None,
    subset: str | None = None,
    sample: str | float | None = None,
    seed: int = 0,
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
        workers: threads that read and judge bytes; the processors of this process, at most four, where none is given. The
            report does not depend on it.
        subset: ``2/8`` reads the second eighth of the shards. Headers are judged in every subset; `merge_reports` makes
            one report of all of them.
        sample: ``5%`` reads that part of the modules of each look; the report says so.
        seed: which modules a sample takes.

    Raises:
        UsageError: a folder that does not exist, an unknown rule or depth, a subset or sample that is none, or both.
        ContentError: the base cannot be read as a checkpoint.
        MachineError: reading failed.
    """
    with _rare_collections():
        return _check(uri, base, merged_from, depth, require, fail_on, _reading(depth, workers, subset, sample, seed))


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the collector of cycles look once a million objects: names and headers make many, and no cycles."""
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(1_000_000, before[0]), *before[1:])  # 0 is: never
    try:
        yield
    finally:
        gc.set_threshold(*before)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How bytes are read: by how many threads, and which of them."""

    workers: int
    share: Share | None
    sample: Sample | None

    def options(self) -> dict[str, object]:
        """Return what the report says of it."""
        found: dict[str, object] = {"subset": str(self.share)} if self.share else {}
        return found | ({"sample": self.sample.percent, "seed": self.sample.seed} if self.sample else {})


def _reading(depth: Depth, workers: int | None, subset: str | None, sample: str | float | None, seed: int) -> _Reading:
    found = _Reading(
        workers_of(workers), share_of(subset) if subset is not None else None,
        sample_of(sample, seed) if sample is not None else None,
    )  # fmt: skip
    if subset is not None and sample is not None:
        raise UsageError("--subset and --sample: one of both; a subset reads all of its shards")
    if depth == "header" and (subset is not None or sample is not None):
        option = "--subset" if subset is not None else "--sample"
        raise UsageError(f"{option} needs --depth payload: a header check reads no bytes")
    return found


def _check(
    uri: Path, base: Path | None, merged_from: Path | None, depth: Depth, require: Sequence[str], fail_on: Severity,
    reading: _Reading,
) -> Report:  # fmt: skip
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
    options: dict[str, object] = {"depth": depth, "require": list(require), "fail_on": fail_on} | {
        k: os.fspath(v) if v is not None else None for k, v in others.items()
    }
    options |= reading.options()
    base_uri = os.fspath(base) if base is not None else None
    opened = {k: open_checkpoint(v) if v is not None else None for k, v in others.items()}
    try:
        candidate = open_checkpoint(uri)
    except ContainerError as error:
        finding = Finding("QC104", "error", str(error), Where())
        return Report("failed", os.fspath(uri), base_uri, (finding,), (), {"options": options})
    ctx = Context(candidate, opened["base"], opened["merged_from"])
    inputs = {k for k, v in opened.items() if v is not None}
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    reasons = {rule.id: _why_not(rule, depth, inputs) for rule in rules.values()}
    outcomes = run_rules(
        ctx, [r for r in rules.values() if not reasons[r.id]],
        workers=reading.workers, share=reading.share, sample=reading.sample,
    )  # fmt: skip
    for rule in rules.values():
        outcome = outcomes.get(rule.id, Outcome(deferred=reasons[rule.id]))
        found, covered = settle(rule, outcome, whole=reading.share is None)
        findings += found
        coverage.append(covered)
    findings.sort(key=lambda f: ("error", "warning", "info").index(f.severity))
    # What a subset need not have examined is required of all subsets together.
    verdict, why = judge(bool(ctx.quantized_modules), findings, coverage, () if reading.share else require, fail_on)
    stats = _stats(ctx, candidate) | {"options": options, "seconds": round(time.perf_counter() - started, 3)}
    stopped = {rule: o.stopped for rule, o in outcomes.items() if o.stopped}
    if stopped:
        stats["stopped"] = stopped
    if why:
        stats["unproven"] = why
    return Report(verdict, os.fspath(uri), base_uri, tuple(findings), tuple(coverage), stats)


def _why_not(rule: Rule, depth: Depth, inputs: set[str]) -> str:
    if DEPTHS.index(rule.depth) > DEPTHS.index(depth):
        return f"depth {rule.depth}"
    for need in rule.needs:
        if not set(need.split("|")) & inputs:
            return "needs " + " or ".join(f"--{n.replace('_', '-')}" for n in need.split("|"))
    return ""


def settle(rule: Rule, outcome: Outcome, *, whole: bool = True) -> tuple[list[Finding], Coverage]:
    """Return a rule's findings, equal ones counted as one, and its coverage."""
    if outcome.deferred:
        return [], Coverage(rule.id, False, 0, 0, rule.unit, outcome.deferred)
    tally = outcome.tally
    ordered = sorted(outcome.findings, key=lambda f: ("error", "warning", "info").index(f.severity))
    found = group(ordered, tally.of, MAX_GROUPS if whole else MAX_KINDS)
    return found, Coverage(rule.id, True, 0 if outcome.stopped else tally.checked, tally.of, rule.unit, tally.reason)


def judge(
    quantized: bool, findings: Iterable[Finding], coverage: Iterable[Coverage], require: Sequence[str], fail_on: Severity
) -> tuple[Verdict, str]:
    """Return the verdict, and why where it is unproven."""
    failing = ("error",) if fail_on == "error" else ("error", "warning")
    if any(f.severity in failing for f in findings):
        return "failed", ""
    if not quantized:
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
