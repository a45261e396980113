# SPDX-License-Identifier: Apache-2.0
"""A gate's result as text and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from verifier.evaluation import (
    Accuracy,
    Drift,
    ExpertReach,
    GateResult,
    Interval,
    Kl,
    KlRatio,
    Measures,
)
from verifier.gate.run_file import Run
from verifier.gate.statistics import perplexity
from verifier.text import counted, printable

_ACTIVATIONS = {
    "bf16": "bf16 (weight-only error)",
    "declared": "declared (rounded as each checkpoint declares)",
    "shared": "shared (as declared; the experts of a layer share the largest input scale)",
    "engine": "engine (rounded as the engine does)",
}
MAX_LAYERS = 8
MAX_EXPERTS = 16
MAX_DOCUMENTS = 5


def render_text(result: GateResult) -> str:
    """Return the result as a few lines of text, the verdict last."""
    key = result.key
    lines = [
        f"gate     {result.candidate} against {result.base}",
        _corpus_line(key, key["documents"]),
        f"inputs   activations: {_activations(key)}",
    ]
    interval = result.interval
    if interval is None:
        lines += _nonfinite_lines(result)
    else:
        if result.accuracy is not None:
            lines += _accuracy_lines(result, result.accuracy, interval)
        else:
            lines += _loss_lines(result, interval)
        lines += _margin_lines(result)
        lines += _measure_lines(result) if result.accuracy is None else []
        lines += _note_lines(result)
        lines += [f"doubt    {doubt}" for doubt in result.doubts]
    lines.append(f"verdict: {result.outcome.upper()}")
    return _text(lines)


def _text(lines: list[str]) -> str:
    return "".join(printable(line, 2000) + "\n" for line in lines)


def _corpus_line(key: Mapping[str, Any], documents: int) -> str:
    count = "1 document" if documents == 1 else f"{documents} documents"
    return f"corpus   {key['corpus']}: {count}, protocol {key['protocol']}, seq-len {key['window']}"


def _activations(key: Mapping[str, Any]) -> str:
    name = str(key.get("activations", "bf16"))
    return _ACTIVATIONS.get(name, name)


def _nonfinite_lines(result: GateResult) -> list[str]:
    lines = []
    for documents, owner in (
        (result.nonfinite_candidate, "the candidate's"),
        (result.nonfinite_base, "the base's"),
    ):
        if documents:
            numbers = ", ".join(f"#{number}" for number in documents[:MAX_DOCUMENTS])
            more = ", …" if len(documents) > MAX_DOCUMENTS else ""
            lines.append(
                f"error    {owner} logits are not finite in {counted(len(documents), 'document')} "
                f"({numbers}{more}); no statistics"
            )
    return lines


def _loss_lines(result: GateResult, interval: Interval) -> list[str]:
    unit = "word" if result.key["protocol"] == "lm-eval" else "token"
    if interval.documents < 2:
        loss = f"{interval.delta:+.5f} nats/{unit}; one document has no interval"
    else:
        loss = (
            f"{interval.delta:+.5f} nats/{unit} (perplexity {math.expm1(interval.delta):+.2%}), "
            f"{_interval(interval, result.alpha)}, standard error {interval.se:.5f} over "
            f"{_units(result, interval)}"
        )
    return [
        f"base     {unit} perplexity {result.perplexity_base:.4f}   ({interval.tokens:,} {unit}s)",
        f"cand     {unit} perplexity {result.perplexity_candidate:.4f}",
        f"Δloss    {loss}",
    ]


def _accuracy_lines(result: GateResult, accuracy: Accuracy, interval: Interval) -> list[str]:
    count = interval.documents
    return [
        f"base     accuracy {accuracy.base / count:.4f}   ({accuracy.base:,} of {count:,})",
        f"cand     accuracy {accuracy.candidate / count:.4f}   ({accuracy.candidate:,} of "
        f"{count:,})",
        f"Δloss    {interval.delta:+.5f} of accuracy, exact {_interval(interval, result.alpha)}",
        f"McNemar  {accuracy.lost:,} right by the base alone, {accuracy.won:,} by the candidate "
        f"alone; exact p-value of no loss {accuracy.p_value:.4g}",
    ]


def _margin_lines(result: GateResult) -> list[str]:
    unit = "nats" if result.accuracy is None else "of accuracy"
    lines = [f"margin   {result.margin.nats:.5f} {unit} ({result.margin.source})"]
    if (drift := result.drift) is not None and drift.kl is not None:
        lines += _kl_ratio_lines(drift, drift.kl)
    elif drift is not None:
        lines += [
            f"drift    {drift.interval.delta:+.5f} {result.unit} over {drift.accepted}, "
            f"{_interval(drift.interval, result.alpha)}",
            f"margin   {drift.margin.nats:.5f} {unit} of drift ({drift.margin.source})",
        ]
    return lines


def _kl_ratio_lines(drift: Drift, kl: KlRatio) -> list[str]:
    low, high = (math.exp(end) for end in (kl.interval.low, kl.interval.high))
    return [
        f"drift    {kl.interval.ratio:.3f} times the KL divergence of {drift.accepted}, bounds "
        f"[{low:.3f}, {high:.3f}] ({kl.candidate:.6f} and {kl.accepted:.6f} nats; {kl.kind})",
        f"margin   {math.exp(kl.margin.nats):.4g} times ({kl.margin.source})",
        f"         loss over the accepted run {drift.interval.delta:+.5f} nats per token "
        f"[{drift.interval.low:+.5f}, {drift.interval.high:+.5f}]; does not decide",
    ]


def _interval(interval: Interval, alpha: float) -> str:
    if not math.isfinite(interval.se) and interval.exact is None:
        return "no interval"
    level = 100 * (1 - 2 * alpha)
    return f"{level:.4g}% interval [{interval.low:+.5f}, {interval.high:+.5f}]"


def _units(result: GateResult, interval: Interval) -> str:
    grouped = len(set(result.clusters)) < len(result.clusters) and -1 not in result.clusters
    return counted(interval.documents, "group" if grouped else "document")


def _measure_lines(result: GateResult) -> list[str]:
    measures = result.measures
    lines = _cross_check_lines(result)
    if measures.kl is not None:
        lines += _kl_lines(measures.kl)
    if measures.top1 is not None:
        lines.append(_top1_line(measures, measures.top1))
    if measures.worst is not None:
        number, mean, bound = measures.worst
        lines.append(f"worst    document #{number}: {mean:+.5f} nats, outlier bound {bound:+.5f}")
    lines += _expert_lines(result)
    floor = "not measured" if result.floor is None else f"{result.floor:.6f} nats"
    return [*lines, f"floor    {floor}"]


def _cross_check_lines(result: GateResult) -> list[str]:
    measures = result.measures
    if measures.bootstrap is None:
        return []
    low, high = measures.bootstrap
    line = f"check    BCa bootstrap over documents [{low:+.5f}, {high:+.5f}]"
    if measures.se_tokens is not None and measures.design_effect is not None:
        line += (
            f"; naive per-token SE {measures.se_tokens:.5f}, design effect "
            f"{measures.design_effect:.2f}"
        )
    if measures.se_blocks is not None:
        line += f"; SE within these documents {measures.se_blocks:.5f} (blocks; informational)"
    return [line]


def _top1_line(measures: Measures, top1: Interval) -> str:
    bounds = f" [{top1.low:.2%}, {top1.high:.2%}]" if top1.documents > 1 else ""
    return (
        f"top-1    agreement {top1.delta:.2%}{bounds}; confident flips (p_base > 0.9): "
        f"{measures.flips:,} of {measures.sure:,}"
    )


def _kl_lines(kl: Kl) -> list[str]:
    quantile, low, high = kl.tail
    mean = f"{kl.mean.delta:.5f} nats"
    tail = f"{quantile:.4f}"
    if kl.mean.documents > 1:
        mean += f" [{kl.mean.low:.5f}, {kl.mean.high:.5f}]"
        tail += f" [{low:.4f}, {high:.4f}]"
    lines = [f"KL       mean {mean}, 99.9% quantile {tail} ({kl.kind})"]
    if kl.margin is not None:
        lines.append(f"margin   {kl.margin.nats:.5f} nats of KL ({kl.margin.source})")
    return lines


def _expert_lines(result: GateResult) -> list[str]:
    layers = result.experts
    if not layers:
        engine = result.key.get("activations") == "engine"
        return ["experts  unknown: an engine does not report which were reached"] if engine else []
    total = sum(layer.experts for layer in layers)
    reached = total - sum(len(layer.unreached) for layer in layers)
    noun = "layer" if len(layers) == 1 else "layers"
    lines = [f"experts  {reached:,} of {total:,} reached in {len(layers)} {noun}"]
    missed = [layer for layer in layers if layer.unreached]
    return lines + [_unreached_line(layer) for layer in missed[:MAX_LAYERS]]


def _unreached_line(layer: ExpertReach) -> str:
    numbers = ", ".join(map(str, layer.unreached[:MAX_EXPERTS]))
    more = ", …" if len(layer.unreached) > MAX_EXPERTS else ""
    return (
        f"         not evaluated: {layer.layer} experts {numbers}{more} ({len(layer.unreached)} of "
        f"{layer.experts}); no token of this text reaches them"
    )


def _note_lines(result: GateResult) -> list[str]:
    notes = []
    if result.measures_kl:
        notes.append("the text was sampled from the base: the loss estimates KL(base || candidate)")
    if result.unlike:
        notes.append(
            f"scored in different environments ({'; '.join(result.unlike)}): intervals are widened "
            "by the floor on each side"
        )
    if result.looks is not None and result.looks > 1:
        notes.append(
            f"look {result.looks} at candidates of this base: each one-sided bound is at "
            f"{1 - result.alpha:.4g}"
        )
    straddles = any(loss.status == "open" for loss in result.losses)
    if result.outcome == "inconclusive" and straddles:
        count = f"about {result.needed:,}" if result.needed else "more"
        notes.append(f"the interval straddles the margin; {count} such documents would decide")
    return [f"note     {note}" for note in (*notes, *result.notes)]


def render_run(run: Run, file: str) -> str:
    """Return what was scored, as a few lines of text."""
    header, key = run.header, run.header.key
    floor = "not measured" if header.floor is None else f"{header.floor:.6f} nats"
    lines = [
        f"scored   {header.model}, weights {header.weights_sha256[:16]}…, in "
        f"{header.seconds:.0f} s",
        _corpus_line(key, len(run)),
        f"inputs   activations: {_activations(key)}",
        f"         {_summary(run)}",
        f"floor    {floor}",
    ]
    if header.nonfinite:
        count = len(header.nonfinite)
        noun = counted(count, "document")
        lines.append(f"error    logits are not finite in {noun}; a comparison will fail")
    return _text([*lines, f"wrote    {file}"])


def _summary(run: Run) -> str:
    protocol = run.header.key["protocol"]
    if protocol == "task":
        return f"{len(run) - round(float(run.sums.sum())):,} of {len(run):,} right"
    unit = "words" if protocol == "lm-eval" else "tokens"
    value = perplexity(run.sums.tolist(), run.tokens.tolist())
    return f"{int(run.tokens.sum()):,} {unit}, perplexity {value:.4f}"


def render_json(result: GateResult) -> str:
    """Return the result as one JSON object; numbers that are not finite are null."""
    return json.dumps(result.as_json(), indent=2) + "\n"
