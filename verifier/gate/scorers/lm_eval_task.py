# SPDX-License-Identifier: Apache-2.0
"""Any multiple-choice or generation task of lm-eval: which documents a model gets right.

A task is named as lm-eval names it, or by its YAML file, whose data may be files next to it.
lm-eval runs the Python functions that a YAML file names: use files that you trust.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.corpora import MAX_BYTES, Corpus, documents_digest
from verifier.gate.jobs import Job, TaskInfo, Unit, UnitScores

SEED = 1234
"""lm-eval's own default for few-shot examples."""
KINDS = ("multiple_choice", "generate_until", "loglikelihood")


def task_corpus(spec: str, metric: str | None = None) -> Corpus:
    """Return a task's documents as a corpus that knows its task.

    Args:
        spec: its name, or its YAML file.
        metric: which of its metrics marks answers right or wrong; the first by default.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: no such task, a group of tasks, a task of another kind, no such metric, or data
            that does not exist.
    """
    with quiet():
        task = _load(spec)
        info = _info(spec, task, metric)
        try:
            documents = [json.dumps(d, sort_keys=True, default=str) for d in task.eval_docs]
        except (ValueError, OSError, KeyError) as error:
            raise UsageError(f"{spec}: its documents cannot be read: {short(error)}") from error
    if not documents:
        raise UsageError(f"{spec}: the task has no document")
    rule = f"lm-eval {info.name} {info.version}, {info.shots}-shot"
    return Corpus(info.name, rule, documents_digest(documents), texts=tuple(documents), task=info)


def _info(spec: str, task: Any, metric: str | None) -> TaskInfo:
    config = task.config
    if config.output_type not in KINDS:
        raise UsageError(
            f"{spec}: a task of type {config.output_type}; use --protocol lm-eval or tokens for a "
            "perplexity"
        )
    metrics = [str(m) for m in task.aggregation()]
    chosen = metric or (metrics[0] if metrics else "")
    if chosen not in metrics:
        raise UsageError(f"{spec}: no metric {chosen!r}; available: {', '.join(metrics)}")
    filters = getattr(task, "_filters", None) or []
    version = (config.metadata or {}).get("version", getattr(task, "VERSION", 0))
    return TaskInfo(
        spec,
        str(config.task),
        str(version),
        int(config.num_fewshot or 0),
        chosen,
        str(filters[0].name) if filters else "none",
        _chance(task),
    )


def _chance(task: Any) -> float | None:
    """Return the share of right answers that guessing gives: by the number of choices of each
    document, 0 where the answer is written freely, None where the choices cannot be read.
    """
    if task.config.output_type != "multiple_choice":
        return 0.0
    try:
        counts: list[int] = [len(task.doc_to_choice(document)) for document in task.eval_docs]
    except Exception:  # noqa: BLE001  (whatever a task's own functions raise)
        return None
    return sum(1 / count for count in counts) / len(counts) if counts and all(counts) else None


@lru_cache(maxsize=4)
def _load(spec: str) -> Any:
    try:
        from lm_eval.tasks import TaskManager, get_task_dict  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("a task of lm-eval", "gate") from error
    name, folder = _name_of(spec)
    try:
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        tasks = get_task_dict([name], manager)
    except Exception as error:  # whatever its YAML, its data sets and their libraries raise
        raise UsageError(f"the task {spec!r} cannot be loaded: {short(error)}") from error
    if len(tasks) != 1 or isinstance(next(iter(tasks.values())), dict):
        raise UsageError(f"{spec}: a group of tasks; name one of them")
    task = next(iter(tasks.values()))
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    return task


def _name_of(spec: str) -> tuple[str, str | None]:
    """Return the task's name, and the directory of its YAML file; None for a task that comes with
    lm-eval.
    """
    if not spec.endswith((".yaml", ".yml")):
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,200}", spec):
            raise UsageError(
                f"unknown protocol {spec[:80]!r}; available: tokens, lm-eval, a task of lm-eval by "
                "its name or YAML file"
            )
        return spec, None
    path = Path(spec)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{spec}: no such file")
    text = path.read_text(encoding="utf-8", errors="replace")
    match = re.search(r"(?m)^task:[ \t]*[\"']?([^\s\"'#]+)", text)
    if match is None:
        raise UsageError(f"{spec}: names no task (a line `task: NAME`)")
    return match[1], str(path.resolve().parent)


def score_task(model: Any, job: Job, unit: Unit) -> UnitScores:
    """Return which documents of a unit the model gets wrong: ``nats`` is 1 for wrong and 0 for
    right, ``words`` is 1.

    Raises:
        ContentError: the tokenizer cannot be loaded, or the metric is not 0 or 1.
    """
    info = job.task
    if info is None:
        raise ValueError("a job of another protocol")
    # torch comes with an extra, and only a scoring process needs it.
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]  # noqa: PLC0415

    from verifier.gate.scorers.nonfinite import watching  # noqa: PLC0415

    numbers = [number for number, _ in unit.texts]
    with quiet(), watching(model) as watch:
        task = _load(info.spec)
        task.set_fewshot_seed(seed=SEED)
        results = evaluate(
            lm=language_model(model, job),
            task_dict={info.name: task},
            samples={info.name: numbers},
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = results["samples"][info.name] if results else []
    right = {int(s["doc_id"]): s.get(info.metric) for s in samples if s["filter"] == info.filter}
    if sorted(right) != sorted(numbers):
        raise ContentError(f"{info.name}: lm-eval scored {len(right)} of {len(numbers)} documents")
    for value in right.values():
        if not isinstance(value, int | float | np.generic) or float(value) not in (0.0, 1.0):
            raise ContentError(
                f"{info.name}: {info.metric} is {str(value)[:40]}, neither right (1) nor wrong (0);"
                " choose another with --metric"
            )
    wrong = np.array([1.0 - float(right[number]) for number in numbers])
    return UnitScores(
        unit.number,
        {"nats": wrong, "words": np.ones(len(numbers), np.int64)},
        watch.documents([s for s in samples if s["filter"] == info.filter], numbers),
    )


def language_model(model: Any, job: Job) -> Any:
    """Return lm-eval's adapter around a transformers model.

    Raises:
        ContentError: the checkpoint's tokenizer cannot be loaded.
    """
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ContentError(
            f"{job.model}: its tokenizer cannot be loaded: {short(error)}"
        ) from error
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=job.seq_len, batch_size=job.batch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress what lm-eval and its libraries print."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def short(error: Exception) -> str:
    """Return an error's class and message on one line, at most 200 characters of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
