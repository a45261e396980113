# SPDX-License-Identifier: Apache-2.0
"""Perplexity gates: protocols, scorers, statistics, decision. Scoring needs the extra ``gate``."""

import warnings
from typing import Any

from verifier.evaluation import GateResult, Interval, Margin
from verifier.gate.as_depth import evaluator
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import BUDGETS, drift_margin_of, margin_of
from verifier.gate.forecast import GatePlan, plan, render_plan_json, render_plan_text
from verifier.gate.gate import run
from verifier.gate.render import render_json, render_run, render_text
from verifier.gate.run_file import Run, RunHeader, read_run, write_run
from verifier.gate.score import score_run
from verifier.gate.statistics import paired

__all__ = [
    "BUDGETS",
    "Corpus",
    "GatePlan",
    "GateResult",
    "Interval",
    "Margin",
    "Run",
    "RunHeader",
    "compare_runs",
    "drift_margin_of",
    "evaluator",
    "load_corpus",
    "margin_of",
    "paired",
    "plan",
    "read_run",
    "render_json",
    "render_plan_json",
    "render_plan_text",
    "render_run",
    "render_text",
    "run",
    "score_run",
    "write_run",
]


def __getattr__(name: str) -> Any:
    if name != "Plan":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    warnings.warn("verifier.gate.Plan is renamed to GatePlan", DeprecationWarning, stacklevel=2)
    return GatePlan
