# SPDX-License-Identifier: Apache-2.0
"""Runs rules: first those that read headers, then those that read bytes, shard by shard, in
several processes or threads.

A rule that checks each module by itself (`Rule.split`) is run on the modules of one shard at a
time. Its findings are put together in the order of the shards, so the report does not depend on the
number of workers and machines. A rule that compares modules is run once, on all of them. Rules that
load the model come last, one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import numpy as np

from verifier.errors import ContentError
from verifier.findings import Finding
from verifier.payload.cache import ResultKey
from verifier.payload.reader import scanned_tensors
from verifier.processes import can_fork, forked
from verifier.progress import Progress, no_progress
from verifier.rules import Context, Rule, Tally
from verifier.run.group import group
from verifier.run.options import Reading
from verifier.run.subset import Subset, file_of, subset_numbers
from verifier.schemes import Module
from verifier.text import counted

Rate = Callable[[Finding], Finding]
"""Sets the severity of a finding in this run."""
Advance = Callable[[float], None]
"""Reports which share of a task is done, from 0 to 1."""
Run = Callable[["_Task", Advance], list["Outcome"]]
WORTH_COPIES = 64 << 20
"""Bytes of weights to compare from which on copies of this process are worth the tens of
milliseconds that they cost."""
SCAN_SPEED = 16
"""Bytes that are only scanned take this many times less than bytes that are compared."""
MAX_KINDS = 5_000
"""Kinds of findings per rule; beyond it a merged report may name other ones first than a report on
all shards does."""


@dataclass(slots=True)
class Outcome:
    """The findings and tally of a rule.

    ``stopped`` is why it could not finish, ``deferred`` why it did not run here.
    """

    findings: list[Finding] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    stopped: str = ""
    deferred: str = ""

    def add(self, other: Outcome) -> None:
        """Add the outcome of the same rule on further modules."""
        self.findings = group([*self.findings, *other.findings], 0, MAX_KINDS)
        self.tally.checked += other.tally.checked
        self.tally.of += other.tally.of
        self.tally.reason = self.tally.reason or other.tally.reason
        self.stopped = self.stopped or other.stopped


def run_rules(
    ctx: Context,
    rules: Sequence[Rule],
    reading: Reading,
    rate: Rate,
    progress: Progress = no_progress,
) -> dict[str, Outcome]:
    """Return the outcome of each rule, by id.

    Args:
        ctx: of the whole checkpoint.
        rules: those to run.
        reading: how bytes are read. Rules of depth header run in every subset; those that compare
            modules, and those that load the model, in the first one only.
        rate: sets the severity of each finding, before equal findings are grouped.
        progress: called with the bytes that are checked and all that will be.
    """
    outcomes = {r.id: _run(r, ctx, rate) for r in rules if r.depth == "header"}
    payload = [r for r in rules if r.depth == "payload"]
    if payload:
        outcomes |= _run_payload(ctx, payload, reading, rate, progress)
    for rule in (r for r in rules if r.depth not in ("header", "payload")):
        progress(0, 0, f"{rule.id}: {rule.title}")
        outcomes[rule.id] = (
            _run(rule, ctx, rate)
            if reading.in_first_subset
            else _deferred(reading, "loads the whole model")
        )
    return outcomes


def _deferred(reading: Reading, reason: str) -> Outcome:
    of = reading.subset.of if reading.subset else 1
    return Outcome(deferred=f"{reason}: runs in subset 1/{of}")


def _run_payload(
    ctx: Context, rules: Sequence[Rule], reading: Reading, rate: Rate, progress: Progress
) -> dict[str, Outcome]:
    """Return the outcome of each rule of depth payload."""
    outcomes = {rule.id: Outcome() for rule in rules}
    split, whole = [r for r in rules if r.split], [r for r in rules if not r.split]
    if not reading.in_first_subset:
        deferred = _deferred(reading, "compares modules of all shards")
        outcomes |= {rule.id: deferred for rule in whole}
        whole = []
    modules = list(ctx.candidate.modules.values())
    parts = reading.sample.choose(modules) if reading.sample else _by_shard(ctx, reading.subset)
    tasks = [_Task(split, part, of) for part, of in parts if split and part]
    comparing = [_Task([rule], modules, len(modules)) for rule in whole]
    amounts = _Amounts([_bytes_read(ctx, task) for task in tasks], progress)
    results = _results(ctx, tasks, comparing, reading.workers, rate, amounts)
    for task, of_task in zip([*tasks, *comparing], results, strict=True):
        for rule, outcome in zip(task.rules, of_task, strict=True):
            outcome.tally.of = task.scaled(outcome.tally.of)
            outcomes[rule.id].add(outcome)
    if reading.sample is not None:
        for rule in split:
            tally = outcomes[rule.id].tally
            reasons = filter(None, (str(reading.sample), tally.reason))
            tally.reason = "; ".join(reasons)
    return outcomes


def _results(
    ctx: Context,
    tasks: Sequence[_Task],
    comparing: Sequence[_Task],
    workers: int,
    rate: Rate,
    amounts: _Amounts,
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each task, in order."""

    def run(task: _Task, advance: Advance) -> list[Outcome]:
        part = ctx.part(task.modules)
        if all(rule.split for rule in task.rules):
            part.payload.announce(task.modules)
        outcomes = []
        for number, rule in enumerate(task.rules, 1):
            outcomes.append(_run(rule, part, rate))
            advance(number / len(task.rules))
        return outcomes

    def compare(task: _Task, _advance: Advance) -> list[Outcome]:
        amounts.detail(f"comparing modules, {task.rules[0].id}")
        return run(task, lambda _share: None)

    _keep_freed_memory()
    ctx.prepare()
    # Shards first: rules that compare modules then find cached what they ask for. At the same time
    # it would be worked out twice.
    copied = workers > 1 and _worth_copies(ctx, tasks) and can_fork()
    split = _by_copies if copied else _by_threads
    return chain(
        split(ctx, run, tasks, workers, amounts),
        _by_threads(ctx, compare, comparing, workers, amounts),
    )


class _Amounts:
    """Sums up how much of each task is done; several threads may report."""

    def __init__(self, sizes: Sequence[int], progress: Progress) -> None:
        self._sizes, self._shares = sizes, [0.0] * len(sizes)
        self._progress, self._total = progress, sum(sizes)
        if self._total:
            progress(0, self._total)

    def advance(self, task: int, share: float) -> None:
        """Note that a share of a task is done."""
        self._shares[task] = share
        finished = sum(share == 1 for share in self._shares)
        self.detail(f"{finished:,} of {counted(len(self._sizes), 'shard')}")

    def detail(self, text: str) -> None:
        """Report what is done, and a remark."""
        pairs = zip(self._sizes, self._shares, strict=True)
        self._progress(int(sum(nbytes * share for nbytes, share in pairs)), self._total, text)


@dataclass(frozen=True, slots=True)
class _Task:
    """Rules to run on some modules; ``of`` is how many modules they represent."""

    rules: Sequence[Rule]
    modules: Sequence[Module]
    of: int

    @property
    def nbytes(self) -> int:
        """The bytes of the modules' tensors."""
        return sum(t.nbytes for m in self.modules for t in m.parts.values())

    def scaled(self, count: int) -> int:
        """Return a count over the modules as one over those that they represent."""
        return count if self.of == len(self.modules) else count * self.of // len(self.modules)


def _bytes_read(ctx: Context, task: _Task) -> int:
    """Return the bytes that the rules of a task read: with another checkpoint to compare with, all;
    without one, the scales and unquantized tensors.
    """
    if ctx.base is not None or ctx.merged_from is not None:
        return task.nbytes
    return sum(t.nbytes for m in task.modules for t in scanned_tensors(m))


def _by_shard(ctx: Context, subset: Subset | None) -> list[tuple[list[Module], int]]:
    """Return the modules of each shard, in the shards' order, and their number."""
    modules: dict[str, list[Module]] = {s.file: [] for s in ctx.checkpoint.shards}
    for module in ctx.candidate.modules.values():
        modules[file_of(module)].append(module)
    if subset is not None:
        numbers = subset_numbers(ctx.checkpoint, subset.of)
        modules = {f: m for f, m in modules.items() if numbers[f] == subset.number}
    return [(part, len(part)) for part in modules.values()]


def _run(rule: Rule, ctx: Context, rate: Rate) -> Outcome:
    own = ctx.for_rule(rule.id, rule.severity)
    findings: list[Finding] = []
    stopped = ""
    try:
        findings.extend(map(rate, rule.check(own)))
    except ContentError as error:
        # A file that is shorter than its checked header: it changed during the run.
        stopped = str(error)
        own.tally.miss(1, stopped)
    return Outcome(group(findings, 0, MAX_KINDS), own.tally, stopped)


def _keep_freed_memory() -> None:
    """Let the C library reuse the memory of arrays of some megabytes.

    glibc asks the kernel for every array beyond 128 kB and returns it at once; a payload check then
    spends more time on fresh pages than on values. Its limit follows the largest such array that
    was ever freed, up to 32 MB (mallopt(3), M_MMAP_THRESHOLD): free one of which no byte was
    touched. Other C libraries ignore it.
    """
    np.empty(16 << 20, np.uint8)


def _largest_first(tasks: Sequence[_Task]) -> list[int]:
    """Return the tasks' numbers in an order that leaves no worker with a large one at the end."""
    return sorted(range(len(tasks)), key=lambda i: -tasks[i].nbytes)


def _by_threads(
    _ctx: Context, run: Run, tasks: Sequence[_Task], workers: int, amounts: _Amounts
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each task, in order."""

    def run_task(number: int) -> list[Outcome]:
        return run(tasks[number], partial(amounts.advance, number))

    if workers == 1 or len(tasks) < 2:
        yield from map(run_task, range(len(tasks)))
        return
    with ThreadPoolExecutor(workers, "ckptgate") as pool:
        futures = {i: pool.submit(run_task, i) for i in _largest_first(tasks)}
        try:
            for i in range(len(tasks)):
                yield futures[i].result()
        finally:
            for future in futures.values():
                future.cancel()


def _worth_copies(ctx: Context, tasks: Sequence[_Task]) -> bool:
    """Whether enough bytes are read, all from local files, for copies of this process to pay."""
    checkpoints = (ctx.candidate, ctx.base, ctx.merged_from)
    sources = [c.checkpoint.source for c in checkpoints if c is not None]
    if len(tasks) < 2 or any(s.remote for s in sources):
        return False
    if len(sources) > 1:
        return sum(task.nbytes for task in tasks) >= WORTH_COPIES
    modules = (m for task in tasks for m in task.modules)
    scanned = sum(t.nbytes for m in modules for t in scanned_tensors(m))
    return scanned >= SCAN_SPEED * WORTH_COPIES


def _by_copies(
    ctx: Context, run: Run, tasks: Sequence[_Task], workers: int, amounts: _Amounts
) -> Iterator[list[Outcome]]:
    """Yield the outcomes of each task, in order, worked out by copies of this process."""
    results = ctx.payload.results

    def run_in_copy(number: int, send: Advance) -> tuple[list[Outcome], dict[ResultKey, Any]]:
        known = results.keys()
        outcomes = run(tasks[number], send)
        return outcomes, results.exported(known)

    waiting: dict[int, list[Outcome]] = {}
    done = 0
    for number, (outcomes, exported) in forked(
        run_in_copy, _largest_first(tasks), workers, amounts.advance
    ):
        results.imported(exported)
        waiting[number] = outcomes
        while done in waiting:
            yield waiting.pop(done)
            done += 1
