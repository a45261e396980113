# SPDX-License-Identifier: Apache-2.0
"""Results of gates and checks for tests, made without scoring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from verifier.evaluation import GateResult, Interval, Margin
from verifier.summary import Contents, Summary


def interval(delta: float, half: float = 0.001, **changed: Any) -> Interval:
    fields = {"se": 0.0006, "documents": 2, "tokens": 20, "t": 1.7} | changed
    return Interval(delta, low=delta - half, high=delta + half, **fields)


def gate_result(loss: float = 0.007, **changed: Any) -> GateResult:
    fields: dict[str, Any] = {
        "outcome": "passed",
        "candidate": "/nowhere/M3-NVFP4",
        "base": "/nowhere/M3",
        "margin": Margin(0.077, "given"),
        "interval": interval(loss),
        "perplexity_base": 20.0,
        "perplexity_candidate": 20.1,
        "measures_kl": False,
        "key": {"protocol": "tokens", "window": 512},
        "environment": {"torch": "2.13.0"},
        "documents": [(1.0, 1.1, 10), (2.0, 2.1, 10)],
    }
    return GateResult(**fields | changed)


def summary(tensors: int = 3, **formats: int) -> Summary:
    """Return the summary of a check of a checkpoint with these modules by format."""
    return Summary(Contents(tensors, 1, 100, 10, formats, {}, None))


def write_result(file: Path, result: GateResult, **fields: Any) -> str:
    """Write what `gate --format json` prints, with ``fields`` changed, and return the path."""
    file.write_text(json.dumps(result.as_json() | fields))
    return str(file)
