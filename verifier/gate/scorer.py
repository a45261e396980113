# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of each document under one model, in a process of its own with one intra-op thread."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from verifier.gate.corpora import Corpus
from verifier.gate.jobs import Job, Sums, Window


def windows_of(corpus: Corpus, encode: Callable[[str], tuple[list[int], list[int]]] | None, size: int) -> list[Window]:
    """Return the windows of a corpus: no overlap, no BOS, the last short one included.

    A corpus of ids is cut document by document. Text is one stream, documents joined by a newline; a token belongs to
    the document in which its first character lies.

    Args:
        corpus: the documents.
        encode: text to token ids and the start of each in characters; None for a corpus of ids.
        size: tokens in a window.
    """
    if corpus.ids:
        return [
            (ids[i : i + size], (d,) * len(ids[i : i + size]))
            for d, ids in enumerate(corpus.ids)
            for i in range(0, len(ids), size)
        ]
    if encode is None:
        raise ValueError("text needs a tokenizer")
    starts, position = [], 0
    for text in corpus.texts:
        starts.append(position)
        position += len(text) + 1
    ids, offsets = encode("\n".join(corpus.texts))
    owner, document = [], 0
    for offset in offsets:
        while document + 1 < len(starts) and starts[document + 1] <= offset:
            document += 1
        owner.append(document)
    return [(tuple(ids[i : i + size]), tuple(owner[i : i + size])) for i in range(0, len(ids), size)]


def score(job: Job, progress: Callable[[int], None]) -> Sums:
    """Score a job; ``progress`` is called with the windows (or documents) done.

    Raises:
        ContentError: the model cannot be built, or a token id is outside its vocabulary.
    """
    # torch and transformers cost 2.4 s; the process that plans the gate does not need them.
    import torch  # noqa: PLC0415

    from verifier.load import load_model  # noqa: PLC0415

    if job.device == "cpu":
        torch.set_num_threads(1)
    loaded = load_model(job.model, device=job.device)
    sums = Sums([0.0] * job.documents, [0] * job.documents, environment=environment(loaded.model))
    if job.protocol == "lm-eval":
        from verifier.gate.lm_eval_task import score_texts  # noqa: PLC0415  (lm-eval is seconds more)

        score_texts(loaded.model, job, sums, progress)
    else:
        _score_windows(loaded.model, job, sums, progress)
    return sums


def _score_windows(model: Any, job: Job, sums: Sums, progress: Callable[[int], None]) -> None:
    import torch  # noqa: PLC0415

    from verifier.errors import ContentError  # noqa: PLC0415

    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max((max(ids) for ids, _ in job.windows if ids), default=0)
    if highest >= vocabulary:
        raise ContentError(f"{job.model}: the corpus has token id {highest}, the vocabulary {vocabulary} entries")
    ordered = sorted(job.windows, key=lambda w: -len(w[0]))
    with torch.inference_mode():
        for i in range(0, len(ordered), job.batch):
            part = [w for w in ordered[i : i + job.batch] if len(w[0]) > 1]
            # Padding follows the text, and attention is causal: no scored token sees it.
            width = max((len(w[0]) for w in part), default=0)
            if width:
                ids = torch.zeros((len(part), width), dtype=torch.long, device=job.device)
                for row, (tokens, _) in enumerate(part):
                    ids[row, : len(tokens)] = torch.tensor(tokens, device=job.device)
                logits = model(input_ids=ids, use_cache=False).logits
                for row, window in enumerate(part):
                    _add(logits[row], window, sums)
            progress(len(ordered[i : i + job.batch]))


def _add(logits: Any, window: Window, sums: Sums) -> None:
    import torch  # noqa: PLC0415

    tokens, owner = window
    rows = logits[: len(tokens) - 1].float()
    wanted = torch.tensor(tokens[1:], device=rows.device)
    nats = -torch.log_softmax(rows, -1).gather(-1, wanted[:, None])[:, 0].double()
    # A logit that is infinite where it does not matter leaves the log-probability finite; it is still a defect.
    finite = torch.isfinite(rows).all(-1) & torch.isfinite(nats)
    for document, value, good in zip(owner[1:], nats.tolist(), finite.tolist(), strict=True):
        if good:
            sums.nats[document] += value
            sums.tokens[document] += 1
        elif document not in sums.nonfinite:
            sums.nonfinite.append(document)


def environment(model: Any) -> dict[str, str]:
    """Return what a score depends on beside its protocol: versions, device, implementations."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    device = next(model.parameters()).device
    return {
        "torch": torch.__version__.partition("+")[0], "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "experts": str(getattr(model.config, "_experts_implementation", "")),
    }  # fmt: skip


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Return exp(total nats / total tokens)."""
    total = sum(tokens)
    return math.exp(sum(nats) / total) if total else math.nan
