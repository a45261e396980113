# SPDX-License-Identifier: Apache-2.0
"""What every engine gives: for each window of token ids, the arrays of `WindowScores`.

Answers are bounded in size and checked for their lengths and values, and an answer that does not
come in time ends the run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from verifier.errors import MachineError
from verifier.gate.jobs import Array, Unit, UnitScores

LOWEST = -9999.0
"""vLLM's server writes an infinite log-probability as this, since JSON has no infinity."""
BYTES_PER_NUMBER = 400
"""A bound of what one log-probability takes in an answer."""
_TOLERANCE = 1e-3
_TOP = ("top_ids", "top_logprobs")
_FIELDS = ("nats", "top1", "sure", *_TOP)


@dataclass(frozen=True)
class WindowScores:
    """The scores of one window of n tokens.

    ``arrays``: ``nats`` float32 [n - 1]; where the engine names tokens by their ids, ``top1`` int32
    and ``sure`` float32 [n - 1], ``top_ids`` int32 and ``top_logprobs`` float32 [n - 1, k].
    ``finite`` bool [n - 1].
    """

    arrays: dict[str, Array]
    finite: Array


class Engine(Protocol):
    """Scores windows of token ids."""

    environment: dict[str, str]

    def score(self, windows: Sequence[Sequence[int]]) -> list[WindowScores]:
        """Return the scores of each window; a window has at least two tokens."""
        ...

    def close(self) -> None:
        """Release what the engine holds."""
        ...


def unit_scores(unit: Unit, engine: Engine) -> UnitScores:
    """Score a unit's windows with an engine.

    Raises:
        MachineError: the engine fails, or its windows have unlike arrays.
    """
    windows = [window for window in unit.windows if len(window[0]) > 1]
    scores = engine.score([ids for ids, _ in windows]) if windows else []
    nonfinite: set[int] = set()
    for (_, owners), window_scores in zip(windows, scores, strict=True):
        nonfinite.update(np.array(owners[1:])[~window_scores.finite].tolist())
    names = scores[0].arrays.keys() if scores else set()
    if any(s.arrays.keys() != names for s in scores):
        raise MachineError("the engine names the top tokens of only some windows")
    try:
        arrays = {name: np.concatenate([s.arrays[name] for s in scores]) for name in names}
    except ValueError:
        raise MachineError("the engine gives unequal numbers of top tokens") from None
    return UnitScores(unit.number, arrays, sorted(nonfinite))


def scores_of(window: Sequence[int], answer: Any, top_k: int, who: str) -> WindowScores:
    """Return one window's scores from an engine's lists, checked.

    Args:
        window: the token ids.
        answer: a mapping from the names of `WindowScores` to lists; null for NaN.
        top_k: how many top tokens were asked for.
        who: the engine, for messages.

    Raises:
        MachineError: lengths or values are impossible for this window.
    """
    arrays = _arrays(answer, who)
    top = set(_TOP) if top_k else set()
    _check_names(arrays, top, who)
    arrays = {name: values for name, values in arrays.items() if name in top or name not in _TOP}
    _check_shapes(arrays, len(window) - 1, top_k, who)
    finite = _finite(arrays)
    too_likely = (arrays["nats"][finite] < -_TOLERANCE).any() or (
        "sure" in arrays and (arrays["sure"][finite] > _TOLERANCE).any()
    )
    if too_likely:
        raise MachineError(f"{who}: a probability above one")
    return WindowScores({n: _typed(n, v, finite) for n, v in arrays.items()}, finite)


def _arrays(answer: Any, who: str) -> dict[str, Array]:
    try:
        lists = {name: answer[name] for name in _FIELDS if answer.get(name) is not None}
        return {
            name: np.array([_numbers(row) for row in values] if name in _TOP else _numbers(values))
            for name, values in lists.items()
        }
    except (TypeError, ValueError, AttributeError, KeyError) as error:
        raise MachineError(f"{who}: not an answer with scores ({type(error).__name__})") from error


def _numbers(values: Sequence[Any]) -> Array:
    return np.array([math.nan if value is None else value for value in values], np.float64)


def _check_names(arrays: dict[str, Array], top: set[str], who: str) -> None:
    if "nats" not in arrays:
        raise MachineError(f"{who}: an answer without log-probabilities")
    if not top <= arrays.keys() or ("top1" in arrays) != ("sure" in arrays):
        raise MachineError(f"{who}: an answer without the top tokens")


def _check_shapes(arrays: dict[str, Array], count: int, top_k: int, who: str) -> None:
    for name, values in arrays.items():
        wide = name in _TOP
        if len(values) != count or (wide and (values.ndim != 2 or values.shape[1] > top_k)):
            raise MachineError(
                f"{who}: {name} is {list(values.shape)} for a window of {count + 1} tokens"
            )


def _finite(arrays: dict[str, Array]) -> Array:
    """Return at which tokens every log-probability is finite, bool [n - 1]."""
    finite: Array = np.isfinite(arrays["nats"]) & (arrays["nats"] < -LOWEST)
    for name in ("sure", "top_logprobs"):
        if name in arrays and len(finite):
            finite &= np.isfinite(arrays[name].reshape(len(finite), -1)).all(1)
    return finite


def _typed(name: str, values: Array, finite: Array) -> Array:
    """Return an array in its own dtype, with 0 where a score is not finite."""
    values = np.where(finite if values.ndim == 1 else finite[:, None], values, 0.0)
    if name in ("top1", "top_ids"):
        return values.astype(np.int32)
    bounded = np.maximum(values, 0.0) if name == "nats" else np.minimum(values, 0.0)
    return bounded.astype(np.float32)


def ranked(own: Sequence[float], values: Sequence[dict[int, float]], top_k: int) -> dict[str, Any]:
    """Return the lists that `scores_of` reads.

    Args:
        own: the log-probability of each scored token.
        values: log-probabilities at each scored token, by token id.
        top_k: how many top tokens to keep.
    """
    rows = [sorted(v.items(), key=_top_first) for v in values]
    lists: dict[str, Any] = {
        "nats": [-logprob for logprob in own],
        "top1": [row[0][0] for row in rows],
        "sure": [row[0][1] for row in rows],
    }
    if top_k:
        lists["top_ids"] = [[token for token, _ in row[:top_k]] for row in rows]
        lists["top_logprobs"] = [[logprob for _, logprob in row[:top_k]] for row in rows]
    return lists


def _top_first(item: tuple[int, float]) -> tuple[float, int]:
    token, logprob = item
    return (math.inf if math.isnan(logprob) else -logprob, token)
