# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.faults.soak --write``: 100 exports and checks in one process; what it holds
after each must not grow.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import shutil
import sys
import tempfile
import threading
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import exporter
from tests.faults.conditions import SOURCE
from tests.kill.run import files_of
from verifier import check

RESULTS = Path(__file__).with_name("soak.json")
WARM = 20
"""Runs until caches are full; growth counts from there."""
MOST_KB = 4_000
"""Growth of allocated memory that is noise of the allocator, kB."""
_LIBC = ctypes.CDLL(None)
_ARENA_MAX = -8
"""A parameter of mallopt(3)."""


@dataclass(frozen=True)
class Held:
    """What the process holds after a run: allocated kilobytes, descriptors, threads, and files in
    its folder other than OUT. Pages of libraries do not count: how many of them are private depends
    on what other processes run.
    """

    allocated_kb: int
    descriptors: int
    threads: int
    leftovers: int


def held(folder: Path) -> Held:
    gc.collect()
    _LIBC.malloc_trim(0)  # what was freed is not held, wherever glibc keeps it
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return Held(
        next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")),
        len(os.listdir("/proc/self/fd")),
        threading.active_count(),
        len([path for path in folder.rglob("*") if path.parent != folder / "out"]) - 1,
    )


def soak(runs: int) -> list[Held]:
    """Export and check so often, each time to the same bytes, and return what is held after each.

    Raises:
        RuntimeError: a run wrote other bytes, or its check did not pass.
    """
    # Each thread takes an arena of its own: what is left in them differs by 5 MB from run to run.
    _LIBC.mallopt(_ARENA_MAX, 1)
    states, first = [], None
    with tempfile.TemporaryDirectory(prefix="ckptgate-soak-") as name:
        folder = Path(name)
        out = folder / "out"
        os.environ["TMPDIR"] = name
        tempfile.tempdir = name
        for _ in range(runs):
            exporter.export(
                SOURCE,
                out,
                recipe="nvfp4_experts_only",
                input_scale="one",
                shard_bytes=200_000,
                workers=4,
            )
            verdict = check(str(out), base=str(SOURCE), depth="payload", workers=2).verdict
            files = files_of(out)
            first = first or files
            if files != first or verdict != "passed":
                raise RuntimeError(f"a run of the soak ended otherwise: {verdict}")
            states.append(held(folder))
            shutil.rmtree(out)
    return states


def grown(states: list[Held]) -> list[str]:
    """Return what grew between the end of the warm-up and the last run."""
    before, after = asdict(states[WARM - 1]), asdict(states[-1])
    allowed = {"allocated_kb": MOST_KB}
    return [name for name in after if after[name] - before[name] > allowed.get(name, 0)]


def main(argv: list[str]) -> int:
    """Run and print, or write soak.json; 1 where something grew."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    options = parser.parse_args(argv)
    states = soak(options.runs)
    result = {
        "command": f"python -m tests.faults.soak --runs {options.runs} --write",
        "grown": grown(states),
        "after": {
            str(n): asdict(states[n - 1]) for n in (1, WARM, options.runs // 2, options.runs)
        },
        "versions": {p: version(p) for p in ("ckptgate", "torch", "numpy")},
    }
    text = json.dumps(result, indent=1) + "\n"
    if options.write:
        RESULTS.write_text(text)
    print(text, end="")
    return 1 if result["grown"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
