# SPDX-License-Identifier: Apache-2.0
"""Draw mutations by seed, check them and count."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

import verifier
from tests.mutation import harmless, image
from tests.mutation.harm import View, harm, view
from tests.mutation.kinds import APART, KINDS, TOTAL, Kind
from tests.paths import TESTS
from verifier.findings import Report
from verifier.selftest.tiny import TINY, make

FIRST_HARMLESS = 10_000
FIRST_MODELOPT = 20_000
HARMLESS = 500
MODELOPT = 400
DRAWS = 60
DATA = TESTS / "data" / "modelopt"
COMMITTED = (("qwen3moe_nvfp4_experts_max", "src_qwen3moe"), ("llama_mxfp8", "src_llama"))
SHARED = (
    ("qwen3moe_nvfp4_experts_max", "src_qwen3moe"),
    ("llama_mxfp8", "src_llama"),
    ("llama_fp8_kvfp8", "src_llama"),
    ("llama_nvfp4_tinyamax", "src_llama"),
    ("m3_mixed_example", "m3_bf16_sharded"),
)
Told = frozenset[tuple[str, str, str, str]]


@dataclass(frozen=True)
class Clean:
    """A clean checkpoint, its base, and the findings of a check with the base and without."""

    name: str
    image: image.Image
    view: View
    base: Path
    base_view: View
    said: tuple[Told, Told]


@dataclass(frozen=True)
class Outcome:
    """One mutation: the edit, why it is harmful, and the results of a check, with the base and
    without.

    ``caught``: it was caught, by a new finding (error or warning) or a verdict other than passed.
    ``stopped``: the exit code is not 0.
    """

    seed: int
    kind: str
    knows: str
    checkpoint: str
    what: str
    harm: str
    caught: tuple[bool, bool] = (False, False)
    stopped: tuple[bool, bool] = (False, False)
    rules: tuple[str, ...] = ()
    crash: str = ""


@cache
def schedule() -> tuple[Kind, ...]:
    """Return the kind of each seed: those that can be caught, shuffled, then those apart."""
    known = [k for k in KINDS if k.knows in ("nothing", "base") for _ in range(k.count)]
    order = np.random.default_rng(20261121).permutation(len(known))
    apart = [k for k in KINDS if k.knows not in ("nothing", "base") for _ in range(k.count)]
    return (*(known[i] for i in order), *apart)


def _clean(name: str, path: Path, base: Path) -> Clean:
    said = (
        _told(verifier.check(path, base=base, depth="payload")),
        _told(verifier.check(path, depth="payload")),
    )
    return Clean(name, image.read(path), view(path), base, view(base), said)


def _told(report: Report) -> Told:
    found = {
        (f.rule, f.severity, f.message, f.where.tensor or "")
        for f in report.findings
        if f.severity != "info"
    }
    if report.verdict != "passed":
        found.add(("verdict", report.verdict, "", ""))
    return frozenset(found)


@cache
def cleans(root: Path) -> tuple[Clean, ...]:
    """Make the clean checkpoints of this process below ``root``: the self-test's, and two that
    ModelOpt wrote.
    """
    home = root / f"clean-{os.getpid()}"
    made = [make(home, t) for t in TINY if t.kind != "gptq"]  # edits are of small floats
    found = [_clean(m.spec.name, m.path, m.base) for m in made]
    return (*found, *(_clean(n, DATA / n, DATA / b) for n, b in COMMITTED))


@cache
def modelopt_cleans(folder: Path) -> tuple[Clean, ...]:
    """Return the clean checkpoints of the shared data directory."""
    return tuple(_clean(n, folder / n, folder / b) for n, b in SHARED if (folder / n).is_dir())


def one(seed: int, root: Path, modelopt: Path | None = None) -> Outcome:
    """Draw the mutation of a seed until one fits and does harm, and check it."""
    number = seed - FIRST_MODELOPT if seed >= FIRST_MODELOPT else seed
    kind = schedule()[number * 5 % TOTAL if seed >= FIRST_MODELOPT else number]
    choice = (
        modelopt_cleans(modelopt)
        if modelopt is not None and seed >= FIRST_MODELOPT
        else cleans(root)
    )
    work = root / f"work-{os.getpid()}"
    for draw in range(DRAWS):
        rng = np.random.default_rng((seed, draw))
        clean = choice[int(rng.integers(len(choice)))]
        mutant = clean.image.copy()
        try:
            what = kind.edit(mutant, rng)
        except image.Unfit:
            continue
        shutil.rmtree(work, ignore_errors=True)
        path = mutant.write(work / "ckpt")
        why = harm(clean.view, view(path), clean.base_view)
        if not why and kind.knows in ("nothing", "base"):
            continue
        return _judged(Outcome(seed, kind.name, kind.knows, clean.name, what, why), clean, path)
    return Outcome(seed, kind.name, kind.knows, "", f"no harmful place in {DRAWS} draws", "")


def _judged(outcome: Outcome, clean: Clean, path: Path) -> Outcome:
    caught, stopped, crash = [], [], ""
    rules: set[str] = set()
    for base, before in ((clean.base, clean.said[0]), (None, clean.said[1])):
        try:
            report = verifier.check(path, base=base, depth="payload")
        except Exception as error:  # noqa: BLE001  (a crash is an outcome here)
            crash = f"{type(error).__name__}: {error}"
            caught.append(False)
            stopped.append(False)
            continue
        new = _told(report) - before
        if outcome.kind == "harmless":  # another order of tensors gives another witness
            known = {t[:3] for t in before}
            new = frozenset(t for t in new if t[:3] not in known)
        rules |= {t[0] for t in new}
        caught.append(bool(new))
        stopped.append(report.exit_code != 0)
    values = asdict(outcome) | {
        "caught": tuple(caught),
        "stopped": tuple(stopped),
        "rules": tuple(sorted(rules)),
        "crash": crash,
    }
    return Outcome(**values)


def one_harmless(seed: int, root: Path, modelopt: Path | None = None) -> Outcome:
    """Draw the rewrite of a seed, make sure that it is harmless, and check it."""
    work = root / f"work-{os.getpid()}"
    for draw in range(DRAWS):
        rng = np.random.default_rng((seed, draw))
        choice = cleans(root)
        clean = choice[int(rng.integers(len(choice)))]
        mutant = clean.image.copy()
        edits = [
            harmless.REWRITES[i]
            for i in rng.choice(len(harmless.REWRITES), int(rng.integers(1, 4)), replace=False)
        ]
        said = []
        try:
            for edit in edits:
                said.append(edit(mutant, rng))
        except image.Unfit:
            continue
        shutil.rmtree(work, ignore_errors=True)
        path = mutant.write(work / "ckpt")
        why = harm(clean.view, view(path), clean.base_view)
        if why:
            return Outcome(
                seed, "harmless", "nobody", clean.name, "; ".join(said), f"NOT HARMLESS: {why}"
            )
        return _judged(
            Outcome(seed, "harmless", "nobody", clean.name, "; ".join(said), ""), clean, path
        )
    raise RuntimeError(f"no rewriting fits seed {seed}")


def _task(job: tuple[int, str, str | None]) -> Outcome:
    seed, root, modelopt = job
    run: Callable[..., Outcome] = one_harmless if FIRST_HARMLESS <= seed < FIRST_MODELOPT else one
    return run(seed, Path(root), Path(modelopt) if modelopt else None)


def run(seeds: Sequence[int], *, processes: int = 2, modelopt: Path | None = None) -> list[Outcome]:
    """Check some seeds, in order; each process makes its own clean checkpoints."""
    with tempfile.TemporaryDirectory(prefix="ckptgate-mutation-") as root:
        jobs = [(seed, root, str(modelopt) if modelopt else None) for seed in seeds]
        if processes == 1:
            return [_task(j) for j in jobs]
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            return list(pool.imap(_task, jobs, chunksize=8))


def score(outcomes: Iterable[Outcome]) -> dict[str, Any]:
    """Return the score with a base, over kinds that need a base or nothing, and the score without
    one, over kinds that need nothing.
    """
    found = [o for o in outcomes if o.checkpoint]
    with_base = [o for o in found if o.knows in ("nothing", "base")]
    without = [o for o in found if o.knows == "nothing"]

    def share(part: list[Outcome], which: int) -> dict[str, Any]:
        caught, stopped = sum(o.caught[which] for o in part), sum(o.stopped[which] for o in part)
        return {
            "caught": caught,
            "stopped": stopped,
            "of": len(part),
            "percent": round(100 * caught / max(1, len(part)), 2),
        }

    return {"with_base": share(with_base, 0), "without_base": share(without, 1)}


def by_kind(outcomes: Iterable[Outcome]) -> dict[str, dict[str, Any]]:
    """Return, for each kind, its number, how many were caught and stopped with a base and without,
    and the rules that caught most.
    """
    table: dict[str, dict[str, Any]] = {}
    rules: dict[str, Counter[str]] = {}
    for o in outcomes:
        row = table.setdefault(
            o.kind,
            {
                "knows": o.knows,
                "n": 0,
                "caught": 0,
                "stopped": 0,
                "caught_without": 0,
                "stopped_without": 0,
            },
        )
        if not o.checkpoint:
            row["unfit"] = row.get("unfit", 0) + 1
            continue
        row["n"] += 1
        row["caught"] += o.caught[0]
        row["stopped"] += o.stopped[0]
        row["caught_without"] += o.caught[1]
        row["stopped_without"] += o.stopped[1]
        rules.setdefault(o.kind, Counter()).update(o.rules)
    for name, counted in rules.items():
        table[name]["rules"] = dict(counted.most_common(5))
    return table


__all__ = [
    "APART",
    "FIRST_HARMLESS",
    "FIRST_MODELOPT",
    "HARMLESS",
    "MODELOPT",
    "TOTAL",
    "Outcome",
    "by_kind",
    "run",
    "schedule",
    "score",
]
