# SPDX-License-Identifier: Apache-2.0
"""Kill a command at a random moment, run it again, and compare what it writes.

A command runs in a fork of this process, which has torch loaded already; ``kill -9`` leaves it no
moment to clean up.
"""

from __future__ import annotations

import hashlib
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tests.kill.commands import COMMANDS, Command, Inputs
from verifier.errors import ContentError
from verifier.gate import read_run

MOST_KILLS = 3
"""How often one command is killed before it may finish."""


@dataclass(frozen=True)
class Undisturbed:
    """A run that nothing disturbed: its output by file, and its seconds."""

    files: Mapping[str, str]
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """What came of one seed.

    Attributes:
        seed: decides command and moments.
        command: its name.
        kills: how many runs were killed.
        wrong: what was wrong, or ''.
    """

    seed: int
    command: str
    kills: int
    wrong: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def undisturbed(command: Command, inputs: Inputs, folder: Path) -> Undisturbed:
    """Run a command to its end, twice: the second run is as fast as those that are killed."""
    results = []
    for number in (1, 2):
        out = folder / f"{number}" / "out"
        out.parent.mkdir(parents=True)
        started = time.monotonic()
        code = _finish(_start(command, inputs, out))
        if code:
            raise RuntimeError(f"{command.name} ends with {code} undisturbed")
        results.append(Undisturbed(files_of(out), time.monotonic() - started))
    if results[0].files != results[1].files:
        raise RuntimeError(f"{command.name} writes other bytes the second time")
    return results[1]


def killed(seed: int, known: Mapping[str, Undisturbed], inputs: Inputs, folder: Path) -> Outcome:
    """Kill a command one to three times, then let it finish."""
    random_ = random.Random(f"kill {seed}")  # noqa: S311
    command = COMMANDS[seed % len(COMMANDS)]
    expected = known[command.name]
    out = folder / "out"
    folder.mkdir()
    kills = 0
    for _ in range(random_.randint(1, MOST_KILLS)):
        process = _start(command, inputs, out)
        time.sleep(random_.uniform(0, 1.1 * expected.seconds))
        os.kill(process, signal.SIGKILL)
        if _finish(process) != -signal.SIGKILL:
            break
        kills += 1
        wrong = _looks_whole(command, out, expected, inputs)
        if wrong:
            return Outcome(seed, command.name, kills, wrong)
        if command.name != "export --overwrite" and out.exists():
            break
    if command.name == "export --overwrite" or not out.exists():
        code = _finish(_start(command, inputs, out))
        if code:
            return Outcome(seed, command.name, kills, f"the run after it ends with {code}")
    return Outcome(seed, command.name, kills, _difference(command, out, expected))


def _looks_whole(command: Command, out: Path, expected: Undisturbed, inputs: Inputs) -> str:
    """Return what is wrong with an OUT that a killed run left: one that is there is complete."""
    if not out.exists():
        if command.name == "export --overwrite" and list(out.parent.glob(".out*")):
            return "OUT is absent while it is overwritten"
        return ""
    files = files_of(out)
    whole = [expected.files]
    if command.name == "export --overwrite":
        whole.append(files_of(inputs.vendor))
    return "" if files in whole else "OUT looks whole and is not"


def _difference(command: Command, out: Path, expected: Undisturbed) -> str:
    files = files_of(out)
    if files != expected.files:
        names = files.keys() | expected.files.keys()
        odd = sorted(n for n in names if files.get(n) != expected.files.get(n))
        return f"{', '.join(odd)} differ from an undisturbed run"
    left = sorted(p.name for p in out.parent.iterdir() if p != out)
    return f"{', '.join(left)} is left" if left and command.name == "export --overwrite" else ""


def files_of(out: Path) -> dict[str, str]:
    """Return the SHA-256 of each file of a directory, of a stats file, or of all parts of a run but
    the seconds that it took.
    """
    if out.is_dir():
        return {p.relative_to(out).as_posix(): _sha256(p) for p in out.rglob("*") if p.is_file()}
    try:
        scored = read_run(out)
    except ContentError:
        return {"": _sha256(out)}
    header = scored.header.model_copy(update={"seconds": 0.0}).model_dump_json()
    parts = {name: array.tobytes() for name, array in scored.arrays.items()}
    return {n: hashlib.sha256(raw).hexdigest() for n, raw in {**parts, "": header.encode()}.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start(command: Command, inputs: Inputs, out: Path) -> int:
    """Fork a process that runs a command, and return its number."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        with open(os.devnull, "w") as nothing:
            os.dup2(nothing.fileno(), 1)
        command.run(inputs, out)
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BaseException:  # noqa: BLE001  (a fork never returns to the code of its parent)
        traceback.print_exc()
    finally:
        os._exit(code)


def _finish(process: int) -> int:
    """Return how a process ended: its exit code, or a negative signal."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
