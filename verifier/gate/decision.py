# SPDX-License-Identifier: Apache-2.0
"""Margins, and the three outcomes of a gate."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from verifier.errors import UsageError
from verifier.evaluation import Interval, Margin, Outcome
from verifier.gate.measures import KL_STRICTER
from verifier.gate.statistics import documents_needed, holm, p_beyond

ERROR = 0.05
"""The error of all looks together: the chance that a candidate beyond its margin passes."""
NORMALS = {"NVFP4": 0.0642, "W4A16_NVFP4": 0.0642}
"""Published loss of a good export, nats per token: MiniMax-M3, experts in NVFP4, 5.083 to 5.420."""
DRIFT = 0.003
"""The loss over an accepted run that is tolerated by default, nats per token."""
KL_RATIO = 1.15
"""The largest tolerated KL(base || candidate) / KL(base || accepted). On the goldens, damages that
matter have 1.3 to 121, those that do not 0.98 to 1.09 (docs/gate.md)."""
KL_FACTOR = 2
"""The default margin of a KL divergence, in default budgets of the loss."""
BUDGETS = {
    "NVFP4": 0.08,
    "W4A16_NVFP4": 0.08,
    "MXFP8": 0.01,
    "FP8": 0.01,
    "FP8_PER_CHANNEL_PER_TOKEN": 0.01,
    "FP8_PB_WO": 0.01,
}
"""Largest relative increase of perplexity by format. NVFP4: the published normal of MiniMax-M3 is
6.6% (NVIDIA/Model-Optimizer#1719); MXFP8 and FP8: an order of magnitude below."""


def margin_of(
    option: str | float | None, formats: Iterable[str] | Mapping[str, int], *, task: bool = False
) -> Margin:
    """Return the margin: ``8%`` of perplexity, ``0.05`` nats, or the default budgets of the formats
    present, weighed by their parameters.

    Formats without a default budget, and linear layers that are not quantized, weigh with 0.

    Args:
        option: the value of ``--max-increase``. For a task it is in points of accuracy, ``1%`` or
            ``0.01``.
        formats: the candidate's; with the parameters of each (`format_parameters`) their budgets
            are weighed, without them the narrowest counts.
        task: whether the protocol is a task, which has no default.

    Raises:
        UsageError: not a number above zero, or no default for these formats.
    """
    if option is not None:
        return _parse(str(option).strip(), "--max-increase", task=task)
    if task:
        raise UsageError("a task has no default margin; give --max-loss, e.g. 1% of accuracy")
    budgets = {name: BUDGETS[name] for name in formats if name in BUDGETS}
    if not budgets:
        raise UsageError("no quantized format with a default budget; give --max-increase, e.g. 8%")
    parameters = dict(formats) if isinstance(formats, Mapping) else {}
    if len(parameters) > 1 and any(parameters.values()):
        return _weighed(parameters)
    narrowest = min(budgets, key=lambda name: budgets[name])
    return Margin(
        math.log1p(budgets[narrowest]),
        f"default budget of {narrowest}, {budgets[narrowest]:.0%} of perplexity",
    )


def _weighed(parameters: Mapping[str, int]) -> Margin:
    """Return the mean default budget of formats over the parameters of each."""
    total = sum(parameters.values())
    nats = sum(math.log1p(BUDGETS.get(name, 0.0)) * n for name, n in parameters.items()) / total
    largest_first = sorted(parameters.items(), key=lambda item: -item[1])
    shares = ", ".join(
        f"{n / total:.1%} {name} at {BUDGETS.get(name, 0):.0%}" for name, n in largest_first
    )
    return Margin(nats, f"default budgets by share of parameters, {math.expm1(nats):.2%}: {shares}")


def kl_margin_of(option: str | float | None, parameters: Mapping[str, int]) -> Margin | None:
    """Return the largest tolerated KL(base || candidate): nats per token, or by default twice the
    default budgets of the formats, weighed by their parameters; None where no format has one.

    On text sampled from the base, the loss estimates that divergence; on other text the divergence
    is larger, since it counts changes that the loss adds up to nothing.

    Raises:
        UsageError: not a number above zero.
    """
    if option is not None:
        margin = _parse(str(option).strip(), "--max-kl", task=False)
        return Margin(margin.nats, margin.source)
    if not parameters.keys() & BUDGETS.keys():
        return None
    budget = margin_of(None, parameters)
    return Margin(KL_FACTOR * budget.nats, f"{KL_FACTOR} times the {budget.source}")


def kl_ratio_of(option: str | float | None) -> Margin | None:
    """Return the largest tolerated ratio of KL divergences, as a logarithm: ``1.2x``, or 1.15 by
    default; None where the option is a margin of the loss.

    Raises:
        UsageError: a ratio that is not above 1.
    """
    if option is None:
        return Margin(math.log(KL_RATIO), f"default, {KL_RATIO} times the accepted run's")
    text = str(option).strip()
    if not text.endswith("x"):
        return None
    match = re.fullmatch(r"(\d+(?:\.\d+)?)x", text)
    value = float(match[1]) if match else 0.0
    if not 1 < value < 1000:
        raise UsageError(f"--max-drift {text}: give a ratio above 1 like 1.15x, or nats per token")
    return Margin(math.log(value), f"given, {value:g} times the accepted run's")


def drift_margin_of(option: str | float | None, *, task: bool = False) -> Margin:
    """Return the margin over an accepted run: nats, ``0.3%`` of perplexity, or 0.003 nats by
    default.

    Raises:
        UsageError: not a number above zero.
    """
    if option is None or (not task and kl_ratio_of(option) is not None):
        return Margin(DRIFT, f"default, {DRIFT} {'of accuracy' if task else 'nats per token'}")
    return _parse(str(option).strip(), "--max-drift", task=task)


def _parse(text: str, option: str, *, task: bool) -> Margin:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%?)(?:\s*nats)?", text)
    value = float(match[1]) if match else 0.0
    if match is None or not 0 < value < 1000:
        raise UsageError(
            f"{option} {text}: give a percentage of perplexity like 8%, or nats per token like 0.05"
        )
    if task:
        share = value / 100 if match[2] else value
        if share >= 1:
            raise UsageError(f"{option} {text}: give points of accuracy, like 1% or 0.01")
        return Margin(share, f"given, {text} of accuracy")
    if match[2]:
        return Margin(math.log1p(value / 100), f"given, {text} of perplexity")
    return Margin(value, f"given, {text} nats per token")


@dataclass(frozen=True)
class Divergence:
    """A KL divergence or the logarithm of a ratio of two, and its margin.

    A lower bound of a divergence can show that it is beyond its margin, and not that it is within.
    """

    interval: Interval
    margin: Margin
    shows_within: bool = True


def outcome_of(
    losses: Sequence[tuple[Interval, Margin]],
    *,
    floor: float | None,
    widening: float,
    alpha: float,
    divergences: Sequence[Divergence] = (),
) -> Outcome:
    """Return the outcome for a family of losses.

    ``passed`` when every upper end is within its margin and every margin above the noise floor (all
    must hold, so nothing is corrected for); ``failed`` when Holm's procedure at ``alpha`` shows one
    mean to be beyond its margin.

    Args:
        losses: intervals, already widened, and margins.
        floor: noise floor, nats; None where it was not measured.
        widening: by how much the intervals were widened; a mean must be beyond its margin by as
            much.
        alpha: the error of the family.
        divergences: KL divergences, or logarithms of their ratios, which decide as well.
    """
    p_values = [p_beyond(interval, margin.nats + widening) for interval, margin in losses]
    p_values += [
        min(1.0, KL_STRICTER * p_beyond(each.interval, each.margin.nats)) for each in divergences
    ]
    if any(holm(p_values, alpha)):
        return "failed"
    within = all(interval.high <= margin.nats for interval, margin in losses) and all(
        each.interval.high <= each.margin.nats for each in divergences if each.shows_within
    )
    if within and all(floor is None or margin.nats > floor for _, margin in losses):
        return "passed"
    return "inconclusive"


def alpha_of(look: int | None) -> float:
    """Return the error of each one-sided bound at a look: 5% / (k (k + 1)) at look k.

    The shares of any number of looks add up to less than 5%. Where earlier attempts are not known,
    it is 5%, which is right only for the first look.
    """
    return ERROR if look is None else ERROR / (look * (look + 1))


def documents_for(losses: Sequence[tuple[Interval, Margin]], widening: float = 0.0) -> int | None:
    """Return about how many documents would decide what is open; None where no number would.

    Args:
        losses: intervals, already widened, and margins.
        widening: by how much they were widened, which more documents do not change.
    """
    counts = [
        documents_needed(i, margin.nats, widening) for i, margin in losses if i.high > margin.nats
    ]
    known = [count for count in counts if count is not None]
    return max(known) if known and len(known) == len(counts) else None
