# SPDX-License-Identifier: Apache-2.0
"""Run jobs in fresh processes, a few at a time; errors of a worker are raised here as what they
are.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from verifier.errors import CkptgateError, MachineError
from verifier.gate.jobs import Job, Piece
from verifier.gate.scorers.transformers import score

_STOP_SECONDS = 5.0
QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""A worker reads local files only, and its progress is the parent's to draw."""


def run_jobs(
    jobs: Sequence[Job], workers: int, emit: Callable[[int, Piece], None]
) -> list[dict[str, str]]:
    """Call ``emit(job number, piece)`` for each finished unit, and return the environment of each
    job, in order.

    Raises:
        CkptgateError: what the worker raised.
        MachineError: a worker died (killed, out of memory) or met an unexpected error.
    """
    context = multiprocessing.get_context("spawn")
    results: dict[int, dict[str, str]] = {}
    waiting = list(enumerate(jobs))
    running: dict[Any, tuple[int, Any]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < workers:
                number, job = waiting.pop(0)
                ours, theirs = context.Pipe(duplex=False)
                process = context.Process(target=_work, args=(job, theirs), daemon=True)
                process.start()
                theirs.close()
                running[ours] = (number, process)
            for connection in wait(list(running)):
                number, process = running[connection]
                kind, value = _receive(connection, process)
                if kind == "piece":
                    emit(number, value)
                else:
                    results[number] = value
                    del running[connection]
                    process.join()
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.join(_STOP_SECONDS)
    return [results[i] for i in range(len(jobs))]


def _receive(connection: Any, process: Any) -> tuple[str, Any]:
    try:
        kind, value = connection.recv()
    except EOFError:
        process.join(_STOP_SECONDS)
        code = process.exitcode or 0
        how = f"signal {-code}" if code < 0 else f"exit code {code}"
        raise MachineError(
            f"a scoring process died ({how}); is there enough memory for the model?"
        ) from None
    if kind == "error":
        raise value
    if kind == "failed":
        raise MachineError(f"a scoring process failed: {value}")
    return kind, value


def _work(job: Job, connection: Connection) -> None:
    # The terminal sends Ctrl-C to the whole group: the parent decides what happens to its workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.update(QUIET)
    try:
        connection.send(("done", score(job, lambda piece: connection.send(("piece", piece)))))
    except BrokenPipeError:
        return  # the parent was killed; what it had received is in its journal
    except CkptgateError as error:
        connection.send(("error", error))
    except Exception as error:  # noqa: BLE001  (the process's surface: whatever it was must reach the parent)
        connection.send(("failed", traceback.format_exception_only(error)[-1].strip()))
