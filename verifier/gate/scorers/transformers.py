# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of each token under one model, or two in lockstep, in a process with one
intra-op thread.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np

from verifier.checkpoint import open_checkpoint
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import Array, Job, Piece, Unit, Window

LANE, GPU_LANE = 1 << 18, 1 << 27
"""Log-probabilities that are worked on at a time: what a core's cache holds, what a card does in
one go."""


def windows_of(
    corpus: Corpus, encode: Callable[[str], tuple[list[int], list[int]]] | None, size: int
) -> list[Window]:
    """Return the windows of a corpus: no overlap, no BOS, the last short one included.

    A corpus of ids is cut document by document. Text is one stream, documents joined by a newline;
    a token belongs to the document in which its first character lies.

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
    return [
        (tuple(ids[i : i + size]), tuple(owner[i : i + size])) for i in range(0, len(ids), size)
    ]


def score(job: Job, emit: Callable[[Piece], None]) -> dict[str, str]:
    """Score a job, give each finished unit to ``emit``, and return the environment.

    Raises:
        ContentError: the model cannot be built, or a token id is outside its vocabulary.
    """
    if job.scorer.name != "hf":
        from verifier.gate.scorers.engine import score_by_engine  # noqa: PLC0415  (of use to an engine only)

        return score_by_engine(job, emit)
    # torch and transformers cost 2.4 s; the process that plans the gate does not need them.
    import torch  # noqa: PLC0415

    from verifier.gate.scorers.expert_counts import counting  # noqa: PLC0415
    from verifier.load.model import load_model  # noqa: PLC0415

    if job.device == "cpu":
        torch.set_num_threads(1)
    model = load_model(job.model, device=job.device).model
    base = load_model(job.base, device=job.device).model if job.base else None
    _refuse_far_ids(model, job)
    with ExitStack() as stack:
        if job.scorer.activations == "declared":
            from verifier.load.activations import declared_activations  # noqa: PLC0415

            for made, uri in ((model, job.model), (base, job.base)):
                if made is not None and uri is not None:
                    stack.enter_context(declared_activations(made, open_checkpoint(uri)))
        experts = stack.enter_context(counting(model))
        stack.enter_context(torch.inference_mode())
        for unit in job.units:
            if job.protocol == "task":
                from verifier.gate.scorers.lm_eval_task import score_task  # noqa: PLC0415

                piece = score_task(model, job, unit)
            elif job.protocol == "lm-eval":
                from verifier.gate.scorers.lm_eval_wikitext import score_texts  # noqa: PLC0415  (lm-eval is seconds more)

                piece = score_texts(model, job, unit)
            else:
                piece = _score_windows(model, base, job, unit, experts)
            piece.experts = experts.take()
            emit(piece)
        return environment(model) | {"batch": str(job.batch)}


def _refuse_far_ids(model: Any, job: Job) -> None:
    from verifier.errors import ContentError  # noqa: PLC0415

    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max((max(ids) for ids, _ in job.windows if ids), default=0)
    if highest >= vocabulary:
        raise ContentError(
            f"{job.model}: the corpus has token id {highest}, the vocabulary {vocabulary} entries"
        )


def _score_windows(model: Any, base: Any, job: Job, unit: Unit, experts: Any) -> Piece:
    import torch  # noqa: PLC0415

    part = [w for w in unit.windows if len(w[0]) > 1]
    width = max((len(w[0]) for w in part), default=0)
    bad: set[int] = set()
    bad_base: set[int] = set()
    found: list[dict[str, Array]] = []
    if width:
        # Padding follows the text, and attention is causal: no scored token sees it.
        ids = torch.zeros((len(part), width), dtype=torch.long, device=job.device)
        real = torch.zeros((len(part), width), dtype=torch.bool)
        for row, (tokens, _) in enumerate(part):
            ids[row, : len(tokens)] = torch.tensor(tokens, device=job.device)
            real[row, : len(tokens)] = True
        experts.real = real.reshape(-1)
        logits = model(input_ids=ids, use_cache=False).logits
        theirs = base(input_ids=ids, use_cache=False).logits if base is not None else None
        at_once = max(1, (LANE if logits.device.type == "cpu" else GPU_LANE) // logits.shape[-1])
        for row, (tokens, owner) in enumerate(part):
            scored = len(tokens) - 1
            for begin in range(0, scored, at_once):
                at = slice(begin, min(scored, begin + at_once))
                wanted, owners = torch.tensor(tokens[1:][at], device=logits.device), owner[1:][at]
                ours, logp, finite = _of_rows(logits[row, at], wanted, job.top_k)
                if theirs is not None:
                    other, logb, fine = _of_rows(
                        theirs[row, at].to(logits.device), wanted, job.top_k
                    )
                    bad_base |= {
                        d for d, good in zip(owners, fine.tolist(), strict=True) if not good
                    }
                    ours |= {f"base_{k}": v for k, v in other.items()}
                    kl = logp.neg_().add_(logb).mul_(logb.exp_()).sum(-1).double()
                    ours["kl"] = torch.where(finite & fine, kl, 0.0).cpu().numpy()
                bad |= {d for d, good in zip(owners, finite.tolist(), strict=True) if not good}
                found.append(ours)
    arrays = {k: np.concatenate([f[k] for f in found]) for k in (found[0] if found else {})}
    return Piece(unit.number, arrays, sorted(bad), nonfinite_base=sorted(bad_base))


def _of_rows(logits: Any, wanted: Any, top_k: int) -> tuple[dict[str, Array], Any, Any]:
    """Return the arrays of `Piece` for some positions, the log-probabilities, and which positions
    are finite.
    """
    import torch  # noqa: PLC0415

    rows = logits.float()
    logp = torch.log_softmax(rows, -1)
    nats = -logp.gather(-1, wanted[:, None])[:, 0]
    # A logit that is infinite where it does not matter leaves the log-probability finite; it is
    # still a defect. The smallest log-probability of a position is finite only where all its logits
    # are.
    finite = torch.isfinite(logp.amin(-1))
    best, at = logp.max(-1)
    found = {
        "nats": torch.where(finite, nats, 0.0),
        "top1": at.to(torch.int32),
        "sure": torch.where(finite, best, 0.0),
    }
    if top_k:
        values, ids = logp.topk(min(top_k, logp.shape[-1]), -1)
        found |= {
            "top_ids": ids.to(torch.int32),
            "top_logprobs": torch.where(finite[:, None], values, 0.0),
        }
    return {k: v.cpu().numpy() for k, v in found.items()}, logp, finite


def environment(model: Any) -> dict[str, str]:
    """Return what a score depends on beside its protocol: versions, device, implementations."""
    import torch  # noqa: PLC0415
    import transformers  # noqa: PLC0415

    device = next(model.parameters()).device
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "experts": str(getattr(model.config, "_experts_implementation", "")),
    }


def perplexity(nats: Sequence[float], tokens: Sequence[int]) -> float:
    """Return exp(total nats / total tokens)."""
    total = sum(tokens)
    return math.exp(sum(nats) / total) if total else math.nan
