# SPDX-License-Identifier: Apache-2.0
"""Perplexity gates: protocols, scorers, statistics, decision. Scoring needs the extra ``gate``."""

from verifier.evaluation import GateResult, Interval, Margin
from verifier.gate.as_depth import evaluator
from verifier.gate.comparison import compare_runs
from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import BUDGETS, drift_margin_of, margin_of
from verifier.gate.forecast import Plan, plan, render_plan_json, render_plan_text
from verifier.gate.gate import run
from verifier.gate.render import render_json, render_run, render_text
from verifier.gate.run_file import Run, RunHeader, read_run, write_run
from verifier.gate.score import score_run
from verifier.gate.statistics import paired

__all__ = [
    "BUDGETS",
    "Corpus",
    "GateResult",
    "Interval",
    "Margin",
    "Plan",
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
