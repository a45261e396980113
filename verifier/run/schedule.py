# SPDX-License-Identifier: Apache-2.0
"""Runs rules: first those that read headers, then those that read bytes, some modules of a shard at
a time, in several processes or threads.

A rule that checks each module by itself (`Rule.split`) is run on one unit of work at a time: the
modules of a shard, or of a large shard some that lie next to one another. Its findings are put
together in the order of the shards, so the report does not depend on the number of workers and
machines. A rule that compares modules, and what a rule says of all modules together
(`Rule.across`), is run once, on all of them. Rules that load the model come last, one by one.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from itertools import chain, groupby, islice
from typing import Any

import numpy as np

from verifier.errors import ContentError
from verifier.findings import Finding
from verifier.payload.cache import ResultKey
from verifier.payload.reader import scanned_tensors
from verifier.processes import can_fork, forked
from verifier.progress import Progress, no_progress
from verifier.reconstruction import compiled
from verifier.rules import Check, Context, Rule, Tally
from verifier.run.group import group
from verifier.run.options import Reading
from verifier.run.subset import Subset, file_of, subset_numbers
from verifier.run.unchecked import INPUT_SCALE_RULES, SCALE_RULES, ReadScales, read_scales
from verifier.schemes import Module
from verifier.text import counted

Rate = Callable[[Finding], Finding]
"""Sets the severity of a finding in this run."""
Advance = Callable[[float], None]
"""Reports which share of a task is done, from 0 to 1."""
Run = Callable[["_Task", Advance], "_Result"]
WORTH_COPIES = 64 << 20
"""Bytes of weights to compare from which on copies of this process are worth the tens of
milliseconds that they cost."""
UNIT_BYTES = 64 << 20
"""A shard of more bytes is several units of work: as many as all workers need to end together."""
MAX_UNITS = 1024
"""Units of a checkpoint, one per shard aside: each costs milliseconds."""
SCAN_SPEED = 16
"""Bytes that are only scanned take this many times less than bytes that are compared."""
MAX_KINDS = 5_000
"""Kinds of findings per rule; beyond it a merged report may name other ones first than a report on
all modules does."""


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


@dataclass(slots=True)
class Outcomes:
    """The outcome of each rule by id, and the scale tensors that they read, shard by shard."""

    by_rule: dict[str, Outcome] = field(default_factory=dict)
    scales: list[ReadScales] = field(default_factory=list)


def run_rules(
    ctx: Context,
    rules: Sequence[Rule],
    reading: Reading,
    rate: Rate,
    progress: Progress = no_progress,
) -> Outcomes:
    """Return the outcome of each rule.

    Args:
        ctx: of the whole checkpoint.
        rules: those to run.
        reading: how bytes are read. Rules of depth header run in every subset; those that compare
            modules, and those that load the model, in the first one only.
        rate: sets the severity of each finding, before equal findings are grouped.
        progress: called with the bytes that are checked and all that will be.
    """
    outcomes = Outcomes({r.id: _run(r, r.check, ctx, rate) for r in rules if r.depth == "header"})
    payload = [r for r in rules if r.depth == "payload"]
    if payload:
        outcomes.scales = _run_payload(ctx, payload, reading, rate, progress, outcomes.by_rule)
    for rule in (r for r in rules if r.depth not in ("header", "payload")):
        progress(0, 0, f"running {rule.id}")
        outcomes.by_rule[rule.id] = (
            _run(rule, rule.check, ctx, rate)
            if reading.in_first_subset
            else _deferred(reading, "loads the whole model")
        )
    return outcomes


def _deferred(reading: Reading, reason: str) -> Outcome:
    of = reading.subset.of if reading.subset else 1
    return Outcome(deferred=f"{reason}: runs in subset 1/{of}")


def _run_payload(
    ctx: Context,
    rules: Sequence[Rule],
    reading: Reading,
    rate: Rate,
    progress: Progress,
    outcomes: dict[str, Outcome],
) -> list[ReadScales]:
    """Add the outcome of each rule of depth payload, and return the scales that they read."""
    outcomes |= {rule.id: Outcome() for rule in rules}
    split, whole = [r for r in rules if r.split], [r for r in rules if not r.split or r.across]
    if not reading.in_first_subset:
        deferred = _deferred(reading, "compares all modules")
        outcomes |= {rule.id: deferred for rule in whole if not rule.split}
        whole = []
    modules = list(ctx.candidate.modules.values())
    parts = reading.sample.choose(modules) if reading.sample else _units(ctx, reading.subset)
    tasks = [_Task(split, part, of) for part, of in parts if split]
    comparing = [_Task([rule], modules, len(modules)) for rule in whole]
    amounts = _Amounts([_bytes_read(ctx, task.modules) for task in tasks], progress)
    scales: list[ReadScales] = []
    examined: set[str] = set()
    results = _results(ctx, tasks, comparing, reading.workers, rate, amounts)
    for task, result in zip(tasks, islice(results, len(tasks)), strict=True):
        for rule, outcome in zip(task.rules, result.outcomes, strict=True):
            outcome.tally.of = task.scaled(outcome.tally.of)
            outcomes[rule.id].add(outcome)
        if result.scales is not None:
            scales.append(result.scales.scaled(task.scaled))
    # What takes all modules comes first, as the first of several subsets does in a merged report.
    for rule, result in zip(whole, results, strict=True):
        (outcome,) = result.outcomes
        outcome.add(outcomes[rule.id])
        outcomes[rule.id] = outcome
        if rule.id in INPUT_SCALE_RULES:
            examined |= result.examined
    if {rule.id for rule in whole} >= INPUT_SCALE_RULES:
        scales.insert(0, read_scales(ctx.candidate, examined, inputs=True))
    if reading.sample is not None:
        for rule in split:
            tally = outcomes[rule.id].tally
            reasons = filter(None, (str(reading.sample), tally.reason))
            tally.reason = "; ".join(reasons)
    return scales


def _results(
    ctx: Context,
    tasks: Sequence[_Task],
    comparing: Sequence[_Task],
    workers: int,
    rate: Rate,
    amounts: _Amounts,
) -> Iterator[_Result]:
    """Yield the result of each task, in order."""

    def run(task: _Task, advance: Advance) -> _Result:
        part = ctx.part(task.modules)
        part.payload.announce(task.modules)
        outcomes = []
        for number, rule in enumerate(task.rules, 1):
            outcomes.append(_run(rule, rule.check, part, rate))
            advance(number / len(task.rules))
        if not {rule.id for rule in task.rules} >= SCALE_RULES:
            return _Result(outcomes)
        scales = read_scales(part.candidate, part.payload.examined, inputs=False)
        return _Result(outcomes, scales=scales)

    def compare(task: _Task, _advance: Advance) -> _Result:
        amounts.detail(f"comparing modules, {task.rules[0].id}")
        part = ctx.part(task.modules)
        outcomes = [_run(rule, rule.across or rule.check, part, rate) for rule in task.rules]
        return _Result(outcomes, part.payload.examined)

    _keep_freed_memory()
    ctx.prepare()
    if ctx.base is not None:
        compiled.prepare(sum(task.nbytes for task in tasks))
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
        self._sizes, self._progress, self._total = sizes, progress, sum(sizes)
        self._lock = threading.Lock()
        self._finished = self._nbytes = 0
        self._begun: dict[int, float] = {}  # the share that is done of each
        if self._total:
            progress(0, self._total)

    def advance(self, task: int, share: float) -> None:
        """Note that a share of a task is done; it is 1 once for each task."""
        with self._lock:
            if share < 1:
                self._begun[task] = share
            else:
                self._begun.pop(task, None)
                self._finished += 1
                self._nbytes += self._sizes[task]
        self.detail(f"{self._finished:,} of {counted(len(self._sizes), 'part')}")

    def detail(self, text: str) -> None:
        """Report what is done, and a remark."""
        with self._lock:
            nbytes = sum(self._sizes[task] * share for task, share in self._begun.items())
            nbytes += self._nbytes
        self._progress(int(nbytes), self._total, text)


@dataclass(frozen=True, slots=True)
class _Task:
    """Rules to run on some modules; ``of`` is how many modules they represent."""

    rules: Sequence[Rule]
    modules: Sequence[Module]
    of: int

    @property
    def nbytes(self) -> int:
        """The bytes of the modules' tensors."""
        return _nbytes(self.modules)

    def scaled(self, count: int) -> int:
        """Return a count over the modules as one over those that they represent."""
        return count if self.of == len(self.modules) else count * self.of // len(self.modules)


@dataclass(frozen=True, slots=True)
class _Result:
    """The outcome of each rule of a task.

    ``examined`` are the tensors that rules read which compare modules. ``scales`` are those that
    rules read which check each module by itself; None where not all of `SCALE_RULES` ran.
    """

    outcomes: list[Outcome]
    examined: set[str] = field(default_factory=set)
    scales: ReadScales | None = None


def _bytes_read(ctx: Context, modules: Iterable[Module]) -> int:
    """Return the bytes of some modules that rules read: with another checkpoint to compare with,
    all; without one, the scales and unquantized tensors.
    """
    if ctx.base is not None or ctx.merged_from is not None:
        return _nbytes(modules)
    return sum(t.nbytes for m in modules for t in scanned_tensors(m))


def _nbytes(modules: Iterable[Module]) -> int:
    return sum(t.nbytes for m in modules for t in m.parts.values())


def _units(ctx: Context, subset: Subset | None) -> list[tuple[list[Module], int]]:
    """Return the modules of each unit of work, in the shards' order, and their number."""
    units: list[list[Module]] = []
    modules = _in_shards_order(ctx, subset)
    limit = max(UNIT_BYTES, _nbytes(modules) // MAX_UNITS)
    for _, shard in groupby(modules, file_of):
        unit: list[Module] = []
        size = 0
        for module in shard:
            nbytes = _nbytes([module])
            if unit and size + nbytes > limit:
                units.append(unit)
                unit, size = [], 0
            unit.append(module)
            size += nbytes
        units.append(unit)
    return [(unit, len(unit)) for unit in units]


def _in_shards_order(ctx: Context, subset: Subset | None) -> list[Module]:
    """Return the modules shard by shard: all, or those of a subset."""
    place = {shard.file: number for number, shard in enumerate(ctx.checkpoint.shards)}
    modules = sorted(ctx.candidate.modules.values(), key=lambda m: place[file_of(m)])
    if subset is None:
        return modules
    numbers = subset_numbers([_bytes_read(ctx, [m]) for m in modules], subset.of)
    return [m for m, number in zip(modules, numbers, strict=True) if number == subset.number]


def _run(rule: Rule, check: Check, ctx: Context, rate: Rate) -> Outcome:
    own = ctx.for_rule(rule.id, rule.severity)
    findings: list[Finding] = []
    stopped = ""
    try:
        findings.extend(map(rate, check(own)))
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
) -> Iterator[_Result]:
    """Yield the result of each task, in order."""

    def run_task(number: int) -> _Result:
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
) -> Iterator[_Result]:
    """Yield the result of each task, in order, worked out by copies of this process."""
    results = ctx.payload.results

    def run_in_copy(number: int, send: Advance) -> tuple[_Result, dict[ResultKey, Any]]:
        known = len(results)
        result = run(tasks[number], send)
        return result, results.exported(known)

    waiting: dict[int, _Result] = {}
    done = 0
    for number, (result, exported) in forked(
        run_in_copy, _largest_first(tasks), workers, amounts.advance
    ):
        results.imported(exported)
        waiting[number] = result
        while done in waiting:
            yield waiting.pop(done)
            done += 1
