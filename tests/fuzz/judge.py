# SPDX-License-Identifier: Apache-2.0
"""What must hold of every input: an exit code, a report that can be printed, no other error than
the package's own.
"""

from __future__ import annotations

import json
import re
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import verifier
from tests.fuzz.hostile import build, write
from verifier.errors import CkptgateError
from verifier.report import render_json, render_text
from verifier.selftest.tiny import TINY

SECONDS = 5.0
CODES = frozenset({0, 1, 2, 3, 4})
_CONTROL = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)


@dataclass(frozen=True)
class Verdict:
    """What became of one input; ``wrong`` is '' where all holds.

    ``reached``: a rule on scales or values examined a tensor.
    """

    code: int
    reached: bool
    seconds: float
    wrong: str = ""


def judge(path: Path, *, base: Path | None = None) -> Verdict:
    """Check a folder at depth payload, render the report, and say what does not hold."""
    started = time.process_time()
    code, reached, wrong = -1, False, ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            report = verifier.check(path, base=base, depth="payload")
            text, as_json = render_text(report), render_json(report)
        code = report.exit_code
        reached = any(c.ran and c.checked and c.rule[2] in "35" for c in report.coverage)
        wrong = _printable(text, as_json)
        if report.verdict not in ("passed", "failed", "inconclusive", "error"):
            wrong = f"verdict {report.verdict}"
    except CkptgateError as error:
        code = error.exit_code
        wrong = "an error with no message" if not str(error) else ""
    except MemoryError:
        wrong = "MemoryError"
    except RecursionError:
        wrong = "RecursionError"
    except Exception as error:  # noqa: BLE001  (what is looked for)
        wrong = f"{type(error).__name__}: {str(error)[:200]}"
    seconds = time.process_time() - started
    if not wrong and code not in CODES:
        wrong = f"exit code {code}"
    if not wrong and seconds > SECONDS:
        wrong = f"{seconds:.1f} s of processor time"
    return Verdict(code, reached, seconds, wrong)


def _printable(text: str, as_json: str) -> str:
    found = _CONTROL.search(text)
    if found:
        return f"the text holds {found[0]!r}"
    try:
        json.loads(as_json)
    except ValueError as error:
        return f"the JSON report is none: {error}"
    return ""


def judge_bytes(data: bytes, root: Path) -> Verdict:
    """Judge the checkpoint that an input stands for, below ``root``; by its last byte against
    itself or a sound base.
    """
    files, links = build(data, root)
    path = root / "work"
    shutil.rmtree(path, ignore_errors=True)
    write(files, links, path)
    against = {0: path, 1: root / f"{TINY[0].name}.base", 2: root / f"{TINY[9].name}.base"}
    return judge(path, base=against.get(data[-1] % 8) if data else None)
