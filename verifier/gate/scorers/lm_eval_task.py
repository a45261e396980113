# SPDX-License-Identifier: Apache-2.0
"""Any multiple-choice or generation task of lm-eval: which documents a model gets right, one by
one.

A task is named as lm-eval names it, or by its YAML file, whose data may be files beside it. A YAML
file may name Python functions, and lm-eval runs them: give files that you trust.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.corpora import MAX_BYTES, Corpus, documents_digest
from verifier.gate.jobs import Job, Piece, TaskInfo, Unit
from verifier.gate.windows import Protocol

SEED = 1234
"""lm-eval's own default for few-shot examples."""
KINDS = ("multiple_choice", "generate_until", "loglikelihood")
PROTOCOLS = ("tokens", "lm-eval")


def is_task(protocol: str) -> bool:
    """Whether a protocol is a task: its name, or a YAML file."""
    return protocol not in PROTOCOLS


def kind_of(protocol: str) -> Protocol:
    """Return ``tokens``, ``lm-eval`` or ``task``."""
    return "tokens" if protocol == "tokens" else "lm-eval" if protocol == "lm-eval" else "task"


def task_corpus(spec: str, metric: str | None = None) -> Corpus:
    """Return a task's documents as a corpus that knows its task.

    Args:
        spec: its name, or its YAML file.
        metric: which of its metrics says right or wrong; the first by default.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: no such task, a group of tasks, a task of another kind, no such metric, or data
            that is not here.
    """
    with _quiet():
        task = _load(spec)
        info = _info(spec, task, metric)
        try:
            documents = [json.dumps(d, sort_keys=True, default=str) for d in task.eval_docs]
        except (ValueError, OSError, KeyError) as error:
            raise UsageError(f"{spec}: its documents cannot be read: {_short(error)}") from error
    if not documents:
        raise UsageError(f"{spec}: has no document")
    rule = f"lm-eval {info.name} {info.version}, {info.shots}-shot"
    return Corpus(info.name, rule, documents_digest(documents), texts=tuple(documents), task=info)


def _info(spec: str, task: Any, metric: str | None) -> TaskInfo:
    config = task.config
    if config.output_type not in KINDS:
        raise UsageError(
            f"{spec}: a task of {config.output_type}; --protocol lm-eval or tokens measures a perplexity"
        )
    metrics = [str(m) for m in task.aggregation()]
    chosen = metric or (metrics[0] if metrics else "")
    if chosen not in metrics:
        raise UsageError(f"{spec}: no metric {chosen!r}; it has {', '.join(metrics)}")
    first = getattr(task, "_filters", None) or []
    version = (config.metadata or {}).get("version", getattr(task, "VERSION", 0))
    return TaskInfo(
        spec,
        str(config.task),
        str(version),
        int(config.num_fewshot or 0),
        chosen,
        str(first[0].name) if first else "none",
    )


@dataclass(frozen=True)
class _Loaded:
    task: Any


@lru_cache(maxsize=4)
def _loaded(spec: str) -> _Loaded:
    try:
        from lm_eval.tasks import TaskManager, get_task_dict  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("a task of lm-eval", "gate") from error
    name, folder = _name_of(spec)
    try:
        manager = TaskManager(include_path=folder, include_defaults=folder is None)
        found = get_task_dict([name], manager)
    except (
        Exception
    ) as error:  # lm-eval raises whatever its YAML, its data sets and their libraries raise
        raise UsageError(f"no task {spec!r} can be loaded: {_short(error)}") from error
    if len(found) != 1 or isinstance(next(iter(found.values())), dict):
        raise UsageError(f"{spec}: a group of tasks; name one of them")
    task = next(iter(found.values()))
    if task.config.num_fewshot is None:
        task.set_config(key="num_fewshot", value=0)
    return _Loaded(task)


def _load(spec: str) -> Any:
    return _loaded(spec).task


def _name_of(spec: str) -> tuple[str, str | None]:
    """Return the task's name and the folder of its YAML file, None for one that lm-eval has
    itself.
    """
    if not spec.endswith((".yaml", ".yml")):
        if not re.fullmatch(r"[A-Za-z0-9_.:-]{1,200}", spec):
            raise UsageError(
                f"no protocol {spec[:80]!r}; tokens, lm-eval, a task of lm-eval by its name, or its YAML file"
            )
        return spec, None
    path = Path(spec)
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{spec}: no such file")
    match = re.search(
        r"(?m)^task:[ \t]*[\"']?([^\s\"'#]+)", path.read_text(encoding="utf-8", errors="replace")
    )
    if match is None:
        raise UsageError(f"{spec}: names no task (a line `task: NAME`)")
    return match[1], str(path.resolve().parent)


def score_task(model: Any, job: Job, unit: Unit) -> Piece:
    """Return which documents of a unit the model gets wrong: ``nats`` is 1 for wrong and 0 for
    right, ``words`` 1.

    Raises:
        ContentError: the tokenizer cannot be loaded, or the metric is not 0 or 1.
    """
    info = job.task
    if info is None:
        raise ValueError("a job of another protocol")
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]  # noqa: PLC0415

    places = [d for d, _ in unit.texts]
    with _quiet():
        adapter, task = _adapter(model, job), _load(info.spec)
        task.set_fewshot_seed(seed=SEED)
        results = evaluate(
            lm=adapter,
            task_dict={info.name: task},
            samples={info.name: places},
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = results["samples"][info.name] if results else []
    right = {int(s["doc_id"]): s.get(info.metric) for s in samples if s["filter"] == info.filter}
    if sorted(right) != sorted(places):
        raise ContentError(f"lm-eval scored {len(right)} of {len(places)} documents of {info.name}")
    for value in right.values():
        if not isinstance(value, int | float | np.generic) or float(value) not in (0.0, 1.0):
            shown = str(value)[:40]
            raise ContentError(
                f"{info.name}: {info.metric} is {shown}, not right or wrong; --metric names another"
            )
    wrong = np.array([1.0 - float(right[d]) for d in places])
    return Piece(unit.number, {"nats": wrong, "words": np.ones(len(places), np.int64)})


def _adapter(model: Any, job: Job) -> Any:
    from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]  # noqa: PLC0415
    from transformers import AutoTokenizer  # noqa: PLC0415

    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ContentError(
            f"{job.model}: its tokenizer cannot be loaded: {_short(error)}"
        ) from error
    return HFLM(pretrained=model, tokenizer=tokenizer, max_length=job.window, batch_size=job.batch)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        yield


def _short(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
