# SPDX-License-Identifier: Apache-2.0
"""A script under another interpreter that answers one JSON line with one JSON line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import selectors
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from verifier.errors import MachineError, UsageError

STOP_SECONDS = 2.0
_TAIL = 1 << 16
_LOG_PREFIX = re.compile(r"^(\(.*?\) )?(ERROR .*?\] )?\s*")
_ERROR_LINE = re.compile(r"[A-Z]\w*(\.\w+)*(Error|Exception): \S")
_NOT_A_CAUSE = ("See root cause above", "Engine core proc", "EngineCore encountered")


class LineProcess:
    """A running script, its last output on stderr, and the limits of its answers."""

    def __init__(self, python: str, script: Path, name: str, timeout: float) -> None:
        """Start the script.

        Args:
            python: the interpreter.
            script: the file to run.
            name: what messages call the process.
            timeout: seconds that an answer may take.

        Raises:
            UsageError: the interpreter cannot be started.
        """
        self.name = name
        self._timeout = timeout
        self._stderr_tail, self._idle = bytearray(), True
        self._process = _start(python, script)
        self._drainer = threading.Thread(target=self._drain, daemon=True)
        self._drainer.start()
        self._buffer = b""
        self._selector = selectors.DefaultSelector()
        if self._process.stdout is not None:
            self._selector.register(self._process.stdout, selectors.EVENT_READ)

    def ask(self, question: Mapping[str, Any], limit: int) -> dict[str, Any]:
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
            raise MachineError(f"{self.name} ended: {self._last_words()}") from error
        line = self._line(limit)
        try:
            answer = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise MachineError(f"{self.name}: a line that is not JSON: {line[:80]!r}") from error
        if not isinstance(answer, dict):
            raise MachineError(f"{self.name}: a line that is not an object")
        if "error" in answer:
            raise MachineError(f"{self.name} failed: {self._explained(str(answer['error']))}")
        self._idle = True
        return answer

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

    def _line(self, limit: int) -> bytes:
        end = time.monotonic() + self._timeout
        while b"\n" not in self._buffer:
            if len(self._buffer) > limit:
                raise MachineError(f"{self.name}: an answer of more than {limit:,} bytes")
            if not self._selector.select(max(0.0, end - time.monotonic())):
                raise MachineError(
                    f"{self.name} did not answer within {self._timeout:g} s (--engine-timeout)"
                )
            stdout = self._process.stdout
            more = os.read(stdout.fileno(), 1 << 20) if stdout is not None else b""
            if not more:
                raise MachineError(f"{self.name} ended: {self._last_words()}")
            self._buffer += more
        line, _, self._buffer = self._buffer.partition(b"\n")
        return line

    def _drain(self) -> None:
        stderr = self._process.stderr
        while stderr is not None and (more := stderr.read1(1 << 16)):  # type: ignore[attr-defined]
            self._stderr_tail += more
            del self._stderr_tail[:-_TAIL]

    def _lines(self) -> list[str]:
        """Return the last lines that the process wrote to stderr."""
        time.sleep(0.1)  # the thread that reads stderr may be behind
        return bytes(self._stderr_tail).decode("utf-8", "replace").strip().splitlines()

    def _last_words(self) -> str:
        lines = self._lines()
        return lines[-1][:400] if lines else "it wrote nothing"

    def _explained(self, error: str) -> str:
        """Return an error with the one that caused it, if stderr has another.

        vLLM's engine is a process of its own: its error is only in what it wrote.
        """
        lines = [_LOG_PREFIX.sub("", line) for line in self._lines()]
        causes = [line for line in lines if _ERROR_LINE.match(line)]
        causes = [line for line in causes if not any(part in line for part in _NOT_A_CAUSE)]
        if not causes or causes[-1][:60] in error:
            return error[:400]
        return f"{causes[-1][:400]} ({error[:200]})"


def _start(python: str, script: Path) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603  (the interpreter that the user named)
            [python, str(script)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        raise UsageError(f"--engine-python {python}: {error.strerror or error}") from error
