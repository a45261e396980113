# SPDX-License-Identifier: Apache-2.0
"""What a scoring process runs: a job goes to transformers, vLLM or a server."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable

from verifier.errors import CkptgateError, MachineError, UsageError
from verifier.gate.jobs import Job, UnitScores
from verifier.gate.scorers.engine import Engine, unit_scores
from verifier.gate.scorers.server import ServerEngine
from verifier.gate.scorers.vllm import VllmEngine

QUIET = {
    "TQDM_DISABLE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
"""A scoring process reads local files only, and its progress is shown by the parent."""
Send = Callable[[UnitScores], None]


def score_job(job: Job, send: Send) -> dict[str, str]:
    """Score a job in this process, send each finished unit, and return the environment.

    Raises:
        CkptgateError: what the scorer raised.
        MachineError: the scorer failed in an unexpected way.
    """
    os.environ.update(QUIET)
    try:
        return score_by_model(job, send) if job.scorer.name == "hf" else score_by_engine(job, send)
    except (CkptgateError, BrokenPipeError):
        raise
    except Exception as error:
        message = traceback.format_exception_only(error)[-1].strip()
        raise MachineError(f"a scoring process failed: {message}") from error


def score_by_model(job: Job, send: Send) -> dict[str, str]:
    """Score a job with transformers; see `score_job`."""
    # torch and transformers take seconds to import, and only a scoring process needs them.
    from verifier.gate.scorers.transformers import score  # noqa: PLC0415

    return score(job, send)


def score_by_engine(job: Job, send: Send) -> dict[str, str]:
    """Score a job with its engine; see `score_job`.

    Raises:
        UsageError: the interpreter or the endpoint does not exist.
        MachineError: the engine fails, does not answer in time, or gives a wrong answer.
    """
    if job.protocol != "tokens":
        raise UsageError(f"--scorer {job.scorer.name} needs the protocol tokens")
    engine: Engine = VllmEngine(job) if job.scorer.name == "vllm" else ServerEngine(job)
    try:
        for unit in job.units:
            send(unit_scores(unit, engine))
        return engine.environment | {"batch": str(job.batch)}
    finally:
        engine.close()
