# SPDX-License-Identifier: Apache-2.0
"""Negative log-likelihood of each token under one model, or under two in lockstep.

On CPU a scoring process has one intra-op thread: the number of threads changes bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers

from verifier.checkpoint import open_checkpoint
from verifier.errors import ContentError
from verifier.gate.jobs import Array, Job, Unit, UnitScores, Window
from verifier.gate.scorers.expert_counts import ExpertCounter, counting
from verifier.gate.scorers.lm_eval_task import score_task
from verifier.gate.scorers.lm_eval_wikitext import score_texts
from verifier.load.activations import declared_activations
from verifier.load.model import load_model

CPU_LOGPROBS, GPU_LOGPROBS = 1 << 18, 1 << 27
"""How many log-probabilities are computed at a time: what fits in a core's cache, and what a GPU
does in one go."""


def score(job: Job, send: Callable[[UnitScores], None]) -> dict[str, str]:
    """Score a job, send each finished unit, and return the environment.

    Raises:
        ContentError: the model cannot be built, or a token id is outside its vocabulary.
    """
    if job.device == "cpu":
        torch.set_num_threads(1)
    model = load_model(job.model, device=job.device).model
    base = load_model(job.base, device=job.device).model if job.base else None
    _check_vocabulary(model, job)
    with ExitStack() as stack:
        if job.scorer.activations != "bf16":
            shared = job.scorer.activations == "shared"
            for loaded, uri in ((model, job.model), (base, job.base)):
                if loaded is not None and uri is not None:
                    rounded = declared_activations(loaded, open_checkpoint(uri), shared=shared)
                    stack.enter_context(rounded)
        experts = stack.enter_context(counting(model))
        stack.enter_context(torch.inference_mode())
        for unit in job.units:
            scores = _score_unit(model, base, job, unit, experts)
            scores.experts = experts.take()
            send(scores)
        return environment(model) | {"batch": str(job.batch)}


def _score_unit(model: Any, base: Any, job: Job, unit: Unit, experts: ExpertCounter) -> UnitScores:
    if job.protocol == "task":
        return score_task(model, job, unit)
    if job.protocol == "lm-eval":
        return score_texts(model, job, unit)
    return score_windows(model, base, job, unit, experts)


def _check_vocabulary(model: Any, job: Job) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max((max(ids) for ids, _ in job.windows if ids), default=0)
    if highest >= vocabulary:
        raise ContentError(
            f"{job.model}: the corpus has token id {highest}, and the vocabulary {vocabulary} "
            "entries"
        )


@dataclass
class _Rows:
    """The log-probabilities at some positions: the arrays of `UnitScores`, all of them, and at
    which positions they are finite.
    """

    arrays: dict[str, Array]
    logprobs: torch.Tensor
    finite: torch.Tensor


def score_windows(
    model: Any, base: Any, job: Job, unit: Unit, experts: ExpertCounter
) -> UnitScores:
    """Score a unit's windows with a model, and with its base where that is not None."""
    windows = [window for window in unit.windows if len(window[0]) > 1]
    scores = UnitScores(unit.number, {})
    if not windows:
        return scores
    ids, real = padded(windows, job.device)
    experts.real = real.reshape(-1)
    logits = model(input_ids=ids, use_cache=False).logits
    base_logits = base(input_ids=ids, use_cache=False).logits if base is not None else None
    at_a_time = CPU_LOGPROBS if logits.device.type == "cpu" else GPU_LOGPROBS
    step = max(1, at_a_time // logits.shape[-1])
    parts: list[dict[str, Array]] = []
    nonfinite: set[int] = set()
    nonfinite_base: set[int] = set()
    for row, (tokens, owners) in enumerate(windows):
        for start in range(0, len(tokens) - 1, step):
            part = slice(start, min(len(tokens) - 1, start + step))
            targets = torch.tensor(tokens[1:][part], device=logits.device)
            rows = _rows(logits[row, part], targets, job.top_k)
            nonfinite |= _owners_where(~rows.finite, owners[1:][part])
            if base_logits is not None:
                base_rows = _rows(base_logits[row, part].to(logits.device), targets, job.top_k)
                nonfinite_base |= _owners_where(~base_rows.finite, owners[1:][part])
                rows.arrays |= {f"base_{name}": v for name, v in base_rows.arrays.items()}
                rows.arrays["kl"] = _kl(base_rows, rows)
            parts.append(rows.arrays)
    scores.arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    scores.nonfinite, scores.nonfinite_base = sorted(nonfinite), sorted(nonfinite_base)
    return scores


def padded(windows: Sequence[Window], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids, int64 [windows, longest], and which of them are not padding, bool.

    Padding follows the text, and attention is causal: no scored token sees it.
    """
    width = max(len(tokens) for tokens, _ in windows)
    ids = torch.zeros((len(windows), width), dtype=torch.long, device=device)
    real = torch.zeros((len(windows), width), dtype=torch.bool)
    for row, (tokens, _) in enumerate(windows):
        ids[row, : len(tokens)] = torch.tensor(tokens, device=device)
        real[row, : len(tokens)] = True
    return ids, real


def _rows(logits: torch.Tensor, targets: torch.Tensor, top_k: int) -> _Rows:
    """Return the log-probabilities at some positions.

    Args:
        logits: [positions, vocabulary].
        targets: the token that follows each position, [positions].
        top_k: how many top tokens to keep.
    """
    logprobs = torch.log_softmax(logits.float(), -1)
    nats = -logprobs.gather(-1, targets[:, None])[:, 0]
    # A logit that is infinite where it does not matter leaves the log-probability finite; it is
    # still a defect. The smallest log-probability of a position is finite only where all its logits
    # are.
    finite = torch.isfinite(logprobs.amin(-1))
    best, top = logprobs.max(-1)
    tensors = {
        "nats": torch.where(finite, nats, 0.0),
        "top1": top.to(torch.int32),
        "sure": torch.where(finite, best, 0.0),
    }
    if top_k:
        values, ids = logprobs.topk(min(top_k, logprobs.shape[-1]), -1)
        tensors["top_ids"] = ids.to(torch.int32)
        tensors["top_logprobs"] = torch.where(finite[:, None], values, 0.0)
    return _Rows({name: t.cpu().numpy() for name, t in tensors.items()}, logprobs, finite)


def _kl(base: _Rows, model: _Rows) -> Array:
    """Return KL(base || model) at each position, nats, float64; the log-probabilities of both are
    overwritten.
    """
    difference = model.logprobs.neg_().add_(base.logprobs)
    kl = difference.mul_(base.logprobs.exp_()).sum(-1).double()
    result: Array = torch.where(model.finite & base.finite, kl, 0.0).cpu().numpy()
    return result


def _owners_where(flags: torch.Tensor, owners: Sequence[int]) -> set[int]:
    return {owner for owner, flag in zip(owners, flags.tolist(), strict=True) if flag}


def environment(model: Any) -> dict[str, str]:
    """Return what a score depends on besides its protocol: versions, device, implementations."""
    device = next(model.parameters()).device
    return {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "attention": str(getattr(model.config, "_attn_implementation", "")),
        "experts": str(getattr(model.config, "_experts_implementation", "")),
    }
