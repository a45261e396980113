# SPDX-License-Identifier: Apache-2.0
"""Logits that are not finite are seen although lm-eval reports answers only."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verifier.gate.scorers.nonfinite import watching


class Model(torch.nn.Module):
    def forward(self, value: float) -> Any:
        return SimpleNamespace(logits=torch.tensor([[1.0, value]]))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_forward_pass_with_a_logit_that_is_not_finite(value: float) -> None:
    model = Model()
    samples = [{"doc_id": 4, "resps": [[(-1.0, True)]]}, {"doc_id": 7, "resps": [[(-2.0, False)]]}]
    with watching(model) as watch:
        model(0.0)
        assert watch.documents(samples, [4, 7]) == []
        model(value)
        model(0.0)
    assert watch.documents(samples, [4, 7]) == [4, 7]
    samples[1]["resps"] = [[(value, False)]]
    assert watch.documents(samples, [4, 7]) == [7]
