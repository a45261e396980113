# SPDX-License-Identifier: Apache-2.0
"""Results of gates and checks for tests, made without scoring anything."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from verifier.evaluation import GateResult, Interval, Margin
from verifier.gate import Run, RunHeader
from verifier.gate.run_file import sums_of
from verifier.summary import Contents, Summary

KEY: dict[str, Any] = {
    "protocol": "tokens",
    "version": 1,
    "window": 512,
    "corpus": "c",
    "corpus_sha256": "0" * 64,
    "documents": 40,
    "document_rule": "lines",
    "bos": False,
    "dtype": "bfloat16",
}
ENVIRONMENT = {"torch": "2", "device": "cpu", "batch": "8"}


def scored_run(
    seed: int, weights: str, loss: float = 0.0, *, documents: int = 40, **header: Any
) -> Run:
    """Return a run whose tokens lose ``loss`` nats more than those of seed 0."""
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    tokens = base.integers(20, 60, documents)
    total = int(tokens.sum())
    nats = base.exponential(3, total) + 1
    nats = (nats + loss + (own.normal(0, 0.05, total) if seed else 0)).clip(0).astype(np.float32)
    arrays = {
        "nats": nats,
        "top1": own.integers(0, 9, total).astype(np.int32),
        "sure": -own.exponential(0.3, total).astype(np.float32),
        "tokens": tokens,
        "sums": sums_of(nats, tokens),
    }
    fields = {
        "model": f"model{seed}",
        "weights_sha256": weights * 64,
        "formats": ["NVFP4"],
        "key": KEY | {"documents": documents},
        "environment": ENVIRONMENT,
        "documents": [f"{i:016x}" for i in range(documents)],
        "floor": 0.0,
    }
    header = {k.removeprefix("header_"): v for k, v in header.items()}
    return Run(RunHeader.model_validate(fields | header), arrays)


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
