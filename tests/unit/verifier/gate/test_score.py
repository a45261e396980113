# SPDX-License-Identifier: Apache-2.0
"""Units of work put together, whatever their batch; the noise floor; what scorers count."""

from __future__ import annotations

import math

import numpy as np
import pytest

from verifier.gate.jobs import Unit, UnitScores
from verifier.gate.meter import ModelMeter, report
from verifier.gate.score import assemble, floor_of
from verifier.gate.scorers.expert_counts import ExpertCounter
from verifier.gate.windows import floor_units, units_of


def windows(lengths: list[int]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [(tuple(range(n)), (d,) * n) for d, n in enumerate(lengths)]


def scores_of(units: list[Unit], shift: float = 0.0) -> dict[int, UnitScores]:
    """Return scores in which a token's nats tell its window and position."""
    found = {}
    for u in units:
        nats = [
            100 * p + i + shift
            for p, (ids, _) in zip(u.places, u.windows, strict=True)
            for i in range(len(ids) - 1)
        ]
        arrays = {"nats": np.array(nats, np.float32), "top1": np.zeros(len(nats), np.int32)}
        found[u.number] = UnitScores(
            u.number, arrays | {"sure": np.zeros(len(nats), np.float32)} if nats else {}
        )
    return found


def test_scores_fall_into_their_places_whatever_the_batch() -> None:
    lengths = [5, 1, 9, 2, 9]
    whole = [
        assemble(units_of(windows(lengths), b), scores_of(units_of(windows(lengths), b)), 5)
        for b in (1, 2, 3, 8)
    ]
    assert whole[0]["tokens"].tolist() == [4, 0, 8, 1, 8]
    assert whole[0]["nats"].tolist()[:5] == [0, 1, 2, 3, 200]
    for other in whole[1:]:
        assert all(np.array_equal(other[k], v) for k, v in whole[0].items())


def test_progress_counts_documents_of_each_model() -> None:
    units = units_of(windows([20] * 12), 4)
    other = [((0,) * 4, (0,) * 4)] * 6  # one document in six windows
    candidate = ModelMeter("candidate", units, kept=[units[0].number])
    base = ModelMeter("base", units_of(other, 3))
    calls: list[tuple[int, int, str]] = []
    report([candidate, base], lambda *call: calls.append(call))
    candidate.add(units[1])
    base.add(units_of(other, 3)[0])
    report([candidate, base], lambda *call: calls.append(call))
    base.add(units_of(other, 3)[1])
    report([base], lambda *call: calls.append(call))
    assert calls == [
        (4, 13, "candidate 4 of 12, base 0 of 1"),
        (8, 13, "candidate 8 of 12, base 0 of 1"),
        (1, 1, "base"),
    ]


def test_the_floor_is_what_other_batches_change() -> None:
    units = units_of(windows([20] * 12), 4)
    again = floor_units(units, 4)
    assert {p for u in again for p in u.places} == set(range(8))
    assert {u.number for u in again}.isdisjoint(u.number for u in units)
    assert {u.windows for u in again}.isdisjoint(u.windows for u in units)
    same = scores_of([*units, *again])
    assert floor_of(units, again, same) == 0.0
    assert floor_of(units, again, scores_of(units) | scores_of(again, 0.25)) == pytest.approx(0.25)
    assert floor_of(units, [], same) is None


def test_experts_are_counted_without_padding() -> None:
    import torch

    counter = ExpertCounter()
    counter.real = torch.tensor([True, True, False, False])
    counter.add(
        "x", 3, torch.tensor([[0, 1], [0, 3], [2, 2], [2, 2]])
    )  # 3 is beyond the last: no one
    assert counter.take() == {"x": [2, 1, 0]}
    assert counter.take() == {}


def test_a_logit_that_is_not_finite_anywhere_is_seen() -> None:
    import torch

    from verifier.gate.scorers.transformers import _rows

    rows = torch.randn((5, 50), generator=torch.Generator().manual_seed(1))
    rows[0, 3], rows[1, 4], rows[2, 5], rows[3, 1] = math.inf, -math.inf, math.nan, 3e38
    found = _rows(rows, torch.zeros(5, dtype=torch.long), 4)
    arrays, logprobs = found.arrays, found.logprobs
    assert found.finite.tolist() == [False, False, False, True, True]
    assert all(np.isfinite(v).all() for v in arrays.values())
    assert arrays["nats"][4] == -logprobs[4, 0]
    assert arrays["top_ids"][4, 0] == arrays["top1"][4]
    assert arrays["top_logprobs"][4].tolist() == sorted(logprobs[4].tolist(), reverse=True)[:4]
