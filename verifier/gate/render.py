# SPDX-License-Identifier: Apache-2.0
"""A gate's result for a person, and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

from verifier.gate.run import GateResult

_VERDICT = {"passed": "passed", "failed": "failed", "inconclusive": "unproven"}


def render_text(result: GateResult) -> str:
    """Return the result in some lines, the verdict last."""
    key = result.key
    unit = "word" if key["protocol"] == "lm-eval" else "token"
    lines = [
        f"gate     {result.candidate} against {result.base}",
        f"corpus   {key['corpus']}: {key['documents']} documents, protocol {key['protocol']}, window {key['window']}",
    ]
    i = result.interval
    if i is None:
        shown = ", ".join(map(str, result.nonfinite[:5]))
        lines.append(f"error    logits that are not finite in {len(result.nonfinite)} documents ({shown}); no statistics")
    else:
        lines += [
            f"base     {unit} perplexity {result.perplexity_base:.4f}   ({i.tokens:,} {unit}s)",
            f"cand     {unit} perplexity {result.perplexity_candidate:.4f}",
            f"loss     {i.delta:+.5f} nats a {unit} ({math.expm1(i.delta):+.2%} of perplexity), 90% interval "
            f"[{i.low:+.5f}, {i.high:+.5f}], standard error {i.se:.5f} over {i.documents} documents",
            f"margin   {result.margin.nats:.5f} nats ({result.margin.source})",
        ]
        if result.measures_kl:
            lines.append("note     the text was sampled from the base: the loss estimates KL(base || candidate)")
        if result.outcome == "inconclusive":
            count = f"about {result.needed:,}" if result.needed else "more"
            need = f"{count} documents like these would decide"
            lines.append(f"note     the interval holds the margin; {need}")
    lines.append(f"verdict: {result.outcome.upper()}")
    return "\n".join(lines) + "\n"


def render_json(result: GateResult) -> str:
    """Return the result as one JSON object; numbers that do not exist are null."""
    value = {"schema_version": "1.0", "verdict": _VERDICT[result.outcome], **asdict(result)}
    return json.dumps(_finite(value), indent=2) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
