# SPDX-License-Identifier: Apache-2.0
"""Drift by the ratio of KL divergences: what it decides, from which runs, and what it covers."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from tests.results import scored_run
from verifier.cli import run as cli
from verifier.errors import UsageError
from verifier.evaluation import GateResult, Margin, gate_result_of
from verifier.gate.comparison import compare_runs
from verifier.gate.decision import kl_margin_of, kl_ratio_of
from verifier.gate.render import render_text
from verifier.gate.run_file import Run, sums_of, write_run
from verifier.gate.statistics import log_ratio
from verifier.goldens import Golden, compare, golden_of

WIDE, DRIFT = Margin(0.077, "given"), Margin(0.003, "default")
VOCABULARY, DOCUMENTS = 48, 40
RATIO = kl_ratio_of(None)
Noise = Callable[[np.random.Generator, tuple[int, ...]], np.ndarray]


@cache
def logits() -> tuple[np.ndarray, np.ndarray]:
    """Return the base's logits at every token, and the tokens that follow, drawn from them."""
    rng = np.random.default_rng(7)
    count = int(scored_run(0, "a").tokens.sum())
    values = rng.normal(0, 2, (count, VOCABULARY))
    follow = (values + rng.gumbel(0, 1, values.shape)).argmax(1)
    return values, follow


def model(seed: int, weights: str, noise: float, top_k: int = 16, worse: float = 0.0) -> Run:
    """Return a run of a model whose logits are the base's and some noise."""
    values, follow = logits()
    own = values + noise * np.random.default_rng(seed).normal(0, 1, values.shape)
    own[np.arange(len(own)), follow] -= worse
    logprobs = own - np.log(np.exp(own).sum(1, keepdims=True))
    order = np.argsort(-logprobs, 1)
    nats = -logprobs[np.arange(len(own)), follow].astype(np.float32)
    run = scored_run(0, weights)
    arrays = {
        "nats": nats,
        "sums": sums_of(nats, run.tokens),
        "tokens": run.tokens,
        "top1": order[:, 0].astype(np.int32),
        "sure": np.take_along_axis(logprobs, order[:, :1], 1)[:, 0].astype(np.float32),
    }
    if top_k:
        top = order[:, :top_k]
        arrays["top_ids"] = top.astype(np.int32)
        arrays["top_logprobs"] = np.take_along_axis(logprobs, top, 1).astype(np.float32)
    return Run(run.header.model_copy(update={"parameters": {"NVFP4": 1}}), arrays)


def exact_kl(noise: float, seed: int) -> np.ndarray:
    values, _ = logits()
    own = values + noise * np.random.default_rng(seed).normal(0, 1, values.shape)
    p, q = (v - np.log(np.exp(v).sum(1, keepdims=True)) for v in (values, own))
    kl: np.ndarray = (np.exp(p) * (p - q)).sum(1)
    return kl


BASE, ACCEPTED = model(0, "a", 0.0), model(1, "b", 0.1)


def drift(candidate: Run, accepted: Run = ACCEPTED) -> GateResult:
    return compare_runs(
        BASE,
        candidate,
        WIDE,
        drift_against=accepted,
        drift_margin=DRIFT,
        max_kl_ratio=RATIO,
    )


@pytest.mark.parametrize(
    ("noise", "outcome"), [(0.1, "passed"), (0.09, "passed"), (0.12, "failed"), (0.13, "failed")]
)
def test_it_decides_where_the_loss_does_not(noise: float, outcome: str) -> None:
    """KL grows with the square of the noise: 1.2 times the noise is 1.44 times the divergence."""
    candidate = model(2, "c", noise)
    result = drift(candidate)
    assert result.outcome == outcome
    ratio = result.drift.kl if result.drift else None
    assert ratio is not None
    assert ratio.interval.ratio == pytest.approx((noise / 0.1) ** 2, rel=0.05)
    by_loss = compare_runs(BASE, candidate, WIDE, drift_against=ACCEPTED, drift_margin=DRIFT)
    assert by_loss.outcome != "failed"
    assert gate_result_of(result.as_json()).drift == result.drift


def test_the_report_explains_both() -> None:
    text = render_text(drift(model(2, "c", 0.12)))
    assert "times the KL divergence of model0, bounds [1." in text
    assert "lower bounds, from the top 16 tokens and the rest of both" in text
    assert "margin   1.15 times (default" in text
    assert "does not decide" in text
    assert "the loss is how much worse the candidate predicts this text" in text
    assert "the KL ratio is how far the candidate's predictions are from the base's" in text


def test_both_sides_are_computed_alike() -> None:
    """A run with more top tokens has a tighter bound: it is cut to those of the other one."""
    few = model(1, "b", 0.1, top_k=4)
    result = drift(model(1, "c", 0.1), few)
    ratio = result.drift.kl if result.drift else None
    assert ratio is not None
    assert "top 4 tokens" in ratio.kind
    assert ratio.interval.ratio == pytest.approx(1)
    assert ratio.candidate == pytest.approx(ratio.accepted)
    assert result.measures.kl is not None
    assert ratio.candidate < result.measures.kl.mean.delta < exact_kl(0.1, 1).mean()


def test_runs_without_top_tokens_are_decided_by_the_loss() -> None:
    plain = model(1, "b", 0.1, top_k=0)
    result = drift(model(2, "c", 0.12), plain)
    assert result.drift is not None
    assert result.drift.kl is None
    assert "drift is decided by the loss" in "; ".join(result.notes)
    # An accepted run that is the base's equal leaves no ratio.
    equal = drift(model(2, "c", 0.12), replace(BASE, header=ACCEPTED.header))
    assert equal.drift is not None
    assert equal.drift.kl is None


def test_runs_from_different_environments_are_decided_by_the_loss() -> None:
    header = ACCEPTED.header.model_copy(update={"environment": {"device": "H200"}})
    result = drift(model(2, "c", 0.12), replace(ACCEPTED, header=header))
    assert result.drift is not None
    assert result.drift.kl is None
    assert "the runs are from different environments" in "; ".join(result.notes)


def test_margins_of_the_divergence() -> None:
    assert RATIO == Margin(math.log(1.15), "default, 1.15 times the accepted run's")
    given = kl_ratio_of("1.3x")
    assert given is not None
    assert given.nats == math.log(1.3)
    assert kl_ratio_of("0.003") is None
    for wrong in ("1x", "0.5x", "ax", "x"):
        with pytest.raises(UsageError, match="above 1"):
            kl_ratio_of(wrong)
    default = kl_margin_of(None, {"NVFP4": 1})
    assert default is not None
    assert default.nats == pytest.approx(2 * math.log(1.08))
    assert kl_margin_of(None, {"INT8": 1}) is None
    assert kl_margin_of("0.02", {}) == Margin(0.02, "given, 0.02 nats per token")


def test_the_divergence_itself_has_a_margin() -> None:
    candidate, exact = model(2, "c", 0.2), exact_kl(0.2, 2)
    mean = exact.mean()
    for factor, outcome in ((1.5, "passed"), (0.7, "failed"), (1.0, "inconclusive")):
        margin = Margin(factor * mean, "given")
        result = compare_runs(BASE, candidate, WIDE, kl=exact, kl_margin=margin)
        assert result.outcome == outcome
        assert "nats of KL (given)" in render_text(result)
    # A lower bound shows what is beyond the margin, and never that something is within.
    bound = compare_runs(BASE, candidate, WIDE, kl_margin=Margin(0.5 * mean, "given"))
    assert bound.outcome == "failed"
    assert compare_runs(BASE, candidate, WIDE, kl_margin=Margin(mean, "")).outcome == "passed"


def record(run: Run) -> Golden:
    return golden_of(compare_runs(BASE, run, WIDE))


@pytest.mark.parametrize(
    ("noise", "outcome"),
    [(0.1, "within"), (0.12, "worse"), (0.107, "inconclusive"), (0.08, "stale")],
)
def test_a_golden_is_compared_by_its_divergence(noise: float, outcome: str) -> None:
    golden = record(ACCEPTED)
    assert len(golden.kl) == DOCUMENTS
    comparison = compare(golden, record(model(2, "c", noise)))
    assert comparison.outcome == outcome, comparison.sentence
    assert "times the golden's" in comparison.sentence
    assert comparison.interval is not None
    # Without the divergence of one side, or with another kind, the loss decides.
    for changed in ({"kl": []}, {"kl_kind": "lockstep"}):
        by_loss = compare(golden.model_copy(update=changed), record(model(2, "c", noise)))
        assert "nats per token" in by_loss.sentence


def test_a_golden_with_a_base_that_became_worse() -> None:
    golden, new = record(ACCEPTED), record(model(2, "c", 0.1))
    worse = [(base + 0.06 * tokens, own, tokens) for base, own, tokens in new.documents]
    comparison = compare(golden, new.model_copy(update={"documents": worse}))
    assert (comparison.outcome, comparison.exit_code) == ("unlike", 1)
    assert "the base is worse than in the record, by 0.0600" in comparison.sentence


def test_on_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "base": BASE,
        "accepted": ACCEPTED,
        "damaged": model(2, "c", 0.12),
        "plain": model(3, "d", 0.1, top_k=0),
    }
    files = {name: str(tmp_path / f"{name}.run") for name in runs}
    for name, run in runs.items():
        write_run(files[name], run)
    command = ["compare", files["base"], files["damaged"], "--drift-against", files["accepted"]]
    assert cli([*command, "--format", "json"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert result["drift"]["kl"]["interval"]["low"] > math.log(1.15)
    assert cli([*command, "--max-drift", "1.8x"]) == 0
    assert cli([*command, "--max-drift", "0.02"]) == 0
    assert cli([*command, "--max-kl", "0.0001"]) == 1
    command[2] = files["plain"]
    assert cli([*command, "--max-drift", "1.15x"]) == 2
    assert "scored without top tokens" in capsys.readouterr().err


def test_the_bound_of_a_skewed_ratio_holds() -> None:
    """The ratio is 1.15; documents differ log-normally in divergence and in ratio."""
    rng = np.random.default_rng(3)
    wrong = 0
    for _ in range(1500):
        accepted = np.exp(0.6 * rng.standard_normal(40))
        candidate = 1.15 * accepted * np.exp(0.4 * rng.standard_normal(40) - 0.08)
        interval = log_ratio(candidate, accepted, np.ones(40), 0.99)
        assert interval is not None
        wrong += interval.high <= math.log(1.15)
    assert wrong / 1500 < 0.025
    assert log_ratio([1.0], [1.0], [1]) is None
    assert log_ratio([1.0, 2.0], [0.0, 0.0], [1, 1]) is None
    zero = log_ratio([0.0, 0.0], [1.0, 2.0], [1, 1])
    assert zero is not None
    assert zero.high < -20
