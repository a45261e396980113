# SPDX-License-Identifier: Apache-2.0
"""What scoring costs over the plain forward of the same models on the same windows.

    python benchmarks/gate.py [--rounds 5] [--out benchmarks/results/gate.json]

One thread, the golden's own corpus, models loaded once; in each round, interleaved: the forward of base and candidate
alone, scoring them in lockstep (exact KL), scoring them with the 64 likeliest tokens. Seconds of processor time, so that a
shared machine disturbs them little; loading and the noise floor are left aside.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import exporter
from verifier.gate.corpora import load_corpus
from verifier.gate.experts import counting
from verifier.gate.jobs import Job, Unit
from verifier.gate.planning import units_of
from verifier.gate.scorer import _score_windows, windows_of
from verifier.load import load_model

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"


def forward(models: list[Any], units: list[Unit]) -> None:
    """Run the models over the units and drop what they say."""
    for unit in units:
        width = max(len(ids) for ids, _ in unit.windows)
        ids = torch.tensor([list(ids) + [0] * (width - len(ids)) for ids, _ in unit.windows])
        for model in models:
            model(input_ids=ids, use_cache=False)


def scored(models: list[Any], units: list[Unit], job: Job, *, lockstep: bool) -> None:
    """Score the units as a worker does."""
    pairs = [(models[1], models[0])] if lockstep else [(m, None) for m in models]
    for model, base in pairs:
        with counting(model) as experts:
            for unit in units:
                _score_windows(model, base, job, unit, experts)
                experts.take()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "gate.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(str(GOLDEN / "corpus.jsonl"))
    units = units_of(windows_of(corpus, None, 512), 8)
    tokens = sum(len(ids) for u in units for ids, _ in u.windows)
    with tempfile.TemporaryDirectory() as folder:
        exporter.export(GOLDEN / "bf16", Path(folder) / "out", recipe="nvfp4_experts_only", onto=GOLDEN / "mxfp8")
        models = [load_model(str(p)).model for p in (GOLDEN / "bf16", Path(folder) / "out")]
    plain = Job("", "cpu", "tokens", 8, 512, len(corpus))
    top = Job("", "cpu", "tokens", 8, 512, len(corpus), top_k=64)
    ways = {
        "forward": lambda: forward(models, units), "lockstep": lambda: scored(models, units, plain, lockstep=True),
        "top_k": lambda: scored(models, units, top, lockstep=False),
    }  # fmt: skip
    rounds = []
    with torch.inference_mode():
        for _ in range(args.rounds + 1):
            row = {}
            for name, way in ways.items():
                started = time.process_time()
                way()
                row[name] = round(time.process_time() - started, 4)
            rounds.append(row)
    rounds = rounds[1:]  # the first warms up
    ratios = {n: round(statistics.median(r[n] / r["forward"] for r in rounds), 3) for n in ways}
    seconds = {n: statistics.median(r[n] for r in rounds) for n in ways}
    result = {
        "command": "python benchmarks/gate.py", "rounds": rounds, "tokens": tokens, "ratio_to_forward": ratios,
        "tokens_per_second": {n: round(2 * tokens / s) for n, s in seconds.items()},
        "versions": {"python": platform.python_version(), **{p: version(p) for p in ("torch", "transformers", "numpy")}},
        "machine": f"{platform.machine()}, one thread of {os.cpu_count()} processors, shared",
    }  # fmt: skip
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(ratios), json.dumps(result["tokens_per_second"]))


if __name__ == "__main__":
    main()
