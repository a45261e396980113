# SPDX-License-Identifier: Apache-2.0
"""``python -m tests.fuzz``: fuzz the verifier in process, then some inputs and every bomb as
command lines.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.fuzz import command, engine

RESULTS = Path(__file__).with_name("results.json")


def main(argv: list[str]) -> int:
    """Run and print, or write results.json; 1 where anything failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--runs", type=int, default=100_000)
    parser.add_argument(
        "--commands", type=int, default=500, help="how many inputs to run as command lines"
    )
    parser.add_argument("--engine", choices=["atheris", "seeded"])
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--input", metavar="HEX", help="judge one input and print the verdict")
    parser.add_argument("--write", action="store_true", help=f"write {RESULTS.name}")
    parser.add_argument("--worker", metavar="FILE", help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    chosen = given.engine or ("atheris" if importlib.util.find_spec("atheris") else "seeded")
    if given.input:
        from tests.fuzz.judge import judge_bytes

        print(judge_bytes(bytes.fromhex(given.input), engine.work_folder()))
        return 0
    if given.worker:
        if chosen == "atheris":
            engine.guided(given.seed, given.runs, Path(given.worker))
        Path(given.worker).write_text(json.dumps(engine.seeded(given.seed, given.runs).as_json()))
        return 0
    started = time.monotonic()
    found = _in_process(chosen, given.runs, given.seed, given.processes)
    found["commands"] = command.run(given.seed, given.commands, given.processes)
    found |= {
        "command": f"python -m tests.fuzz --runs {given.runs} --commands {given.commands} --write",
        "engine": chosen,
        "versions": {
            p: importlib.metadata.version(p)
            for p in ("ckptgate", "numpy", *["atheris"] * (chosen == "atheris"))
        }
        | {"python": platform.python_version()},
    }
    if given.write:
        RESULTS.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(json.dumps(found, indent=1)[:6000])
    print(f"{time.monotonic() - started:.0f} s", file=sys.stderr)
    return (
        1
        if found["failures"]
        or found["commands"]["failures"]
        or found["reached_the_rules"] * 5 < found["runs"]
        else 0
    )


def _in_process(chosen: str, runs: int, seed: int, processes: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="ckptgate-fuzz-") as folder:
        files = [Path(folder) / f"{i}.json" for i in range(processes)]
        workers = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "tests.fuzz",
                    "--engine",
                    chosen,
                    "--worker",
                    str(f),
                    "--seed",
                    str(seed + i),
                    "--runs",
                    str(runs // processes),
                ],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                env=os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            )
            for i, f in enumerate(files)
        ]
        said = [w.communicate()[1].decode(errors="replace")[-2000:] for w in workers]
        parts = []
        for file, worker, text in zip(files, workers, said, strict=True):
            if file.exists():
                parts.append(json.loads(file.read_text()))
            else:
                ended = f"the process ended with {worker.returncode}: {text}"
                parts.append({"runs": 0, "failures": {ended: {"n": 1, "first": ""}}})
    codes: Counter[str] = Counter()
    failures: dict[str, Any] = {}
    for part in parts:
        codes.update(part.get("exit_codes", {}))
        failures |= part["failures"]
    return {
        "runs": sum(p["runs"] for p in parts),
        "reached_the_rules": sum(p.get("reached_the_rules", 0) for p in parts),
        "exit_codes": dict(sorted(codes.items())),
        "slowest_seconds": max(p.get("slowest_seconds", 0) for p in parts),
        "peak_megabytes": max(p.get("peak_megabytes", 0) for p in parts),
        "failures": failures,
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
