# SPDX-License-Identifier: Apache-2.0
"""Inputs as command lines: ``ckptgate check`` in a process of its own, its time and memory bounded
by the system.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.fuzz.engine import MEGABYTES, inputs, peak_megabytes, work_folder
from tests.fuzz.hostile import bombs, build, write

SECONDS = 5
START_SECONDS = 2
CODE = (
    "import resource, sys; "
    f"resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS + START_SECONDS},) * 2)\n"
    "from verifier.cli import main; sys.argv[0] = 'ckptgate'; main()"
)


@dataclass(frozen=True)
class Ended:
    """How a command line ended: exit code, processor seconds, resident megabytes, what does not
    hold.
    """

    code: int
    seconds: float
    megabytes: int
    wrong: str = ""


def check(path: Path, how: str = "json") -> Ended:
    """Run ``ckptgate check PATH --depth payload`` and say what does not hold of it."""
    out = path.with_name(f"{path.name}.out")
    with out.open("wb") as file:
        pid = os.posix_spawn(
            sys.executable,
            [sys.executable, "-c", CODE, "check", str(path), "--depth", "payload", "--format", how],
            os.environ | {"OPENBLAS_NUM_THREADS": "1"},
            file_actions=[
                (os.POSIX_SPAWN_DUP2, file.fileno(), 1),
                (os.POSIX_SPAWN_DUP2, file.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(pid, 0)
    text = out.read_bytes()
    out.unlink()
    code = os.waitstatus_to_exitcode(status)
    # A child starts with the resident size of the process that forked it: nothing below that was
    # measured.
    megabytes = usage.ru_maxrss // 1024
    megabytes = 0 if megabytes <= peak_megabytes() else megabytes
    wrong = ""
    if code not in range(5):
        wrong = f"exit code {code}"
    elif b"Traceback" in text or b"a defect of ckptgate" in text:
        wrong = f"a defect: {text[-300:]!r}"
    elif megabytes > MEGABYTES:
        wrong = f"{megabytes} MB"
    elif any(b < 9 or 13 < b < 32 or b == 127 for b in text):
        wrong = "a control character is printed"
    elif how == "json" and code != 2:
        try:
            json.loads(text)
        except ValueError as error:
            wrong = f"no JSON: {error}: {text[-200:]!r}"
    return Ended(code, usage.ru_utime + usage.ru_stime, megabytes, wrong)


def cases(seed: int, count: int, root: Path) -> Iterator[tuple[str, Path]]:
    """Write the bombs (all, where the count allows that) and seeded inputs below ``root``; yield
    names and folders.
    """
    special = bombs() if count > len(bombs()) else {}
    for i, (name, files) in enumerate(special.items()):
        yield name, write(files, [], root / f"bomb-{i}")
    for i, data in enumerate(inputs(seed, count - len(special))):
        yield data.hex(), write(*build(data, root), root / f"input-{i}")


def run(seed: int, count: int, processes: int) -> dict[str, Any]:
    """Run ``count`` command lines and return counts, the worst, and what failed."""
    root = work_folder()
    codes: Counter[int] = Counter()
    failures: dict[str, str] = {}
    worst = Ended(0, 0.0, 0)

    def one(job: tuple[int, tuple[str, Path]]) -> tuple[str, Ended]:
        number, (name, path) = job
        ended = check(path, "json" if number % 2 else "text")
        shutil.rmtree(path, ignore_errors=True)
        return name, ended

    try:
        with ThreadPoolExecutor(processes) as pool:
            for name, ended in pool.map(one, enumerate(cases(seed, count, root))):
                codes[ended.code] += 1
                worst = Ended(
                    0, max(worst.seconds, ended.seconds), max(worst.megabytes, ended.megabytes)
                )
                if ended.wrong:
                    failures[name[:200]] = ended.wrong
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return {
        "runs": count,
        "exit_codes": {str(k): v for k, v in sorted(codes.items())},
        "failures": failures,
        "slowest_seconds": round(worst.seconds, 2),
        "peak_megabytes": worst.megabytes,
    }
