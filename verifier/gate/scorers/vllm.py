# SPDX-License-Identifier: Apache-2.0
"""vLLM in a process of its own interpreter, reached by JSON lines (`vllm_worker`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from verifier.engines.process import LineProcess
from verifier.errors import MachineError
from verifier.gate.jobs import Job
from verifier.gate.scorers.engine import BYTES_PER_NUMBER, WindowScores, scores_of

WORKER = Path(__file__).with_name("vllm_worker.py")
_WHO = "the vLLM process"
_READY_BYTES = 1 << 16


class VllmEngine:
    """A running vLLM process with one model."""

    def __init__(self, job: Job) -> None:
        """Start the process and wait until the model is loaded.

        Raises:
            UsageError: the interpreter cannot be started.
            MachineError: vLLM fails or does not get ready in time.
        """
        self._top_k, self._number = job.top_k, 0
        self._process = LineProcess(job.scorer.python, WORKER, _WHO, job.scorer.timeout)
        try:
            ready = self._process.ask(_hello(job), _READY_BYTES).get("ready")
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
        answer = self._process.ask(question, 4096 + numbers * BYTES_PER_NUMBER)
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
        self._process.close()


def _hello(job: Job) -> dict[str, Any]:
    return {
        "ckptgate": 1,
        "model": job.model,
        "window": job.seq_len,
        "top_k": job.top_k,
        "options": dict(job.scorer.options),
    }
