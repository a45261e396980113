# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.mutation``: the score (results.json), or single seeds."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path

from tests.mutation import render
from tests.mutation.kinds import KINDS
from tests.mutation.run import (
    FIRST_HARMLESS,
    FIRST_MODELOPT,
    HARMLESS,
    MODELOPT,
    by_kind,
    run,
    schedule,
    score,
)

HERE = Path(__file__).parent
RESULTS = HERE / "results.json"


def kinds_table() -> str:
    """Return the table of KINDS.md."""
    rows = ["| kind | number | needs | edit |", "| --- | ---: | --- | --- |"]
    rows += [
        f"| `{k.name}` | {k.count} | {k.knows} | {' '.join((k.edit.__doc__ or '').split())} |"
        for k in KINDS
    ]
    return "\n".join(rows) + "\n"


def main(argv: list[str]) -> int:
    """Run seeds and print, or write results.json."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__)
    parser.add_argument(
        "--seed", type=int, nargs="+", help="check these seeds; print the edit and the findings"
    )
    parser.add_argument(
        "--count",
        type=int,
        help="check the first COUNT harmful seeds and a quarter as many harmless ones",
    )
    parser.add_argument("--kind", help="check all seeds of one kind")
    parser.add_argument("--kinds", action="store_true", help="print the table of KINDS.md")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--write",
        action="store_true",
        help=f"write {RESULTS.name} (the whole score) and docs/proof.md",
    )
    parser.add_argument(
        "--render", action="store_true", help="write docs/proof.md from the committed results"
    )
    given = parser.parse_args(argv)
    modelopt = Path(os.environ.get("CKPTGATE_TEST_DATA", "/nonexistent")) / "modelopt"
    shared = modelopt if modelopt.is_dir() else None
    if given.render:
        render.PAGE.write_text(render.render(), encoding="utf-8")
        return 0
    if given.kinds:
        print(kinds_table(), end="")
        return 0
    if given.seed or given.kind:
        seeds = given.seed or [i for i, k in enumerate(schedule()) if k.name == given.kind]
        for outcome in run(
            seeds, processes=1 if len(seeds) < 20 else given.processes, modelopt=shared
        ):
            print(json.dumps(asdict(outcome)))
        return 0
    started = time.monotonic()
    count = given.count or len(schedule())
    harmful = run(range(count), processes=given.processes)
    quiet = count // 4 if given.count else HARMLESS
    harmless = run(range(FIRST_HARMLESS, FIRST_HARMLESS + quiet), processes=given.processes)
    extra = (
        run(
            range(FIRST_MODELOPT, FIRST_MODELOPT + MODELOPT),
            processes=given.processes,
            modelopt=shared,
        )
        if (shared and not given.count)
        else []
    )
    alarms = [o for o in harmless if any(o.caught) or o.harm or o.crash]
    crashes = [o for o in (*harmful, *extra) if o.crash]
    survivors = [
        o
        for o in (*harmful, *extra)
        if o.checkpoint  # otherwise no checkpoint suits it: counted as unfit
        and (
            (o.knows in ("nothing", "base") and not o.caught[0])
            or (o.knows == "nothing" and not o.caught[1])
        )
    ]
    found = {
        "command": "python -m tests.mutation --write",
        "versions": {
            p: importlib.metadata.version(p)
            for p in ("ckptgate", "numpy", "ml_dtypes", "safetensors")
        }
        | {"python": platform.python_version()},
        "score": score(harmful),
        "modelopt_score": score(extra) if extra else None,
        "harmless": {"n": len(harmless), "alarms": len(alarms)},
        "kinds": dict(sorted(by_kind(harmful).items())),
        "survivors": [asdict(o) for o in survivors],
        "alarms": [asdict(o) for o in alarms],
        "crashes": [asdict(o) for o in crashes],
    }
    if given.write:
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        render.PAGE.write_text(render.render(), encoding="utf-8")
    print(json.dumps({k: found[k] for k in ("score", "modelopt_score", "harmless")}))
    for name, row in found["kinds"].items():  # type: ignore[attr-defined]
        weak = row["caught"] < row["n"] or (
            row["knows"] == "nothing" and row["caught_without"] < row["n"]
        )
        if weak or row.get("unfit"):
            print(f"{name:34} {row}")
    seconds = time.monotonic() - started
    print(
        f"{len(survivors)} survivors, {len(alarms)} alarms, {len(crashes)} crashes, {seconds:.0f} s"
    )
    return 1 if alarms or crashes else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
