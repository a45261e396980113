# SPDX-License-Identifier: Apache-2.0
"""A gate's result for a person, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from verifier.gate.result import GateResult
from verifier.gate.run_file import Run
from verifier.gate.scorers.transformers import perplexity
from verifier.gate.statistics import Interval
from verifier.text import printable

_ACTIVATIONS = {
    "bf16": "bf16: the weights alone are judged",
    "declared": "declared: rounded as each checkpoint declares",
    "engine": "as the engine has them",
}


def render_text(result: GateResult) -> str:
    """Return the result in some lines, the verdict last."""
    key = result.key
    unit = "word" if key["protocol"] == "lm-eval" else "token"
    nats = "nats" if result.accuracy is None else "of accuracy"
    lines = [
        f"gate     {result.candidate} against {result.base}",
        f"corpus   {key['corpus']}: {key['documents']} documents, protocol {key['protocol']}, window {key['window']}",
        f"inputs   activations {_inputs(key)}",
    ]
    i = result.interval
    if i is None:
        shown = ", ".join(map(str, result.nonfinite[:5]))
        lines.append(
            f"error    logits that are not finite in {len(result.nonfinite)} documents ({shown}); no statistics"
        )
    else:
        lines += (
            _of_task(result, i)
            if result.accuracy is not None
            else [
                f"base     {unit} perplexity {result.perplexity_base:.4f}   ({i.tokens:,} {unit}s)",
                f"cand     {unit} perplexity {result.perplexity_candidate:.4f}",
                f"loss     {i.delta:+.5f} nats a {unit} ({math.expm1(i.delta):+.2%} of perplexity), {_shown(i, result.looks)}, "
                f"standard error {i.se:.5f} over {i.documents} documents",
            ]
        )
        lines.append(f"margin   {result.margin.nats:.5f} {nats} ({result.margin.source})")
        if (d := result.drift) is not None:
            lines += [
                f"drift    {d.interval.delta:+.5f} {result.unit} against {d.accepted}, {_shown(d.interval, result.looks)}",
                f"margin   {d.margin.nats:.5f} {nats} of drift ({d.margin.source})",
            ]
        lines += _measures(result) + _notes(result)
    lines.append(f"verdict: {result.outcome.upper()}")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def _of_task(result: GateResult, interval: Interval) -> list[str]:
    a, count = result.accuracy, interval.documents
    if a is None:
        return []
    return [
        f"base     accuracy {a.base / count:.4f}   ({a.base:,} of {count:,})",
        f"cand     accuracy {a.candidate / count:.4f}   ({a.candidate:,} of {count:,})",
        f"loss     {interval.delta:+.5f} of accuracy, exact {_shown(interval, result.looks)}",
        f"McNemar  {a.lost:,} right by the base alone, {a.won:,} by the candidate alone; exact p of no loss {a.p_value:.4g}",
    ]


def _inputs(key: Mapping[str, Any]) -> str:
    name = str(key.get("activations", "bf16"))
    return _ACTIVATIONS.get(name, name)


def _shown(interval: Interval, looks: int) -> str:
    return f"{100 - 10 / looks:.4g}% interval [{interval.low:+.5f}, {interval.high:+.5f}]"


def _measures(result: GateResult) -> list[str]:
    m, lines = result.measures, []
    if result.accuracy is not None:
        return []
    if m.bootstrap is not None:
        lines.append(
            f"errors   bootstrap of documents (BCa) [{m.bootstrap[0]:+.5f}, {m.bootstrap[1]:+.5f}]"
        )
        if m.se_tokens is not None and m.design_effect is not None:
            lines[-1] += (
                f"; token by token a standard error of {m.se_tokens:.5f}, design effect {m.design_effect:.2f}"
            )
        if m.se_blocks is not None:
            lines[-1] += f"; within these documents {m.se_blocks:.5f} (blocks; decides nothing)"
    if m.kl is not None:
        q, low, high = m.kl.tail
        lines.append(
            f"KL       mean {m.kl.mean.delta:.5f} nats [{m.kl.mean.low:.5f}, {m.kl.mean.high:.5f}], 99.9 % quantile {q:.4f} "
            f"[{low:.4f}, {high:.4f}] ({m.kl.kind})"
        )
    if m.top1 is not None:
        lines.append(
            f"top-1    the same for {m.top1.delta:.2%} [{m.top1.low:.2%}, {m.top1.high:.2%}]; another where the base was "
            f"sure (p > 0.9): {m.flips:,} of {m.sure:,}"
        )
    if m.worst is not None:
        lines.append(
            f"worst    document {m.worst[0]}: {m.worst[1]:+.5f} nats, bound {m.worst[2]:+.5f}"
        )
    if result.experts:
        reached = sum(e.experts - len(e.unreached) for e in result.experts)
        total = sum(e.experts for e in result.experts)
        lines.append(f"experts  {reached:,} of {total:,} reached in {len(result.experts)} layers")
        lines += [
            f"         not judged: {e.layer} experts {', '.join(map(str, e.unreached[:16]))}"
            f"{' …' if len(e.unreached) > 16 else ''} ({len(e.unreached)} of {e.experts}); this text does not reach them"
            for e in [e for e in result.experts if e.unreached][:8]
        ]
    if not result.experts and result.key.get("activations") == "engine":
        lines.append("experts  which ones the text reached is not known through an engine")
    floor = "not measured" if result.floor is None else f"{result.floor:.6f} nats"
    return [*lines, f"floor    {floor}"]


def _notes(result: GateResult) -> list[str]:
    lines = []
    if result.measures_kl:
        lines.append(
            "note     the text was sampled from the base: the loss estimates KL(base || candidate)"
        )
    if result.unlike:
        lines.append(
            f"note     scored in unlike environments ({'; '.join(result.unlike)}): intervals are "
            "widened by the floor on each side"
        )
    if result.looks > 1:
        lines.append(
            f"note     look {result.looks} at this pair: each one-sided bound is at {1 - 0.05 / result.looks:.4g}"
        )
    if result.outcome == "inconclusive":
        count = f"about {result.needed:,}" if result.needed else "more"
        need = f"{count} documents like these would decide"
        lines.append(f"note     the interval holds the margin; {need}")
    return lines + [f"note     {n}" for n in result.notes]


def render_run(run: Run, file: str) -> str:
    """Return what was scored, in some lines."""
    h, key = run.header, run.header.key
    unit = "words" if key["protocol"] == "lm-eval" else "tokens"
    found = f"{int(run.tokens.sum()):,} {unit}, perplexity {perplexity(run.sums.tolist(), run.tokens.tolist()):.4f}"
    if key["protocol"] == "task":
        found = f"{len(run) - round(float(run.sums.sum())):,} of {len(run):,} right"
    lines = [
        f"scored   {h.model}, weights {h.weights_sha256[:16]}…, in {h.seconds:.0f} s",
        f"corpus   {key['corpus']}: {len(run)} documents, protocol {key['protocol']}, window {key['window']}",
        f"inputs   activations {_inputs(key)}",
        f"         {found}",
        f"floor    {'not measured' if h.floor is None else f'{h.floor:.6f} nats'}",
    ]
    if h.nonfinite:
        lines.append(
            f"error    logits that are not finite in {len(h.nonfinite)} documents; a comparison will fail"
        )
    lines.append(f"wrote    {file}")
    return "".join(printable(line, 2000) + "\n" for line in lines)


def render_json(result: GateResult) -> str:
    """Return the result as one JSON object; numbers that do not exist are null."""
    value = {"schema_version": "1.1", "verdict": result.outcome, **asdict(result)}
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
