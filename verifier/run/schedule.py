# SPDX-License-Identifier: Apache-2.0
"""Run rules: those that read headers one after another, those that read bytes by shard, over
processes or threads.

A rule that judges each module by itself (`Rule.split`) is run on the modules of one shard at a
time, and what it says is put together in the order of the shards, whatever the number of workers
and machines: so the report does not depend on them. A rule that compares modules is run once, on
all of them. Rules that load the model come last, one by one.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from verifier.errors import ContentError, UsageError
from verifier.findings import Finding
from verifier.payload.cache import ResultKey
from verifier.rules import Context, Rule, Tally
from verifier.run.group import group
from verifier.run.processes import by_copies, can_be_copied
from verifier.run.sample import Sample
from verifier.run.share import Share, file_of, shares
from verifier.schemes import Module

Judge = Callable[[Finding], Finding] | None
MAX_WORKERS = 64
WORTH_COPIES = 64 << 20
"""Bytes of weights to compare from which on copies of this process are worth the tens of
milliseconds that they cost."""
SCANNED = 16
"""What is only looked at goes as many times as fast."""
# More kinds of findings than these, and a merged report may name others of them first than a whole
# one does.
MAX_KINDS = 5_000


@dataclass(slots=True)
class Outcome:
    """What a rule said and examined; ``stopped`` is why it could not go on, ``deferred`` why it did
    not run here.
    """

    findings: list[Finding] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    stopped: str = ""
    deferred: str = ""

    def add(self, other: Outcome) -> None:
        """Put what the rule said of other modules after what it said so far."""
        self.findings = group([*self.findings, *other.findings], 0, MAX_KINDS)
        self.tally.checked += other.tally.checked
        self.tally.of += other.tally.of
        self.tally.reason = self.tally.reason or other.tally.reason
        self.stopped = self.stopped or other.stopped


def workers_of(given: int | None) -> int:
    """Return the number of workers: as given, else the processors that this process may use, at
    most four.

    Raises:
        UsageError: none, or more than `MAX_WORKERS`.
    """
    if given is None:
        usable = (
            len(os.sched_getaffinity(0))
            if hasattr(os, "sched_getaffinity")
            else os.cpu_count() or 1
        )
        return min(4, usable)
    if not 1 <= given <= MAX_WORKERS:
        raise UsageError(f"{given} workers; 1 to {MAX_WORKERS}")
    return given


def run_rules(
    ctx: Context,
    rules: Sequence[Rule],
    *,
    workers: int = 1,
    share: Share | None = None,
    sample: Sample | None = None,
    judge: Judge = None,
) -> dict[str, Outcome]:
    """Return what each rule said, by id.

    Args:
        ctx: the checkpoint and what it is judged against.
        rules: those to run.
        workers: processes, or where this one cannot be copied threads, that read and judge bytes.
        share: the shards that are read here, where it is not all of them. Rules of depth header run
            whatever the share, those that compare bytes of modules in the first share only.
        sample: the modules that are read, where it is not all of them.
        judge: what is done to each finding before equal ones are counted as one.
    """
    found = {r.id: _run(r, ctx, judge) for r in rules if r.depth == "header"}
    reading = [r for r in rules if r.depth == "payload"]
    found |= {r.id: Outcome() for r in reading}
    if reading:
        _read(ctx, reading, found, workers, share, sample, judge)
    for rule in (r for r in rules if r.depth not in ("header", "payload")):
        if share is not None and share.number > 1:
            found[rule.id] = Outcome(deferred=f"loads the whole model: runs in subset 1/{share.of}")
        else:
            found[rule.id] = _run(rule, ctx, judge)
    return found


def _read(
    ctx: Context,
    reading: Sequence[Rule],
    found: dict[str, Outcome],
    workers: int,
    share: Share | None,
    sample: Sample | None,
    judge: Judge,
) -> None:
    """Add what the rules of depth payload say to ``found``."""
    split, whole = [r for r in reading if r.split], [r for r in reading if not r.split]
    if share is not None and share.number > 1:
        for rule in whole:
            found[rule.id].deferred = f"compares modules of all shards: runs in subset 1/{share.of}"
        whole = []
    parts = (
        sample.choose(ctx.candidate.modules.values())
        if sample is not None
        else _by_shard(ctx, share)
    )
    tasks = [_Task(split, modules, of) for modules, of in parts if split and modules]
    everything = list(ctx.candidate.modules.values())
    comparing = [_Task([rule], everything, len(everything)) for rule in whole]

    def read(task: _Task) -> list[Outcome]:
        part = ctx.part(task.modules)
        part.payload.announce(task.modules)
        return [_run(rule, part, judge) for rule in task.rules]

    _keep_freed_memory()
    ctx.prepare()
    # Shards first: what rules that compare modules ask for is known then. Alongside the shards it
    # would be worked out twice.
    copied = workers > 1 and _worth_copies(ctx, tasks) and can_be_copied()
    shards = _by_copies(ctx, read, tasks, workers) if copied else _each(read, tasks, workers)
    said = chain(shards, _each(read, comparing, workers))
    for task, outcomes in zip([*tasks, *comparing], said, strict=True):
        for rule, outcome in zip(task.rules, outcomes, strict=True):
            if task.of != len(task.modules):
                outcome.tally.of = outcome.tally.of * task.of // len(task.modules)
            found[rule.id].add(outcome)
    if sample is not None:
        for rule in split:
            known = found[rule.id].tally
            known.reason = f"{sample}; {known.reason}" if known.reason else str(sample)


@dataclass(frozen=True, slots=True)
class _Task:
    """Rules to run on some modules, which stand for ``of``."""

    rules: Sequence[Rule]
    modules: Sequence[Module]
    of: int

    @property
    def nbytes(self) -> int:
        """The bytes of the modules' tensors."""
        return sum(t.nbytes for m in self.modules for t in m.parts.values())


def _by_shard(ctx: Context, share: Share | None) -> list[tuple[list[Module], int]]:
    """Return the modules of each shard, in the shards' order, and their number."""
    taken: dict[str, list[Module]] = {s.file: [] for s in ctx.checkpoint.shards}
    for module in ctx.candidate.modules.values():
        taken[file_of(module)].append(module)
    if share is not None:
        mine = shares(ctx.checkpoint, share.of)
        taken = {file: modules for file, modules in taken.items() if mine[file] == share.number}
    return [(modules, len(modules)) for modules in taken.values()]


def _run(rule: Rule, ctx: Context, judge: Judge) -> Outcome:
    own = ctx.for_rule(rule.id, rule.severity)
    findings: list[Finding] = []
    stopped = ""
    try:
        findings.extend(rule.check(own) if judge is None else map(judge, rule.check(own)))
    except ContentError as error:
        # A file that is shorter than its checked header: it changed during the run.
        stopped = str(error)
        own.tally.miss(1, stopped)
    return Outcome(group(findings, 0, MAX_KINDS), own.tally, stopped)


def _keep_freed_memory() -> None:
    """Let the C library hand out again what arrays of some megabytes give back.

    glibc asks the kernel for every array beyond 128 kB and returns it at once; a payload check then
    spends more time on fresh pages than on values. Its limit follows the largest such array that
    was ever freed, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD): free one of which no byte was
    touched. Other C libraries do nothing by it.
    """
    np.empty(16 << 20, np.uint8)


def _largest_first(tasks: Sequence[_Task]) -> list[int]:
    """Return the tasks' numbers in an order that leaves nobody with a large one at the end."""
    return sorted(range(len(tasks)), key=lambda i: -tasks[i].nbytes)


def _each(
    read: Callable[[_Task], list[Outcome]], tasks: Sequence[_Task], workers: int
) -> Iterator[list[Outcome]]:
    """Yield what each task comes to, in the order of the tasks."""
    if workers == 1 or len(tasks) < 2:
        yield from map(read, tasks)
        return
    with ThreadPoolExecutor(workers, "ckptgate") as pool:
        futures = {i: pool.submit(read, tasks[i]) for i in _largest_first(tasks)}
        try:
            for i in range(len(tasks)):
                yield futures[i].result()
        finally:
            for future in futures.values():
                future.cancel()


def _worth_copies(ctx: Context, tasks: Sequence[_Task]) -> bool:
    """Whether bytes enough are read, all of them here, for copies of this process to read them."""
    sources = [
        c.checkpoint.source for c in (ctx.candidate, ctx.base, ctx.merged_from) if c is not None
    ]
    if len(tasks) < 2 or any(s.remote for s in sources):
        return False
    modules = [m for t in tasks for m in t.modules]
    if len(sources) > 1:
        return sum(t.nbytes for m in modules for t in m.parts.values()) >= WORTH_COPIES
    scanned = (t for m in modules for t in m.parts.values() if not m.quantized or t is not m.weight)
    return sum(t.nbytes for t in scanned) >= SCANNED * WORTH_COPIES


def _by_copies(
    ctx: Context, read: Callable[[_Task], list[Outcome]], tasks: Sequence[_Task], workers: int
) -> Iterator[list[Outcome]]:
    """Yield what each task comes to, in the order of the tasks, worked out by copies of this
    process.
    """
    results = ctx.payload.results

    def read_apart(number: int) -> tuple[list[Outcome], dict[ResultKey, Any]]:
        known = results.keys()
        outcomes = read(tasks[number])
        return outcomes, results.exported(known)

    waiting: dict[int, list[Outcome]] = {}
    done = 0
    for number, (outcomes, exported) in by_copies(read_apart, _largest_first(tasks), workers):
        results.imported(exported)
        waiting[number] = outcomes
        while done in waiting:
            yield waiting.pop(done)
            done += 1
