# SPDX-License-Identifier: Apache-2.0
"""Perplexity gates: protocols, scorers, statistics, decision. Needs the extra ``gate`` to score."""

from verifier.gate.corpora import Corpus, load_corpus
from verifier.gate.decision import BUDGETS, Margin, decide, margin_of
from verifier.gate.render import render_json, render_text
from verifier.gate.run import GateResult, run
from verifier.gate.statistics import Interval, paired

__all__ = [
    "BUDGETS", "Corpus", "GateResult", "Interval", "Margin", "decide", "load_corpus", "margin_of", "paired", "render_json",
    "render_text", "run",
]  # fmt: skip
