# SPDX-License-Identifier: Apache-2.0
"""Any multiple-choice or generation task of lm-eval: which documents a model gets right.

A task is named as lm-eval names it, or by its YAML file, whose data may be files next to it.
lm-eval runs the Python functions that a YAML file names: use files that you trust.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from verifier.errors import ContentError, MissingExtra, UsageError
from verifier.gate.corpora import MAX_BYTES, Corpus, documents_digest
from verifier.gate.jobs import Job, TaskInfo, Unit, UnitScores
from verifier.gate.scorers.completions import Completion, CompletionRecorder

SEED = 1234
"""lm-eval's own default for few-shot examples."""
KINDS = ("multiple_choice", "generate_until", "loglikelihood")
_ELSEWHERE = frozenset({"task", "dataset_path", "dataset_name", "dataset_kwargs", "metadata"})
"""What of a task's configuration its documents and its name stand for."""


def task_corpus(spec: str, metric: str | None = None, repeats: int = 1) -> Corpus:
    """Return a task's documents as a corpus that knows its task.

    Args:
        spec: its name, or its YAML file.
        metric: which of its metrics marks answers right or wrong; the first by default.
        repeats: how often each document is answered; above 1, each answer is a document of the
            corpus, and the answers to one document are a group.

    Raises:
        MissingExtra: lm-eval is not installed.
        UsageError: no such task, a group of tasks, a task of another kind, no such metric, data
            that does not exist, or repeats of answers that are all the same.
    """
    with quiet():
        task = _load(spec)
        info = replace(_info(spec, task, metric), repeats=repeats)
        if repeats > 1:
            _require_sampled(spec, task)
        try:
            documents = [json.dumps(d, sort_keys=True, default=str) for d in task.eval_docs]
        except (ValueError, OSError, KeyError) as error:
            raise UsageError(f"{spec}: its documents cannot be read: {short(error)}") from error
    if not documents:
        raise UsageError(f"{spec}: the task has no document")
    rule = f"lm-eval {info.name} {info.version}, {info.shots}-shot"
    if repeats == 1:
        return Corpus(
            info.name, rule, documents_digest(documents), texts=tuple(documents), task=info
        )
    numbered = [f"{text} answer {n}" for text in documents for n in range(repeats)]
    return Corpus(
        info.name,
        f"{rule}, {repeats} answers each",
        documents_digest(numbered),
        texts=tuple(numbered),
        task=info,
        groups=tuple(str(number // repeats) for number in range(len(numbered))),
    )


def _require_sampled(spec: str, task: Any) -> None:
    """Refuse repeats of a task whose answers would all be the same, or which repeats by itself.

    Raises:
        UsageError: naming the reason.
    """
    options = task.config.generation_kwargs or {}
    if task.config.output_type != "generate_until" or not options.get("do_sample"):
        raise UsageError(
            f"{spec}: repeats need answers that are sampled (generation_kwargs of the task with "
            "do_sample: true and a temperature); greedy ones are all the same"
        )
    if task.config.repeats > 1:
        raise UsageError(
            f"{spec}: the task itself has repeats: {task.config.repeats}; leave out one"
        )


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
        _digest(task.config),
    )


def _digest(config: Any) -> str:
    """Return the SHA-256 of what decides a task's prompts, answers and metrics, functions as their
    source.
    """
    parts = {k: v for k, v in config.to_dict().items() if k not in _ELSEWHERE}
    text = re.sub(r" at 0x[0-9a-f]+", "", json.dumps(parts, sort_keys=True, default=str))
    return hashlib.sha256(text.encode()).hexdigest()


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
    except ConnectionError as error:
        raise UsageError(
            f"the task {spec!r} needs a network, or a YAML file with its data next to it: "
            f"{short(error)}"
        ) from error
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
    right, ``words`` is 1; and the length and end of what it generates.

    Raises:
        ContentError: the tokenizer cannot be loaded, or the metric is not 0 or 1.
    """
    info = job.task
    if info is None:
        raise ValueError("a job of another protocol")
    # torch comes with an extra, and only a scoring process needs it.
    from transformers import set_seed  # noqa: PLC0415

    from verifier.gate.scorers.nonfinite import watching  # noqa: PLC0415

    numbers = [number for number, _ in unit.texts]
    answers: dict[int, _Answer] = {}
    nonfinite: list[int] = []
    with quiet():
        for repeat in sorted({number % info.repeats for number in numbers}):
            its_numbers = [number for number in numbers if number % info.repeats == repeat]
            # What is sampled depends on the unit alone, so that a resumed run gives the same bits;
            # base and candidate draw alike.
            set_seed(SEED + unit.number * info.repeats + repeat)
            with watching(model) as watch:
                its_answers = _answers(model, job, info, its_numbers)
            answers |= its_answers
            responses = [{"doc_id": n, "resps": a.responses} for n, a in its_answers.items()]
            nonfinite += watch.documents(responses, its_numbers)
    wrong = np.array([1.0 - answers[number].right for number in numbers])
    arrays = {"nats": wrong, "words": np.ones(len(numbers), np.int64)}
    found = [answers[number].completion for number in numbers]
    completions = [completion for completion in found if completion is not None]
    if len(completions) == len(numbers):
        arrays["completion"] = np.array([each.tokens for each in completions], np.int64)
        arrays["finish"] = np.array([each.finish for each in completions], np.int32)
    return UnitScores(unit.number, arrays, sorted(nonfinite))


@dataclass(frozen=True)
class _Answer:
    """An answer of lm-eval's: its responses, 1 for right and 0 for wrong, what was generated."""

    responses: list[Any]
    right: float
    completion: Completion | None


def _answers(model: Any, job: Job, info: TaskInfo, numbers: Sequence[int]) -> dict[int, _Answer]:
    """Return the answers to some documents of the corpus, by number.

    Raises:
        ContentError: as `score_task`.
    """
    # torch comes with an extra, and only a scoring process needs it.
    from lm_eval.evaluator import evaluate  # type: ignore[import-untyped]  # noqa: PLC0415

    task = _load(info.spec)
    task.set_fewshot_seed(seed=SEED)
    adapter = language_model(model, job)
    recorder = CompletionRecorder(adapter)
    items = {number // info.repeats: number for number in numbers}
    results = evaluate(
        lm=adapter,
        task_dict={info.name: task},
        samples={info.name: list(items)},
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = results["samples"][info.name] if results else []
    chosen = {int(s["doc_id"]): s for s in samples if s["filter"] == info.filter}
    if sorted(chosen) != sorted(items):
        raise ContentError(f"{info.name}: lm-eval scored {len(chosen)} of {len(items)} documents")
    once = task.config.output_type == "generate_until" and task.config.repeats == 1
    return {
        items[item]: _Answer(
            sample["resps"],
            _right(info, sample.get(info.metric)),
            recorder.take(sample["arguments"][0][0]) if once else None,
        )
        for item, sample in chosen.items()
    }


def _right(info: TaskInfo, value: Any) -> float:
    """Return a metric's value for one document: 1 for right, 0 for wrong.

    Raises:
        ContentError: it is something else.
    """
    if not isinstance(value, int | float | np.generic) or float(value) not in (0.0, 1.0):
        raise ContentError(
            f"{info.name}: {info.metric} is {str(value)[:40]}, neither right (1) nor wrong (0); "
            "choose another with --metric"
        )
    return float(value)


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
