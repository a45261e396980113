# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own ``wikitext`` task over given documents, offline: its detokenizer, its windows, its
word counts.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from verifier.errors import ContentError, MissingExtra
from verifier.gate.jobs import Job, Unit, UnitScores
from verifier.gate.scorers.lm_eval_task import language_model, quiet

_METRICS = (
    ("word_perplexity", "weighted_perplexity"),
    ("byte_perplexity", "weighted_perplexity"),
    ("bits_per_byte", "bits_per_byte"),
)


def score_texts(model: Any, job: Job, unit: Unit) -> UnitScores:
    """Return each document's negative log-likelihood (nats) and words, as the task computes them.

    Raises:
        MissingExtra: lm-eval is not installed.
        ContentError: the checkpoint's tokenizer cannot be loaded, or lm-eval returned other
            documents.
    """
    try:
        from lm_eval import simple_evaluate  # type: ignore[import-untyped]  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("the protocol lm-eval", "gate") from error
    # torch comes with an extra, and only a scoring process needs it.
    from verifier.gate.scorers.nonfinite import watching  # noqa: PLC0415

    texts = [text for _, text in unit.texts]
    adapter = language_model(model, job)
    with quiet(), watching(model) as watch:
        results = simple_evaluate(
            model=adapter,
            tasks=[_task(texts)],
            task_manager=TaskManager(include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = results["samples"]["wikitext"] if results else []
    if len(samples) != len(texts):
        raise ContentError(f"lm-eval scored {len(samples)} of {len(texts)} documents")
    nats, words, nonfinite = np.zeros(len(texts)), np.zeros(len(texts), np.int64), []
    for sample in samples:
        place = int(sample["doc_id"])
        likelihood, count = sample["word_perplexity"]
        if math.isfinite(likelihood):
            nats[place], words[place] = -float(likelihood), int(count)
        else:
            nonfinite.append(unit.texts[place][0])
    if watch.nonfinite and not nonfinite:
        nonfinite = [document for document, _ in unit.texts]
    return UnitScores(unit.number, {"nats": nats, "words": words}, sorted(nonfinite))


def _task(texts: Sequence[str]) -> dict[str, Any]:
    """Return lm-eval's ``wikitext`` task over the texts."""
    from datasets import Dataset  # type: ignore[import-untyped]  # noqa: PLC0415

    functions = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    pages = [{"page": text} for text in texts]
    return {
        "task": "wikitext",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(pages)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": functions.wikitext_detokenizer,
        "process_results": functions.process_results,
        "metric_list": [
            {"metric": metric, "aggregation": aggregation, "higher_is_better": False}
            for metric, aggregation in _METRICS
        ],
        "metadata": {"version": 2.0},
    }
