# SPDX-License-Identifier: Apache-2.0
"""Feed inputs to the judge: chosen by coverage (atheris), or by a seed."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

MEGABYTES = 512
LONGEST = 96


@dataclass
class Tally:
    """What was seen so far."""

    runs: int = 0
    reached: int = 0
    codes: Counter[int] = field(default_factory=Counter)
    slowest: float = 0.0
    wrong: dict[str, list[str]] = field(default_factory=dict)

    def see(self, data: bytes, verdict: Any) -> None:
        """Count one input."""
        self.runs += 1
        self.reached += verdict.reached
        self.codes[verdict.code] += 1
        self.slowest = max(self.slowest, verdict.seconds)
        if verdict.wrong:
            self.wrong.setdefault(verdict.wrong[:120], []).append(data.hex())

    def as_json(self) -> dict[str, Any]:
        """Return JSON values; of each failure the number and the first input."""
        return {
            "runs": self.runs,
            "reached_the_rules": self.reached,
            "exit_codes": {str(k): v for k, v in sorted(self.codes.items())},
            "slowest_seconds": round(self.slowest, 3),
            "peak_megabytes": peak_megabytes(),
            "failures": {k: {"n": len(v), "first": v[0]} for k, v in self.wrong.items()},
        }


def peak_megabytes() -> int:
    """Return the largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def bound_memory() -> None:
    """Let this process grow by no more than `MEGABYTES` from here."""
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    limit = pages * resource.getpagesize() + MEGABYTES * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def work_folder() -> Path:
    """Return a new folder, in memory where the machine has such a place."""
    shm = Path("/dev/shm")  # noqa: S108
    return Path(
        tempfile.mkdtemp(
            prefix="ckptgate-fuzz-", dir=shm if shm.is_dir() and os.access(shm, os.W_OK) else None
        )
    )


def inputs(seed: int, count: int) -> Any:
    """Yield seeded inputs."""
    source = random.Random(seed)  # noqa: S311
    for _ in range(count):
        yield source.randbytes(source.randrange(6, LONGEST))


def seeded(seed: int, count: int) -> Tally:
    """Judge seeded inputs in this process."""
    from tests.fuzz.judge import judge_bytes

    root, tally = work_folder(), Tally()
    try:
        for data in inputs(seed, count):
            tally.see(data, judge_bytes(data, root))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return tally


def guided(seed: int, count: int, out: Path) -> None:
    """Judge inputs that atheris chooses by the verifier's coverage; the tally goes to ``out``; does
    not return.
    """
    import atheris  # type: ignore[import-not-found,unused-ignore]

    with atheris.instrument_imports(include=["verifier"]):
        from tests.fuzz.judge import judge_bytes

    root, tally = work_folder(), Tally()
    corpus = root / "corpus"
    corpus.mkdir()
    for i, data in enumerate(inputs(seed, 200)):
        (corpus / f"{i:03d}").write_bytes(data)
    bound_memory()

    def one(data: bytes) -> None:
        tally.see(data, judge_bytes(data, root))
        if tally.runs >= count:
            out.write_text(json.dumps(tally.as_json()))
            shutil.rmtree(root, ignore_errors=True)
            os._exit(0)

    options = (
        f"-seed={seed}",
        f"-max_len={LONGEST}",
        "-verbosity=0",
        "-rss_limit_mb=0",
        "-timeout=60",
    )
    atheris.Setup([sys.argv[0], str(corpus), *options], one)
    atheris.Fuzz()
