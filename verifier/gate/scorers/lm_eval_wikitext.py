# SPDX-License-Identifier: Apache-2.0
"""lm-eval's own ``wikitext`` task over given documents, offline: its detokenizer, its windows, its
word counts.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import math
import warnings
from typing import Any

import numpy as np

from verifier.errors import ContentError, MissingExtra
from verifier.gate.jobs import Job, Piece, Unit

TASK_VERSION = "wikitext 2.0"


def score_texts(model: Any, job: Job, unit: Unit) -> Piece:
    """Return each document's negative log-likelihood (nats) and words, as the task computes them.

    Raises:
        MissingExtra: lm-eval is not installed.
        ContentError: the checkpoint's tokenizer cannot be loaded, or lm-eval returned other
            documents.
    """
    try:
        # lm-eval is an extra, and its import costs seconds.
        from datasets import Dataset  # type: ignore[import-untyped]  # noqa: PLC0415
        from lm_eval import simple_evaluate  # type: ignore[import-untyped]  # noqa: PLC0415
        from lm_eval.models.huggingface import HFLM  # type: ignore[import-untyped]  # noqa: PLC0415
        from lm_eval.tasks import TaskManager  # type: ignore[import-untyped]  # noqa: PLC0415
        from transformers import AutoTokenizer  # noqa: PLC0415
    except ImportError as error:
        raise MissingExtra("the protocol lm-eval", "gate") from error
    functions = importlib.import_module("lm_eval.tasks.wikitext.preprocess_wikitext")
    try:
        tokenizer = AutoTokenizer.from_pretrained(job.model, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ContentError(
            f"{job.model}: its tokenizer cannot be loaded: {' '.join(str(error).split())[:200]}"
        ) from error
    pages = [{"page": text} for _, text in unit.texts]
    task = {
        "task": "wikitext",
        "custom_dataset": lambda **_: {"test": Dataset.from_list(pages)},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": functions.wikitext_detokenizer,
        "process_results": functions.process_results,
        "metric_list": [
            {"metric": m, "aggregation": a, "higher_is_better": False}
            for m, a in (
                ("word_perplexity", "weighted_perplexity"),
                ("byte_perplexity", "weighted_perplexity"),
                ("bits_per_byte", "bits_per_byte"),
            )
        ],
        "metadata": {"version": 2.0},
    }
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    sink = io.StringIO()
    with (
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")
        adapter = HFLM(
            pretrained=model, tokenizer=tokenizer, max_length=job.window, batch_size=job.batch
        )
        results = simple_evaluate(
            model=adapter,
            tasks=[task],
            task_manager=TaskManager(include_defaults=False),
            log_samples=True,
            bootstrap_iters=0,
        )
    samples = results["samples"]["wikitext"] if results else []
    if len(samples) != len(pages):
        raise ContentError(f"lm-eval scored {len(samples)} of {len(pages)} documents")
    nats, words, bad = np.zeros(len(pages)), np.zeros(len(pages), np.int64), []
    for sample in samples:
        place = int(sample["doc_id"])
        likelihood, count = sample["word_perplexity"]
        if math.isfinite(likelihood):
            nats[place], words[place] = -float(likelihood), int(count)
        else:
            bad.append(unit.texts[place][0])
    return Piece(unit.number, {"nats": nats, "words": words}, sorted(bad))
