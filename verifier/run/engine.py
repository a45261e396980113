# SPDX-License-Identifier: Apache-2.0
"""Runs every rule that the depth and the inputs allow, and reaches a verdict."""

from __future__ import annotations

import gc
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verifier.checkpoint import Checkpoint, Source, open_checkpoint
from verifier.errors import ContainerError
from verifier.evaluation import Evaluate, Evaluation
from verifier.findings import Coverage, Finding, Report, Verdict, Where
from verifier.progress import Progress, no_progress
from verifier.quantized import QuantizedCheckpoint
from verifier.rules import INCLUDED, Context, Depth, Rule, all_rules
from verifier.rules.context import Inputs
from verifier.rules.texts import section
from verifier.run.causes import explained
from verifier.run.fingerprints import fingerprinted
from verifier.run.loading import default_evaluate, default_loader, engine_loader
from verifier.run.options import CheckOptions, EngineOptions, Path, Reading, reading_of
from verifier.run.provenance import commits_of, fetched_from
from verifier.run.schedule import Outcome, Outcomes, run_rules
from verifier.run.select import Prefixes, Selection
from verifier.run.severity import Levels, Severities
from verifier.run.unchecked import not_checked
from verifier.run.verdict import finish_rule, severity_rank, verdict_of
from verifier.summary import (
    Advice,
    BaselineSummary,
    Contents,
    FailOn,
    NotChecked,
    ReportedOptions,
    Summary,
)

if TYPE_CHECKING:
    from verifier.rules.engine_loading import EngineLoader
    from verifier.rules.loading import Loader
    from verifier.run.baseline import Baseline


def check(
    uri: Path,
    *,
    plugins: Sequence[Path] = (),
    base: Path | None = None,
    merged_from: Path | None = None,
    depth: Depth = "header",
    require: Prefixes = (),
    fail_on: FailOn = "error",
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
    weights: str | None = None,
    evaluate: Evaluate | None = None,
    progress: Progress = no_progress,
    engine: EngineOptions | None = None,
) -> Report:
    """Check a checkpoint and return the report; nothing is written.

    Args:
        uri: the checkpoint's directory, a path or an fsspec URL.
        plugins: Python files with further rules; those of installed packages always run
            (docs/plugins.md).
        base: the unquantized (or less quantized) checkpoint to compare with.
        merged_from: the overlay checkpoint whose bytes a mixed export keeps.
        depth: ``header`` reads headers and configs; ``payload`` also every scale and unquantized
            tensor, and with a base or ``merged_from`` every weight; ``load`` also builds the model
            with transformers (docs/reload.md); ``engine`` loads it with an engine's own loader
            instead (docs/engines.md); ``eval`` also scores text with candidate and base
            (docs/gate.md).
        require: rules, by id or prefix, that must run; one that did not makes the verdict
            inconclusive.
        fail_on: ``warning`` makes warnings fail too.
        select: prefixes of rule ids (``QC5``, ``QC501,QC3``, ``ALL``): the rules that run; all of
            them by default.
        ignore: prefixes of rules that do not run; of two prefixes that match a rule the longer one
            decides.
        profile: one engine's severities: ``vllm``, ``sglang``, ``trtllm``, ``transformers``; the
            worst of the four: ``all``; ``strict`` turns warnings into errors.
        severity: a severity for each prefix of rules, or for each glob over tensor names:
            ``{"QC515": {"*.w2.*": "info"}}``.
        baseline: a file of accepted findings, which do not fail the check as long as they do not
            get worse.
        tp: the tensor parallel size to serve with; each linear layer is then divided as engines
            divide it (QC309).
        ep: the expert parallel size to serve with.
        workers: processes that read and check bytes (forks of this one; threads where it has other
            threads already, is not on Linux, or reads over the network). By default the available
            processors, at most four. The report does not depend on it.
        subset: ``2/8`` reads the second eighth of the modules, by bytes. Headers are checked in
            every subset; `merge_reports` makes one report of all of them.
        sample: ``5%`` reads that share of the modules, at least one of each kind; the report says
            so.
        seed: which modules a sample takes.
        weights: how a method changed the weights of the base before it quantized them: ``base``
            (not at all, the default), ``moved``, ``rotated`` or ``folded`` (docs/methods.md).
        evaluate: scores text at depth eval: ``verifier.gate.evaluator(corpus=…)``; the default uses
            ``wikitext2-test``.
        progress: called while bytes are read, with the bytes that are checked and all that will be.
        engine: the engine of depth engine, and the interpreter that has it.

    Raises:
        UsageError: a directory that does not exist or holds no safetensors checkpoint, an unknown
            rule, depth, profile or severity, an invalid baseline, parallel size, subset or sample,
            or both of the latter.
        MissingExtra: depth load without torch or transformers; it is a UsageError.
        MachineError: reading failed.
    """
    options = CheckOptions(
        plugins=tuple(plugins),
        base=base,
        merged_from=merged_from,
        depth=depth,
        require=require,
        fail_on=fail_on,
        select=select,
        ignore=ignore,
        profile=profile,
        severity=severity,
        baseline=baseline,
        tp=tp,
        ep=ep,
        workers=workers,
        subset=subset,
        sample=sample,
        seed=seed,
        weights=weights,
        evaluate=evaluate,
        progress=progress,
        engine=engine,
    )
    return run_check(uri, options)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """Let the garbage collector look for cycles once per million objects: names and headers make
    many objects and no cycles.
    """
    before = gc.get_threshold()
    gc.set_threshold(before[0] and max(1_000_000, before[0]), *before[1:])  # 0 means never
    try:
        yield
    finally:
        gc.set_threshold(*before)


@_rare_collections()
def run_check(uri: Path, options: CheckOptions) -> Report:
    """Check a checkpoint; errors are those of `check`."""
    plan = plan_of(options)
    started = time.perf_counter()
    known = _baseline(options.baseline) if options.baseline is not None else None
    base, merged_from = _opened(options.base), _opened(options.merged_from)
    try:
        candidate = open_checkpoint(uri)
    except ContainerError as error:
        return _unreadable(uri, plan.reported_options(), error)
    not_run = plan.reasons_not_to_run(base is not None, merged_from is not None)
    running = [rule for rule in plan.rules.values() if not not_run[rule.id]]
    evaluation = _evaluation(plan, running, candidate, base)
    weights = options.weights if options.weights not in (None, "base") else ""
    inputs = Inputs(
        options.tp, options.ep, weights or "", plan.loader, plan.engine_loader, evaluation
    )
    ctx = Context.of(candidate, base, merged_from, inputs)
    outcomes = run_rules(ctx, running, plan.reading, plan.severities.apply, options.progress)
    findings, coverage = _results(plan, outcomes.by_rule, not_run)
    baseline: BaselineSummary | None = None
    if known is not None and options.baseline is not None:
        compared = known.compare(findings, coverage)
        findings, baseline = compared.findings, compared.summary(os.fspath(options.baseline))
    findings = explained(findings, ctx.candidate)
    left_out = _not_checked(plan, ctx, findings, outcomes)
    verdict, reason = _verdict(plan, ctx, findings, coverage, left_out)
    sources = _sources(base=base, checkpoint=candidate, merged_from=merged_from)
    summary = Summary(
        contents=contents_of(candidate, ctx.candidate),
        options=plan.reported_options(),
        commits=commits_of(sources),
        fetched=fetched_from(sources.values()),
        baseline=baseline,
        stopped={rule: o.stopped for rule, o in outcomes.by_rule.items() if o.stopped},
        seconds=round(time.perf_counter() - started, 3),
        inconclusive=reason,
        not_checked=left_out,
        scale_bytes_read=sum(s.nbytes for s in outcomes.scales) if outcomes.scales else None,
        evaluation=evaluation,
        different_base=_different_base(ctx),
        advice=_advice(plan, findings),
    )
    base_uri = _text(options.base)
    return Report(verdict, os.fspath(uri), base_uri, tuple(findings), tuple(coverage), summary)


@dataclass(frozen=True, slots=True)
class CheckPlan:
    """What a check will do, worked out before a checkpoint is opened."""

    options: CheckOptions
    rules: Mapping[str, Rule]
    selection: Selection
    severities: Severities
    reading: Reading
    loader: Loader | None
    engine_loader: EngineLoader | None

    def reasons_not_to_run(self, has_base: bool, has_merged_from: bool) -> dict[str, str]:
        """Return for each rule why it does not run, '' where it does."""
        inputs = {"base"} if has_base else set()
        inputs |= {"merged_from"} if has_merged_from else set()
        return {
            rule.id: self.selection.why_not(rule.id) or _lacks(rule, self.options.depth, inputs)
            for rule in self.rules.values()
        }

    def reported_options(self) -> ReportedOptions:
        """Return the options as the report states them."""
        options, reading = self.options, self.reading
        return ReportedOptions(
            depth=options.depth,
            require=tuple(sorted(self.selection.required)),
            fail_on=options.fail_on,
            tp=options.tp,
            ep=options.ep,
            base=_text(options.base),
            merged_from=_text(options.merged_from),
            baseline=_text(options.baseline),
            select=self.selection.select,
            ignore=self.selection.ignore,
            profile=options.profile,
            plugins=tuple(os.fspath(file) for file in options.plugins),
            subset=str(reading.subset) if reading.subset else None,
            sample=reading.sample.percent if reading.sample else None,
            seed=reading.sample.seed if reading.sample else None,
            weights=options.weights,
        )


def plan_of(options: CheckOptions) -> CheckPlan:
    """Return what a check with these options will do.

    Raises:
        UsageError: options that are wrong or contradict one another.
        MissingExtra: depth load without torch or transformers.
    """
    rules = all_rules(options.plugins)
    options.validate()
    selection = Selection(rules, options.select, options.ignore, options.require)
    severities = Severities(rules, options.profile, options.severity)
    reading = reading_of(options)
    selected = (rule for rule in rules.values() if not selection.why_not(rule.id))
    loads = _reaches(options.depth, "load") and any(r.depth == "load" for r in selected)
    loader = default_loader() if loads else None
    engine = engine_loader(options.engine) if options.engine is not None else None
    return CheckPlan(options, rules, selection, severities, reading, loader, engine)


def _reaches(depth: Depth, needed: Depth) -> bool:
    return needed in INCLUDED[depth]


def _lacks(rule: Rule, depth: Depth, inputs: set[str]) -> str:
    """Return what a rule lacks to run, or ''."""
    if not _reaches(depth, rule.depth):
        return f"needs --depth {rule.depth}"
    for need in rule.needs:
        names = need.split("|")
        if not inputs.intersection(names):
            return "needs " + " or ".join(f"--{name.replace('_', '-')}" for name in names)
    return ""


def _opened(uri: Path | None) -> Checkpoint | None:
    return open_checkpoint(uri) if uri is not None else None


def _baseline(file: Path) -> Baseline:
    from verifier.run.baseline import load  # noqa: PLC0415  (pydantic: 80 ms and 10 MB)

    return load(file)


def _text(path: Path | None) -> str | None:
    return os.fspath(path) if path is not None else None


def _unreadable(uri: Path, options: ReportedOptions, error: ContainerError) -> Report:
    """Return the report on a directory that holds no checkpoint: neither a profile nor a baseline
    makes that less than an error.
    """
    findings = fingerprinted([Finding("QC104", "error", str(error), Where())])
    summary = Summary(options=options)
    return Report("failed", os.fspath(uri), options.base, tuple(findings), (), summary)


def _evaluation(
    plan: CheckPlan, running: Sequence[Rule], candidate: Checkpoint, base: Checkpoint | None
) -> Evaluation | None:
    """Return the scores of candidate and base where a rule needs them."""
    scores = any(rule.depth == "eval" for rule in running)
    if base is None or not scores or not plan.reading.in_first_subset:
        return None
    evaluate = plan.options.evaluate or default_evaluate()
    return evaluate(candidate, base)


def _results(
    plan: CheckPlan, outcomes: Mapping[str, Outcome], not_run: Mapping[str, str]
) -> tuple[list[Finding], list[Coverage]]:
    """Return the findings of all rules, the worst first, and the coverage of each."""
    findings: list[Finding] = []
    coverage: list[Coverage] = []
    for rule in plan.rules.values():
        outcome = outcomes.get(rule.id, Outcome(deferred=not_run[rule.id]))
        of_rule, covered = finish_rule(rule, outcome, all_modules=plan.reading.subset is None)
        findings += of_rule
        coverage.append(covered)
    return fingerprinted(sorted(findings, key=severity_rank)), coverage


def _not_checked(
    plan: CheckPlan, ctx: Context, findings: Sequence[Finding], outcomes: Outcomes
) -> tuple[NotChecked, ...]:
    """Return what was left unexamined."""
    of_headers = (f for f in findings if plan.rules[f.rule].depth == "header")
    unread = (u for scales in outcomes.scales for u in scales.unread)
    reads_bytes = _reaches(plan.options.depth, "payload")
    return not_checked(ctx, of_headers, unread, reads_bytes=reads_bytes)


def _verdict(
    plan: CheckPlan,
    ctx: Context,
    findings: Sequence[Finding],
    coverage: Sequence[Coverage],
    left_out: Sequence[NotChecked],
) -> tuple[Verdict, str]:
    # What a subset need not have examined is required of all subsets together.
    required = () if plan.reading.subset else plan.selection.required
    quantized = bool(ctx.candidate.quantized_modules)
    fail_on = plan.options.fail_on
    return verdict_of(quantized, findings, coverage, required, fail_on, left_out)


def _advice(plan: CheckPlan, findings: Sequence[Finding]) -> dict[str, Advice]:
    """Return what to do about the findings, by rule."""
    rules = [plan.rules[rule_id] for rule_id in sorted({f.rule for f in findings})]
    return {rule.id: _advice_of(rule) for rule in rules}


def _advice_of(rule: Rule) -> Advice:
    fix, why, impact = (section(rule.doc, h) for h in ("Fix", "Why it happens", "Impact"))
    return Advice(rule.title, fix, rule.repairable, why, impact)


def _different_base(ctx: Context) -> str:
    """Return why the base is a different model than the checkpoint, or ''."""
    if ctx.base is None:
        return ""
    own, of_base = ctx.checkpoint.model_type, ctx.base.checkpoint.model_type
    if own and of_base and own != of_base:
        return f"its model_type is {of_base}, the checkpoint's is {own}"
    return ctx.expectations.unrelated_base


def _sources(**checkpoints: Checkpoint | None) -> dict[str, Source]:
    return {role: c.source for role, c in checkpoints.items() if c is not None}


def contents_of(stored: Checkpoint, checkpoint: QuantizedCheckpoint) -> Contents:
    """Return what a checkpoint holds: tensors as they are stored, modules with the experts of
    stacks one by one.
    """
    formats: Counter[str] = Counter()
    scale_bytes = 0
    for group in checkpoint.module_groups:
        first, shown = group.first, group.first.inferred_format
        formats[shown.algo if shown else "undetermined"] += len(group.modules)
        scale_bytes += len(group.modules) * sum(first.parts[leaf].nbytes for leaf in first.scales)
    modules = checkpoint.modules.values()
    dtypes = Counter(m.weight.dtype for m in modules if not m.quantized and m.weight)
    return Contents(
        tensors=len(stored.tensors),
        shards=len(stored.shards),
        bytes=stored.nbytes,
        scale_bytes=scale_bytes,
        formats=dict(formats),
        unquantized=dict(dtypes),
        model_type=stored.model_type,
    )
