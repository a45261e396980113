# SPDX-License-Identifier: Apache-2.0
"""vLLM in a process of its own interpreter, reached by JSON lines (`vllm_worker`)."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verifier.errors import MachineError, UsageError
from verifier.gate.jobs import Job
from verifier.gate.scorers.engine import BYTES_PER_NUMBER, WindowScores, scores_of

WORKER = Path(__file__).with_name("vllm_worker.py")
STOP_SECONDS = 2.0
_WHO = "the vLLM process"
_TAIL = 4096
_READY_BYTES = 1 << 16


class VllmEngine:
    """A running vLLM process with one model."""

    def __init__(self, job: Job) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            UsageError: the interpreter cannot be started.
            MachineError: vLLM fails or does not get ready in time.
        """
        self._timeout, self._top_k, self._number = job.scorer.timeout, job.top_k, 0
        self._stderr_tail, self._idle = bytearray(), True
        self._process = _start(job.scorer.python)
        self._drainer = threading.Thread(target=self._drain, daemon=True)
        self._drainer.start()
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        if self._process.stdout is not None:
            self._selector.register(self._process.stdout, selectors.EVENT_READ)
        try:
            ready = self._ask(_hello(job), _READY_BYTES).get("ready")
            if not isinstance(ready, dict):
                raise MachineError(f"{_WHO}: did not report that it is ready")
        except BaseException:
            self.close()
            raise
        self.environment = {
            str(name)[:80]: str(value)[:400]
            for name, value in ready.items()
            if name in ("engine", "device")
        }

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScores]:
        """Return the scores of each window."""
        self._number += 1
        numbers = sum(len(window) for window in windows) * (2 * self._top_k + 3)
        question = {"id": self._number, "windows": [list(window) for window in windows]}
        answer = self._ask(question, 4096 + numbers * BYTES_PER_NUMBER)
        scores = answer.get("scores")
        if (
            answer.get("id") != self._number
            or not isinstance(scores, list)
            or len(scores) != len(windows)
        ):
            raise MachineError(f"{_WHO}: an answer to another question")
        return [
            scores_of(window, its_scores, self._top_k, _WHO)
            for window, its_scores in zip(windows, scores, strict=True)
        ]

    def close(self) -> None:
        """End the process and what it started."""
        self._selector.close()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # the process is gone
                self._process.stdin.close()
        if self._idle:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._drainer.join(STOP_SECONDS)
        for pipe in (self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def _ask(self, question: dict[str, Any], limit: int) -> dict[str, Any]:
        """Write one line, and return the object in the line that answers it.

        Args:
            question: the line's object.
            limit: the bytes of the longest answer.

        Raises:
            MachineError: the process ended or failed, or its answer is late or not an object.
        """
        stdin, self._idle = self._process.stdin, False
        try:
            if stdin is not None:
                stdin.write(json.dumps(question, separators=(",", ":")).encode() + b"\n")
                stdin.flush()
        except OSError as error:
            raise MachineError(f"{_WHO} ended: {self._last_words()}") from error
        line = self._line(limit)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MachineError(f"{_WHO}: a line that is not JSON: {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise MachineError(f"{_WHO}: a line that is not an object")
        if "error" in answer:
            raise MachineError(f"{_WHO} failed: {str(answer['error'])[:400]}")
        self._idle = True
        return answer

    def _line(self, limit: int) -> bytes:
        end = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            if len(self._buffer) > limit:
                raise MachineError(f"{_WHO}: an answer of more than {limit:,} bytes")
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise MachineError(
                    f"{_WHO} did not answer within {self._timeout:g} s (--engine-timeout)"
                )
            stdout = self._process.stdout
            more = os.read(stdout.fileno(), 1 << 20) if stdout is not None else b""
            if not more:
                raise MachineError(f"{_WHO} ended: {self._last_words()}")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _drain(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (more := stderr.read1(1 << 16)):  # type: ignore[attr-defined]
            self._stderr_tail += more
            del self._stderr_tail[:-_TAIL]

    def _last_words(self) -> str:
        """Return the last line that the process wrote to stderr."""
        time.sleep(0.1)  # the thread that reads stderr may be behind
        text = bytes(self._stderr_tail).decode("utf-8", "replace").strip()
        lines = text.splitlines()
        return lines[-1][:400] if lines else "it wrote nothing"


def _start(python: str) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  (the interpreter that the user named)
            [python, str(WORKER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"--engine-python {python}: {error.strerror or error}") from error


def _hello(job: Job) -> dict[str, Any]:
    return {
        "ckptgate": 1,
        "model": job.model,
        "window": job.seq_len,
        "top_k": job.top_k,
        "options": dict(job.scorer.options),
    }
