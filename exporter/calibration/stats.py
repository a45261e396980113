# SPDX-License-Identifier: Apache-2.0
"""From measured statistics to a stats file: every entry is checked, each fallback has a name, the
file is written atomically.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from exporter.calibration.report import Fallback, LayerExperts, listed
from exporter.calibration.sites import problem
from verifier.errors import PlanError
from verifier.files import write_atomic
from verifier.schemes import collapse, expert_key
from verifier.text import counted

OnProblem = Literal["fallback", "error"]
DEAD = "expert without tokens: the largest of the layer's other experts"


@dataclass
class Statistics:
    """The content of a stats file: input maxima and tokens by hub module, KV maxima by name, and
    what was replaced.
    """

    amax: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kv: dict[str, float] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)


def require_called(uncalled: Iterable[str], tokens: Mapping[str, int]) -> None:
    """Refuse modules that were never called.

    Args:
        uncalled: hub modules whose module in the model was never called.
        tokens: tokens by hub module; an expert without a call is only dead where another one of its
            layer has tokens.

    Raises:
        PlanError: naming the first ones.
    """
    keys = (expert_key(module) for module, count in tokens.items() if count)
    active = {key.container for key in keys if key is not None}
    unreached = []
    for module in uncalled:
        key = expert_key(module)
        if key is None or key.container not in active:
            unreached.append(module)
    if unreached:
        raise PlanError(
            f"{counted(len(unreached), 'module')} without any input: {listed(unreached)} (no text "
            "reaches them)"
        )


def layers_of(tokens: Mapping[str, int]) -> tuple[LayerExperts, ...]:
    """Return the experts of each layer with the tokens of each."""
    layers: dict[str, dict[int, int]] = {}
    for module, count in tokens.items():
        key = expert_key(module)
        if key is not None:
            layer = layers.setdefault(key.container, {})
            layer[key.expert] = max(layer.get(key.expert, 0), count)
    return tuple(
        LayerExperts(container, tuple(sorted(layer)), tuple(layer[e] for e in sorted(layer)))
        for container, layer in layers.items()
    )


def experts_with(
    tokens: Mapping[str, int], test: Callable[[int], bool]
) -> tuple[tuple[str, int], ...]:
    """Return (expert, tokens) of the experts whose token count passes a test."""
    experts: dict[str, int] = {}
    for module, count in tokens.items():
        key = expert_key(module)
        if key is not None:
            name = f"{key.container}.{key.expert}"
            experts[name] = max(experts.get(name, 0), count)
    return tuple((name, count) for name, count in experts.items() if test(count))


def apply_fallbacks(measured: Statistics, *, on_bad: OnProblem, on_dead: OnProblem) -> Statistics:
    """Return statistics of which every one can be written, or refuse.

    Two conditions have a fallback. An expert without tokens gets the largest maximum of its
    projection among the layer's other experts. A value that gives no normal float32 scale gets the
    same where it is an expert's, else the largest of the same projection in other layers.

    Args:
        measured: maxima and tokens by hub module, KV maxima by name.
        on_bad: what to do about a value that gives no normal float32 scale.
        on_dead: what to do about an expert without tokens.

    Raises:
        PlanError: a condition whose fallback is off, or has no value to take.
    """
    tokens = measured.tokens
    dead = {m: DEAD for m, t in tokens.items() if not t and expert_key(m) is not None}
    if dead and on_dead == "error":
        names = list(dict.fromkeys(m.rpartition(".")[0] for m in dead))
        raise PlanError(
            f"{counted(len(names), 'expert')} without tokens: {listed(names)}; use more texts, or "
            "--on-dead-expert fallback"
        )
    bad = _problems({**measured.amax, **measured.kv}, dead)
    if bad and on_bad == "error":
        text = listed(f"{name} ({reason})" for name, reason in bad.items())
        raise PlanError(
            f"{counted(len(bad), 'statistic')} without a valid scale: {text}; use --on-bad-stat "
            "fallback to replace them"
        )
    conditions = {
        name: f"{reason}: the largest of {_peers(name)[1]}" for name, reason in bad.items()
    }
    conditions |= dead
    result = Statistics(tokens=dict(tokens))
    result.amax = _replaced(measured.amax, conditions, result.fallbacks)
    result.kv = _replaced(measured.kv, conditions, result.fallbacks)
    return result


def _problems(values: Mapping[str, float], dead: Mapping[str, str]) -> dict[str, str]:
    """Return what is wrong with each value that gives no normal float32 scale."""
    reasons = {name: problem(value) for name, value in values.items() if name not in dead}
    return {name: reason for name, reason in reasons.items() if reason is not None}


def _replaced(
    values: Mapping[str, float], conditions: Mapping[str, str], fallbacks: list[Fallback]
) -> dict[str, float]:
    """Return values with those that have a condition replaced; each is added to ``fallbacks``."""
    donors = _donors({n: v for n, v in values.items() if n not in conditions})
    result = {}
    for name, value in values.items():
        result[name] = value
        if name in conditions:
            result[name], donor = _borrow(name, donors, conditions[name])
            fallbacks.append(Fallback(name, conditions[name], result[name], donor))
    return result


def _peers(name: str) -> tuple[str, str]:
    """Return what a statistic shares with those that may replace it, and how to call them."""
    key = expert_key(name)
    if key is not None:
        return f"{key.container}.*.{key.leaf}", "the layer's other experts"
    return collapse(name), "the same projection in other layers"


def _donors(good: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    """Return the largest value of each group of peers, and its name."""
    donors: dict[str, tuple[float, str]] = {}
    for name, value in good.items():
        peers = _peers(name)[0]
        if peers not in donors or value > donors[peers][0]:
            donors[peers] = (value, name)
    return donors


def _borrow(
    name: str, donors: Mapping[str, tuple[float, str]], condition: str
) -> tuple[float, str]:
    peers, text = _peers(name)
    if peers not in donors:
        raise PlanError(f"{name}: {condition.partition(':')[0]}, and {text} have no valid value")
    return donors[peers]


def write(out: Path, statistics: Statistics, metadata: Mapping[str, str]) -> None:
    """Write a stats file atomically. The same statistics give the same bytes.

    ``<hub module>.input_amax`` F32 scalars, ``<hub module>.tokens`` I64 scalars, ``<hub
    k_proj>.k_amax`` and ``<hub v_proj>.v_amax`` F32 scalars; ``metadata`` as the file's
    ``__metadata__``.

    Raises:
        MachineError: the disk.
    """
    counts = {f"{m}.tokens": v for m, v in statistics.tokens.items()}
    maxima = {f"{m}.input_amax": v for m, v in statistics.amax.items()} | statistics.kv
    # By hand: safetensors' own writer orders metadata at random. The wider dtype first keeps every
    # scalar aligned.
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data = bytearray()
    for dtype, numpy_dtype, values in (("I64", "<i8", counts), ("F32", "<f4", maxima)):
        for name, value in sorted(values.items()):
            raw = np.array(value, numpy_dtype).tobytes()
            offsets = [len(data), len(data) + len(raw)]
            header[name] = {"dtype": dtype, "shape": [], "data_offsets": offsets}
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    write_atomic(out, len(text).to_bytes(8, "little") + text + bytes(data))
