# SPDX-License-Identifier: Apache-2.0
"""Commands that run a model, on a quiet machine and next to a process that holds one processor.

    python benchmarks/busy.py [--rounds 3] [--out benchmarks/results/busy.json]

The golden MiniMax-M3 on its own corpus. In each round every command runs once alone and once next
to an endless loop, each time as a process of its own with the default number of threads: seconds
from start to end. About 5 minutes.
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
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
CORPUS = GOLDEN / "corpus.jsonl"
SEQUENCES, LENGTH = 64, 512


def commands(folder: Path) -> dict[str, list[str]]:
    """Return the command lines to time, after the name of the program."""
    source, out = str(GOLDEN / "bf16"), str(folder / "out")
    texts = ["--corpus", str(CORPUS), "--documents", "8"]
    return {
        "calibrate": [
            *("calibrate", source, "--recipe", "nvfp4_experts_only", "--texts", str(CORPUS)),
            *("--samples", str(SEQUENCES), "--seq-len", str(LENGTH)),
            *("-o", str(folder / "stats.safetensors"), "--overwrite"),
        ],
        "score": ["score", source, *texts, "-o", str(folder / "run"), "--overwrite"],
        "gate": ["gate", out, "--base", source, *texts, "--max-increase", "20%"],
    }


def ckptgate(*arguments: str) -> float:
    """Return the seconds that a command takes.

    Raises:
        SystemExit: it fails.
    """
    environment = {name: text for name, text in os.environ.items() if name != "OMP_NUM_THREADS"}
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "ckptgate", *arguments],
        env=environment | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(f"ckptgate {' '.join(arguments)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started


@contextmanager
def busy() -> Iterator[None]:
    """Hold one processor."""
    loop = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        loop.kill()
        loop.wait()


def main() -> None:
    """Measure, write, and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "busy.json")
    args = parser.parse_args()
    rounds: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ckptgate(
            *("export", str(GOLDEN / "bf16"), str(folder / "out")),
            *("--recipe", "nvfp4_experts_only", "--input-scale", "one"),
        )
        for _ in range(args.rounds):
            row: dict[str, Any] = {}
            for command, arguments in commands(folder).items():
                quiet = ckptgate(*arguments)
                with busy():
                    beside = ckptgate(*arguments)
                row[command] = {"quiet_s": round(quiet, 2), "busy_s": round(beside, 2)}
            rounds.append(row)
    ratios = {
        command: round(
            statistics.median(r[command]["busy_s"] / r[command]["quiet_s"] for r in rounds), 2
        )
        for command in commands(Path())
    }
    result = {
        "command": "python benchmarks/busy.py",
        "rounds": rounds,
        "ratios": ratios,
        "versions": {
            "python": platform.python_version(),
            **{p: version(p) for p in ("torch", "transformers")},
        },
        "machine": f"{platform.machine()}, {os.cpu_count()} processors, shared",
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(ratios))


if __name__ == "__main__":
    main()
