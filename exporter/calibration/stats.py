# SPDX-License-Identifier: Apache-2.0
"""From what was seen to a stats file: every entry is judged, a fallback has a name, the file is
written whole.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np

from exporter.calibration.report import Fallback, LayerExperts, named
from exporter.calibration.sites import problem
from verifier.errors import PlanError
from verifier.schemes import collapse, expert_key

OnProblem = Literal["fallback", "error"]
DEAD = "expert without tokens: the largest of the layer's other experts"


@dataclass
class Statistics:
    """What goes into the file: input maxima and tokens by hub module, KV maxima by name, and what
    was replaced.
    """

    amax: dict[str, float] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    kv: dict[str, float] = field(default_factory=dict)
    fallbacks: list[Fallback] = field(default_factory=list)


def require_seen(unseen: Iterable[str], tokens: Mapping[str, int]) -> None:
    """Refuse modules that saw no call at all.

    Args:
        unseen: hub modules whose place in the model was never called.
        tokens: tokens by hub module; an expert is only dead where another one of its layer saw
            tokens.

    Raises:
        PlanError: naming the first ones.
    """
    alive = {k.container for m, t in tokens.items() if t and (k := expert_key(m)) is not None}
    lost = [m for m in unseen if (k := expert_key(m)) is None or k.container not in alive]
    if lost:
        raise PlanError(
            f"{len(lost):,} modules saw no input at all: {named(lost)}; the texts never reach them"
        )


def layers_of(tokens: Mapping[str, int]) -> tuple[LayerExperts, ...]:
    """Return the experts of each layer with the tokens that each saw."""
    found: dict[str, dict[int, int]] = {}
    for module, count in tokens.items():
        key = expert_key(module)
        if key is not None:
            layer = found.setdefault(key.container, {})
            layer[key.expert] = max(layer.get(key.expert, 0), count)
    return tuple(
        LayerExperts(c, tuple(sorted(e)), tuple(e[i] for i in sorted(e))) for c, e in found.items()
    )


def experts_with(
    tokens: Mapping[str, int], test: Callable[[int], bool]
) -> tuple[tuple[str, int], ...]:
    """Return (expert, tokens) of the experts whose token count passes a test."""
    found: dict[str, int] = {}
    for module, count in tokens.items():
        key = expert_key(module)
        if key is not None:
            name = f"{key.container}.{key.expert}"
            found[name] = max(found.get(name, 0), count)
    return tuple((n, c) for n, c in found.items() if test(c))


def settle(
    amax: Mapping[str, float],
    tokens: Mapping[str, int],
    kv: Mapping[str, float],
    *,
    on_bad: OnProblem,
    on_dead: OnProblem,
) -> Statistics:
    """Return statistics of which every one can be written, or refuse.

    Two conditions have a fallback. An expert without tokens gets the largest maximum of its
    projection among the layer's other experts. A value that gives no normal float32 scale gets that
    too if it is an expert's, else the largest of the same projection in other layers.

    Args:
        amax: by hub module.
        tokens: by hub module.
        kv: by name of the statistic.
        on_bad: what to do about a value that gives no normal float32 scale.
        on_dead: what to do about an expert without tokens.

    Raises:
        PlanError: a condition whose fallback is not wanted, or has nothing to take from.
    """
    dead = {m: DEAD for m, t in tokens.items() if not t and expert_key(m) is not None}
    if dead and on_dead == "error":
        names = list(dict.fromkeys(m.rpartition(".")[0] for m in dead))
        raise PlanError(
            f"{len(names):,} experts saw no token: {named(names)}; more texts, or --on-dead-expert fallback"
        )
    found = Statistics({}, dict(tokens), {})
    bad = {
        m: why
        for m, v in {**amax, **kv}.items()
        if m not in dead and (why := problem(v)) is not None
    }
    if bad and on_bad == "error":
        text = named(f"{m} ({why})" for m, why in bad.items())
        raise PlanError(
            f"{len(bad):,} statistics give no scale: {text}; --on-bad-stat fallback replaces them"
        )
    for given, kept in ((amax, found.amax), (kv, found.kv)):
        lost = {
            m: dead.get(m) or f"{bad[m]}: the largest of {_peers(m)[1]}"
            for m in given
            if m in dead or m in bad
        }
        donors = _donors({m: v for m, v in given.items() if m not in lost})
        for name, value in given.items():
            kept[name] = value
            if name in lost:
                kept[name], donor = _borrow(name, donors, lost[name])
                found.fallbacks.append(Fallback(name, lost[name], kept[name], donor))
    return found


def _peers(name: str) -> tuple[str, str]:
    """Return what a statistic shares with those that may stand in for it, and what to call them."""
    key = expert_key(name)
    if key is not None:
        return f"{key.container}.*.{key.leaf}", "the layer's other experts"
    return collapse(name), "the same projection in other layers"


def _donors(good: Mapping[str, float]) -> dict[str, tuple[float, str]]:
    found: dict[str, tuple[float, str]] = {}
    for name, value in good.items():
        peers = _peers(name)[0]
        if peers not in found or value > found[peers][0]:
            found[peers] = (value, name)
    return found


def _borrow(
    name: str, donors: Mapping[str, tuple[float, str]], condition: str
) -> tuple[float, str]:
    peers, text = _peers(name)
    if peers not in donors:
        raise PlanError(
            f"{name}: {condition.partition(':')[0]}, and {text} have no good value to take"
        )
    return donors[peers]


def write(out: Path, statistics: Statistics, metadata: Mapping[str, str]) -> None:
    """Write a stats file: a temporary name, synced, then the final one. The same statistics give
    the same bytes.

    ``<hub module>.input_amax`` F32 scalars, ``<hub module>.tokens`` I64 scalars, ``<hub
    k_proj>.k_amax`` and ``<hub v_proj>.v_amax`` F32 scalars; ``metadata`` as the file's
    ``__metadata__``.
    """
    counts = {f"{m}.tokens": v for m, v in statistics.tokens.items()}
    maxima = {f"{m}.input_amax": v for m, v in statistics.amax.items()} | statistics.kv
    # By hand: safetensors' own writer orders metadata at random. The wider dtype first keeps every
    # scalar aligned.
    header: dict[str, object] = {"__metadata__": dict(metadata)}
    data = bytearray()
    for dtype, kind, values in (("I64", "<i8", counts), ("F32", "<f4", maxima)):
        for name, value in sorted(values.items()):
            raw = np.array(value, kind).tobytes()
            header[name] = {
                "dtype": dtype,
                "shape": [],
                "data_offsets": [len(data), len(data) + len(raw)],
            }
            data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    temporary = out.with_name(f".{out.name}.part")
    try:
        with temporary.open("wb") as handle:
            handle.write(len(text).to_bytes(8, "little") + text + data)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.rename(out)
    finally:
        temporary.unlink(missing_ok=True)
