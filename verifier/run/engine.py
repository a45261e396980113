# SPDX-License-Identifier: Apache-2.0
"""Run every rule that the depth and the inputs allow, and reach a verdict."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import ContainerError, UsageError
from verifier.evaluation import Evaluate
from verifier.findings import (
    SEVERITIES,
    Coverage,
    Finding,
    Report,
    Severity,
    Verdict,
    Where,
    failing,
)
from verifier.rules import DEPTHS, Context, Depth, Rule, all_rules
from verifier.rules.context import Inputs
from verifier.run.fingerprints import fingerprinted
from verifier.run.group import MAX_GROUPS, group
from verifier.run.loading import loading, scoring
from verifier.run.provenance import provenance
from verifier.run.sample import Sample, sample_of
from verifier.run.schedule import MAX_KINDS, Outcome, run_rules, workers_of
from verifier.run.select import Prefixes, Selection
from verifier.run.severity import Levels, Severities
from verifier.run.share import Share, share_of

if TYPE_CHECKING:
    from verifier.run.baseline import Baseline

Path = str | os.PathLike[str]


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the collector of cycles look once a million objects: names and headers make many, and no
    cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(1_000_000, before[0]), *before[1:])  # 0 is: never
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
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
    workers: int | None = None,
    subset: str | None = None,
    sample: str | float | None = None,
    seed: int = 0,
    evaluate: Evaluate | None = None,
) -> Report:
    """Judge a checkpoint and return the report; nothing is written.

    Args:
        uri: the folder, a path or an fsspec URL.
        plugins: Python files of further rules; those of installed packages run anyway
            (docs/plugins.md).
        base: the unquantized (or less quantized) checkpoint to judge against.
        merged_from: the checkpoint whose bytes a mixed export keeps.
        depth: ``header`` reads headers and configs; ``payload`` every scale and unquantized tensor
            as well, and with a base or ``merged_from`` every weight; ``load`` also builds the model
            with transformers (docs/reload.md); ``eval`` scores text with candidate and base too
            (docs/gate.md).
        require: rules, by id or prefix, that must run; one that did not makes the verdict inconclusive.
        fail_on: ``warning`` lets warnings fail too.
        select: prefixes of rule ids (``QC5``, ``QC501,QC3``, ``ALL``): the rules that run; without
            any, all.
        ignore: prefixes of rules that do not run; of two prefixes that match a rule the longer one
            decides.
        profile: judge as one engine would: ``vllm``, ``sglang``, ``trtllm``, ``transformers``;
            ``all`` takes the worst of the four, ``strict`` makes errors of warnings.
        severity: a severity for each prefix of rules, or for each glob over tensor names:
            ``{"QC515": {"*.w2.*": "info"}}``.
        baseline: a file of accepted findings, which do not fail the check as long as they do not
            get worse.
        tp: the tensor parallel size to serve with; every linear is then divided as engines divide
            it (QC309).
        ep: the expert parallel size to serve with.
        workers: processes that read and judge bytes (copies of this one; threads where it has other
            threads already, is not on Linux, or reads over the net); its processors, at most four,
            where none is given. The report does not depend on it.
        subset: ``2/8`` reads the second eighth of the shards. Headers are judged in every subset;
            `merge_reports` makes one report of all of them.
        sample: ``5%`` reads that part of the modules of each look; the report says so.
        seed: which modules a sample takes.
        evaluate: what scores text at depth eval: ``verifier.gate.evaluator(corpus=…)``; the default
            is that of ``wikitext2-test``.

    Raises:
        UsageError: a folder that does not exist, an unknown rule, depth, profile or severity, a
            baseline that is none, no ranks, a subset or sample that is none, or both.
        MissingExtra: depth load without torch or transformers; it is a UsageError.
        ContentError: the base cannot be read as a checkpoint.
        MachineError: reading failed.
    """
    rules = all_rules(plugins)
    if depth not in DEPTHS:
        raise UsageError(f"no depth {depth!r}; one of {', '.join(DEPTHS)}")
    if depth == "eval" and base is None:
        raise UsageError("depth eval needs a base: the loss is measured over it")
    chosen, severities = (
        Selection(rules, select, ignore, require),
        Severities(rules, profile, severity),
    )
    if fail_on not in ("error", "warning"):
        raise UsageError(f"cannot fail on {fail_on!r}; error or warning")
    for name, ranks in (("tp", tp), ("ep", ep)):
        if ranks is not None and ranks < 1:
            raise UsageError(f"cannot serve with {name} = {ranks}; 1 or more")
    reading = _reading(depth, workers, subset, sample, seed)
    if reading.share is not None and baseline is not None:
        raise UsageError("--subset and --baseline: a baseline counts the defects of all shards")
    deep = DEPTHS.index(depth) >= DEPTHS.index("load")
    loads = deep and any(r.depth == "load" and not chosen.why_not(r.id) for r in rules.values())
    loader = loading() if loads else None
    started = time.perf_counter()
    others = {"base": base, "merged_from": merged_from}
    known = _baseline(baseline)
    options: dict[str, Any] = {
        "depth": depth,
        "require": sorted(chosen.required),
        "fail_on": fail_on,
        "tp": tp,
        "ep": ep,
    }
    options |= {
        k: os.fspath(v) if v is not None else None
        for k, v in (others | {"baseline": baseline}).items()
    }
    options |= {"select": list(chosen.select), "ignore": list(chosen.ignore), "profile": profile}
    options["plugins"] = [os.fspath(p) for p in plugins]
    options |= reading.options()
    opened = {k: open_checkpoint(v) if v is not None else None for k, v in others.items()}
    try:
        candidate = open_checkpoint(uri)
    except ContainerError as error:
        # Nothing could be judged: neither a profile nor a baseline makes that less than an error.
        (finding,) = fingerprinted([Finding("QC104", "error", str(error), Where())])
        return Report(
            "failed", os.fspath(uri), options["base"], (finding,), (), {"options": options}
        )
    inputs = {k for k, v in opened.items() if v is not None}
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    reasons = {r.id: chosen.why_not(r.id) or _why_not(r, depth, inputs) for r in rules.values()}
    running = [r for r in rules.values() if not reasons[r.id]]
    reference, evaluation = opened["base"], None
    # Rules that compare modules of all shards, and so these, run in the first subset.
    first = reading.share is None or reading.share.number == 1
    if reference is not None and first and any(r.depth == "eval" for r in running):
        evaluation = (evaluate or scoring())(candidate, reference)
    inputs_ = Inputs(tp, ep, loader, evaluation)
    ctx = Context.of(candidate, opened["base"], opened["merged_from"], inputs_)
    outcomes = run_rules(
        ctx,
        running,
        workers=reading.workers,
        share=reading.share,
        sample=reading.sample,
        judge=severities.judge,
    )
    for rule in rules.values():
        found, covered = settle(
            rule, outcomes.get(rule.id, Outcome(deferred=reasons[rule.id])), reading.share is None
        )
        findings += found
        coverage.append(covered)
    findings = fingerprinted(sorted(findings, key=level))
    coverage = [replace(c, title=rules[c.rule].title) for c in coverage]
    stats = (
        _stats(ctx, candidate)
        | {"options": options}
        | provenance(opened | {"checkpoint": candidate})
    )
    if known is not None and baseline is not None:
        judged = known.judge(findings, coverage)
        findings, stats["baseline"] = judged.findings, judged.stats(os.fspath(baseline))
    # What a subset need not have examined is required of all subsets together.
    required = () if reading.share else chosen.required
    verdict, why = judge(
        bool(ctx.candidate.quantized_modules), findings, coverage, required, fail_on
    )
    stopped = {rule: o.stopped for rule, o in outcomes.items() if o.stopped}
    if stopped:
        stats["stopped"] = stopped
    stats["seconds"] = round(time.perf_counter() - started, 3)
    if why:
        stats["inconclusive"] = why
    if evaluation is not None:
        stats["eval"] = dict(evaluation.summary)
    return Report(verdict, os.fspath(uri), options["base"], tuple(findings), tuple(coverage), stats)


@dataclass(frozen=True, slots=True)
class _Reading:
    """How bytes are read: by how many workers, and which of them."""

    workers: int
    share: Share | None
    sample: Sample | None

    def options(self) -> dict[str, object]:
        """Return what the report says of it."""
        found: dict[str, object] = {"subset": str(self.share)} if self.share else {}
        return found | (
            {"sample": self.sample.percent, "seed": self.sample.seed} if self.sample else {}
        )


def _reading(
    depth: Depth, workers: int | None, subset: str | None, sample: str | float | None, seed: int
) -> _Reading:
    found = _Reading(
        workers_of(workers),
        share_of(subset) if subset is not None else None,
        sample_of(sample, seed) if sample is not None else None,
    )
    if subset is not None and sample is not None:
        raise UsageError("--subset and --sample: one of both; a subset reads all of its shards")
    if depth == "header" and (subset is not None or sample is not None):
        option = "--subset" if subset is not None else "--sample"
        raise UsageError(f"{option} needs --depth payload: a header check reads no bytes")
    return found


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
    from verifier.run.baseline import load  # noqa: PLC0415  (pydantic, which a check without a baseline does not need)

    return load(file)


def settle(rule: Rule, outcome: Outcome, whole: bool = True) -> tuple[list[Finding], Coverage]:
    """Return a rule's findings, equal ones counted as one, and its coverage."""
    if outcome.deferred:
        return [], Coverage(rule.id, False, 0, 0, rule.unit, outcome.deferred)
    tally = outcome.tally
    found = group(sorted(outcome.findings, key=level), tally.of, MAX_GROUPS if whole else MAX_KINDS)
    return found, Coverage(
        rule.id, True, 0 if outcome.stopped else tally.checked, tally.of, rule.unit, tally.reason
    )


def level(finding: Finding) -> int:
    """Return the rank of a finding's severity, the worst first."""
    return SEVERITIES.index(finding.severity)


def judge(
    quantized: bool,
    findings: Iterable[Finding],
    coverage: Sequence[Coverage],
    require: Collection[str],
    fail_on: Severity,
) -> tuple[Verdict, str]:
    """Return the verdict, and why where it is inconclusive."""
    if failing(findings, fail_on):
        return "failed", ""
    if not quantized:
        return "inconclusive", "no quantized tensor"
    for c in coverage:
        if c.ran and c.of and not c.checked:
            return "inconclusive", f"{c.rule} examined none of {c.of:,} {c.unit}: {c.reason}"
        if c.rule in require and (not c.ran or not c.checked):
            why = f"did not run: {c.reason}" if not c.ran else "found nothing to examine"
            return "inconclusive", f"{c.rule} is required and {why}"
    if not any(c.checked for c in coverage):
        ran = any(c.ran for c in coverage)
        return (
            "inconclusive",
            "the selected rules found nothing to examine"
            if ran
            else "none of the selected rules ran",
        )
    return "passed", ""


def _stats(ctx: Context, candidate: Checkpoint) -> dict[str, object]:
    formats = Counter(
        (m.inferred_format.algo if m.inferred_format else "undetermined")
        for m in ctx.candidate.quantized_modules
    )
    plain = Counter(
        m.weight.dtype for m in ctx.candidate.modules.values() if not m.quantized and m.weight
    )
    scales = sum(
        t.nbytes
        for m in ctx.candidate.quantized_modules
        for leaf, t in m.parts.items()
        if leaf in m.scales
    )
    return {
        "tensors": len(candidate.tensors),
        "shards": len(candidate.shards),
        "bytes": candidate.nbytes,
        "scale_bytes": scales,
        "formats": dict(formats),
        "unquantized": dict(plain),
        "model_type": candidate.model_type,
    }
