# SPDX-License-Identifier: Apache-2.0
"""Score base and candidate on every entry of a suite, compare, decide."""

from __future__ import annotations

import datetime
import hashlib
import math
import platform
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from verifier import __version__
from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, IncomparableError, UsageError
from verifier.evaluation import Margin
from verifier.gate.attempts import Attempts, Look, Pair
from verifier.gate.cache import Cached
from verifier.gate.comparison import UNKNOWN_ATTEMPTS, compare_runs
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import alpha_of
from verifier.gate.gate import Margins, margins_of, open_pair, strategy_of, terms_of
from verifier.gate.identity import identity_of
from verifier.gate.jobs import HF, Scorer, protocol_of
from verifier.gate.options import (
    BATCH,
    GateOptions,
    PathLike,
    Say,
    ScoringOptions,
    silent,
)
from verifier.gate.score import Strategy, formats_of, score
from verifier.gate.scorers.lm_eval_task import task_corpus
from verifier.gate.suite.decision import Compared, decided, measured, outcome_of
from verifier.gate.suite.file import Suite, SuiteEntry, read_suite
from verifier.gate.suite.result import EntryResult, Scored, SuiteResult
from verifier.gate.windows import ScoringPlan, plan_scoring
from verifier.progress import Progress

UNKNOWN_LOOKS = (
    "earlier attempts are unknown: the error is 5% only if this is the first look (--cache DIR "
    "records attempts, and keeps finished entries)"
)
_PACKAGES = ("torch", "transformers", "lm_eval", "datasets", "numpy", "scipy")


@dataclass(frozen=True)
class SuiteOptions:
    """How a suite is scored; as in `verifier.gate.run`."""

    device: str = "cpu"
    batch: int = BATCH
    workers: int | None = None
    scorer: Scorer = HF
    cache: PathLike | None = None
    progress: Progress | None = field(default=None, compare=False)
    say: Say = field(default=silent, compare=False)


@dataclass(frozen=True)
class _Planned:
    """An entry that nothing is left to refuse of: what is scored, and what decides."""

    entry: SuiteEntry
    pair: Pair
    options: GateOptions
    margins: Margins
    max_length: Margin
    plan: ScoringPlan
    strategy: Strategy

    @property
    def decisive(self) -> list[Margin]:
        """All margins, that of the loss first."""
        return [*self.margins.decisive, self.max_length]

    def terms(self, suite: Suite) -> list[str]:
        """Return what else decides a look."""
        return [*terms_of(self.pair.base, self.options, None), suite.sha256]


def run_suite(
    candidate: PathLike,
    base: PathLike,
    suite: Suite | PathLike,
    options: SuiteOptions | None = None,
) -> SuiteResult:
    """Compare a candidate with its base on every entry of a suite, and decide over all of them.

    With a cache, runs are kept and units are resumed: what is finished is not scored again.

    Args:
        candidate: directory of the quantized checkpoint.
        base: directory of its reference.
        suite: the suite, or its file.
        options: how it is scored.

    Raises:
        UsageError: the candidate is the base, an entry that cannot be scored, another attempt after
            a failed one.
        ContentError: a checkpoint cannot be scored, or their tokenizers differ.
    """
    started, options = time.monotonic(), options or SuiteOptions()
    if not isinstance(suite, Suite):
        suite = read_suite(suite)
    # Everything that can be refused is, before any model runs.
    planned = _plan(candidate, base, suite, options)
    pair = planned[0].pair
    attempts = Attempts(Path(options.cache)) if options.cache is not None else None
    looks = [
        attempts.look(each.pair, each.decisive, each.terms(suite)) if attempts else None
        for each in planned
    ]
    # One run of a suite is one look, at the error of its entry with the most looks before it.
    number = max((look.number for look in looks if look is not None), default=None)
    alpha = alpha_of(number)
    entries = []
    for place, (each, look) in enumerate(zip(planned, looks, strict=True), 1):
        options.say(f"entry {each.entry.name}, {place} of {len(planned)}")
        with _named(each.entry):
            entries.append(_measured(each, look, number))
    results = decided(entries, alpha)
    result = SuiteResult(
        suite.name,
        suite.sha256,
        outcome_of(results),
        _scored(pair.candidate),
        _scored(pair.base),
        results,
        number,
        alpha,
        datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        round(time.monotonic() - started, 1),
        _versions(),
        _notes(looks),
    )
    if attempts is not None:
        _record(attempts, suite, planned, result)
    return result


def _plan(
    candidate: PathLike, base: PathLike, suite: Suite, options: SuiteOptions
) -> list[_Planned]:
    pair: Pair | None = None
    planned = []
    for entry in suite.entries:
        with _named(entry):
            gate_options = _gate_options(entry, options)
            scoring = gate_options.scoring
            pair = replace(pair, options=scoring) if pair else open_pair(candidate, base, scoring)
            strategy, top_k = strategy_of(pair.base, gate_options)
            if isinstance(strategy, Cached):
                strategy = replace(strategy, keep_all=True)
            plan = plan_scoring((pair.candidate, pair.base), replace(scoring, top_k=top_k))
            margins = margins_of(pair, gate_options)
            max_length = length_margin_of(entry.max_length_change)
            planned.append(_Planned(entry, pair, gate_options, margins, max_length, plan, strategy))
    return planned


def _gate_options(entry: SuiteEntry, options: SuiteOptions) -> GateOptions:
    scoring = ScoringOptions(
        _corpus(entry),
        protocol_of(entry.protocol),
        seq_len=entry.seq_len,
        batch=options.batch,
        device=options.device,
        workers=options.workers,
        scorer=options.scorer,
        progress=options.progress,
        say=options.say,
    )
    made = GateOptions(
        scoring, max_increase=entry.max_increase, cache=options.cache, max_kl=entry.max_kl
    )
    made.check()
    return made


def _corpus(entry: SuiteEntry) -> Corpus:
    if entry.task is not None:
        corpus = task_corpus(entry.task, entry.metric, entry.repeats)
    else:
        corpus = load_corpus(str(entry.corpus))
    return corpus.head(entry.documents * entry.repeats if entry.documents else None)


def length_margin_of(option: str | float) -> Margin:
    """Return the largest tolerated change of completion tokens, as a logarithm of their ratio.

    Args:
        option: ``5%`` or ``0.05``: the ratio is between 1/1.05 and 1.05.

    Raises:
        UsageError: not a share above zero and below one.
    """
    text = str(option).strip()
    try:
        share = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        share = math.nan
    if not 0 < share < 1:
        raise UsageError(f"max_length_change {text}: give a percentage of tokens like 5%")
    return Margin(math.log1p(share), f"{share:.4g} of completion tokens, up or down")


def _measured(planned: _Planned, look: Look | None, number: int | None) -> EntryResult:
    """Score and compare one entry."""
    scored = score(planned.plan, planned.strategy)
    candidate_run, base_run = scored.runs
    gate = compare_runs(
        base_run,
        candidate_run,
        planned.margins.loss,
        kl=scored.kl,
        looks=number,
        kl_margin=planned.margins.kl,
        base_record=look.base_record if look is not None else None,
    )
    notes = tuple(note for note in gate.notes if note != UNKNOWN_ATTEMPTS)
    gate = replace(gate, notes=notes)
    return measured(
        planned.entry.name,
        Compared(base_run, candidate_run, gate, planned.max_length, planned.entry.repeats),
    )


def _record(
    attempts: Attempts, suite: Suite, planned: Sequence[_Planned], result: SuiteResult
) -> None:
    """Record one attempt for the question of each entry, with the verdict of the whole: another run
    after it is another chance for every entry.
    """
    keys = [each.pair.look_key(each.decisive, each.terms(suite)) for each in planned]
    suite_run = hashlib.sha256("".join(keys).encode()).hexdigest()
    for each, entry in zip(planned, result.entries, strict=True):
        gate = replace(entry.gate, outcome=result.outcome)
        attempts.record(each.pair, gate, 0.0, each.decisive, each.terms(suite), suite=suite_run)


def _scored(ckpt: Checkpoint) -> Scored:
    return Scored(ckpt.uri, identity_of(ckpt), tuple(sorted(formats_of(ckpt))))


def _notes(looks: Sequence[Look | None]) -> tuple[str, ...]:
    if None in looks:
        return (UNKNOWN_LOOKS,)
    return tuple(dict.fromkeys(note for look in looks if look is not None for note in look.notes))


def _versions() -> dict[str, str]:
    versions = {"ckptgate": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


@contextmanager
def _named(entry: SuiteEntry) -> Iterator[None]:
    """Put the entry's name before an error's message."""
    try:
        yield
    except (UsageError, ContentError) as error:
        if type(error) in (UsageError, ContentError, IncomparableError):
            raise type(error)(f"entry {entry.name}: {error}") from error
        raise
