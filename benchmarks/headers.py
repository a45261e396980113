# SPDX-License-Identifier: Apache-2.0
"""Time the header check of the real MiniMax-M3 mixed release: 89,614 tensors in sparse files.

    python benchmarks/headers.py [--rounds 9] [--out benchmarks/results/headers.json]

Each round is a process of its own, as a user starts it; beside it, in the same rounds, a process that only reads and
parses the same headers with the standard library. Wall time, peak resident memory, raw rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests import sparse

PARSE = """
import glob, json, sys
for f in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with open(f, "rb") as h:
        json.loads(h.read(int.from_bytes(h.read(8), "little")))
"""


def run(args: list[str]) -> tuple[float, float]:
    """Return seconds and peak megabytes of one process."""
    started = time.perf_counter()
    child = subprocess.Popen([sys.executable, *args], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{args} ended with {child.returncode}")
    return seconds, usage.ru_maxrss / 1000


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "headers.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        release = sparse.mixed(sparse.rows())
        config = sparse.m3_config() | {"quantization_config": sparse.release_quantization(release)}
        path = str(sparse.write(Path(folder) / "release", release, config, 60))
        rounds = []
        for _ in range(args.rounds + 1):
            check, parse = run(["-m", "verifier", "check", path]), run(["-c", PARSE, path])
            rounds.append({"check_s": check[0], "check_mb": check[1], "parse_s": parse[0], "parse_mb": parse[1]})
    rounds = rounds[1:]  # the first fills caches
    result = {
        "command": "python benchmarks/headers.py", "rounds": rounds, "tensors": len(release),
        "median": {k: statistics.median(r[k] for r in rounds) for k in rounds[0]},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("ckptgate", "numpy", "ml_dtypes")}},
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
    }
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["median"]))


if __name__ == "__main__":
    main()
