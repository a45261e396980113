# SPDX-License-Identifier: Apache-2.0
"""Results of gates and checks as one HTML page: no script, nothing fetched, light and dark, at most
2 MB.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup

from verifier import __version__
from verifier.evaluation import Drift, ExpertReach, GateResult, Interval, Kl
from verifier.findings import SEVERITIES, Finding, Report
from verifier.report import figures, svg
from verifier.report.figures import Figure, Row
from verifier.schemes import layer_of
from verifier.text import counted, listed, printable

MAX_BYTES = 2_000_000
BYTES_WITHOUT_FIGURES = 200_000
MAX_FINDINGS = 200
MAX_RESULTS = 60
MAX_LAYERS, MAX_EXPERTS = 512, 4096
LARGEST = 1e15
MAX_NAME = 30


def render_page(results: Sequence[GateResult | Report], extra: Sequence[Figure] = ()) -> str:
    """Return the page.

    Pictures are left out from the last one on, and named, where the page would be larger than
    `MAX_BYTES`.

    Args:
        results: of gates and checks.
        extra: further pictures, such as time series and heat maps of weights.
    """
    gates = [result for result in results if isinstance(result, GateResult)][:MAX_RESULTS]
    checks = [result for result in results if isinstance(result, Report)][:MAX_RESULTS]
    pictures = _forest(gates)
    for gate in gates:
        pictures += _figures_of(gate)
    pictures += extra
    template, findings = _template(), MAX_FINDINGS
    dropped: list[str] = []
    while sum(len(f.picture) for f in pictures) > MAX_BYTES - BYTES_WITHOUT_FIGURES:
        dropped.append(pictures.pop().heading)
    while True:
        page = template.render(
            gates=[_gate_section(gate) for gate in gates],
            checks=[_check_section(check, findings) for check in checks],
            version=__version__,
            style=Markup(svg.COLORS + svg.STYLE),  # noqa: S704  (a constant)
            dropped=dropped,
            figures=[(f, Markup(f.picture)) for f in pictures],  # noqa: S704  (our own SVG, escaped)
        )
        if len(page.encode()) <= MAX_BYTES or not (pictures or findings):
            return page + "\n"
        if pictures:
            dropped.append(pictures.pop().heading)
        else:
            findings //= 2


def _template() -> Template:
    file = resources.files("verifier.report") / "templates" / "page.html.j2"
    environment = Environment(
        loader=DictLoader({"page": file.read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    return environment.get_template("page")


def _forest(gates: Sequence[GateResult]) -> list[Figure]:
    names = Counter(map(_name, gates))
    rows = []
    for gate in gates:
        corpus = f", {gate.key.get('corpus', '?')}" if names[_name(gate)] > 1 else ""
        rows += [replace(row, label=row.label + corpus) for row in _rows(gate)]
    if not rows:
        return []
    words = (
        "Loss over the base with its two-sided 90% interval; the upright mark is the margin. "
        "Green: the interval ends before it; red: it begins beyond it; amber: it spans it."
    )
    picture = figures.forest(rows, "nats per token, candidate - base")
    return [Figure("Loss and margin", words, picture)]


def _kl_drift(gate: GateResult) -> str:
    """Return the drift of a gate that is decided by a ratio of KL divergences, '' for another."""
    ratio = gate.drift.kl if gate.drift is not None else None
    if ratio is None:
        return ""
    low, high = math.exp(ratio.interval.low), math.exp(ratio.interval.high)
    return (
        f"{ratio.interval.ratio:.3f} times the accepted run's KL divergence from the base "
        f"[{low:.3f}, {high:.3f}], margin {math.exp(ratio.margin.nats):.4g} times ({ratio.kind})"
    )


def _rows(gate: GateResult) -> list[Row]:
    """Return a row for the loss over the base, and one for the loss over an accepted run where it
    decides the drift.
    """
    name = f"{_name(gate)} (accuracy)" if gate.accuracy else _name(gate)
    rows = []
    if gate.interval is not None:
        rows.append(Row(name, gate.interval, gate.margin.nats, gate.outcome))
    if (drift := gate.drift) is not None and drift.kl is None:
        verdict = _verdict(drift.interval, drift.margin.nats)
        rows.append(Row(f"drift of {name}", drift.interval, drift.margin.nats, verdict))
    return [row for row in rows if _drawable(row.interval)]


def _verdict(interval: Interval, margin: float) -> str:
    if interval.low <= margin < interval.high:
        return "inconclusive"
    return "passed" if interval.high <= margin else "failed"


def _drawable(interval: Interval) -> bool:
    return all(abs(end) < LARGEST for end in (interval.delta, interval.low, interval.high))


def _name(gate: GateResult) -> str:
    uri = gate.candidate.rstrip("/")
    return uri.rpartition("/")[2] or uri


def _figures_of(gate: GateResult) -> list[Figure]:
    made = []
    if deltas := _deltas(gate):
        made.append(_documents_figure(gate, deltas))
    if gate.experts:
        words = "Experts that this text reaches (1). One that no token reaches was not evaluated."
        cells, unit = _cells(gate.experts), "reached (1) or not (0)"
        picture = figures.heat(cells, "Experts by layer", unit, ends=(0, 1))
        made.append(Figure(f"Experts of {_name(gate)}", words, picture))
    return made


def _deltas(gate: GateResult) -> list[tuple[str, float]]:
    """Return the loss of each document per token, by the document's name."""
    deltas = [
        (f"document {number}", (candidate - base) / tokens)
        for number, (base, candidate, tokens) in enumerate(gate.documents)
        if tokens > 0
    ]
    return [(name, delta) for name, delta in deltas if abs(delta) < LARGEST]


def _documents_figure(gate: GateResult, deltas: Sequence[tuple[str, float]]) -> Figure:
    # Without an interval there is no mean loss: logits were not finite.
    mean = gate.interval.delta if gate.interval is not None else math.nan
    worst = sorted(deltas, key=lambda item: -item[1])[: figures.worst_of(deltas)]
    table = (
        ("document", "nats per token", "times the mean"),
        *((name, f"{v:+.5f}", f"{v / mean:.1f}" if mean else "") for name, v in worst),
    )
    words = (
        "Per-document Δloss (candidate - base), the largest in amber with their numbers. A "
        "damaged expert can show as a few documents far above the rest."
    )
    return Figure(f"Documents of {_name(gate)}", words, figures.documents(deltas, mean), table)


def _cells(layers: Sequence[ExpertReach]) -> dict[tuple[str, str], float]:
    """Return 1 for each expert that was reached and 0 for the others, by (layer, expert)."""
    cells: dict[tuple[str, str], float] = {}
    shown = layers[:MAX_LAYERS]
    numbers = {layer_of(layer.layer) for layer in shown}
    numbered = None not in numbers and len(numbers) == len(shown)
    for layer in shown:
        name = f"layer {layer_of(layer.layer)}" if numbered else _tail(layer.layer)
        unreached = set(layer.unreached)
        for expert in range(min(layer.experts, MAX_EXPERTS)):
            cells[name, str(expert)] = float(expert not in unreached)
    return cells


def _tail(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"…{name[1 - MAX_NAME :]}"


def _gate_section(gate: GateResult) -> dict[str, Any]:
    key, unit = gate.key, "of accuracy" if gate.accuracy else "nats"
    facts = [
        ("corpus", f"{key.get('corpus', '?')}, {key.get('documents', '?')} documents"),
        ("protocol", f"{key.get('protocol', '?')}, seq-len {key.get('window', '?')}"),
        ("activations", str(key.get("activations", "bf16"))),
        ("margin", f"{gate.margin.nats:.3g} {unit} ({gate.margin.source})"),
        _score_fact(gate),
    ]
    if gate.interval is not None:
        facts.append(
            ("accuracy lost" if gate.accuracy else "Δloss", _loss_fact(gate.interval, gate.unit))
        )
    if gate.measures.kl is not None:
        facts.append(("KL", _kl(gate.measures.kl)))
    if (top1 := gate.measures.top1) is not None:
        bounds = f"[{top1.low:.2%}, {top1.high:.2%}]"
        facts.append(("top-1 agreement", f"{top1.delta:.2%} {bounds}"))
    if gate.nonfinite:
        documents = counted(len(gate.nonfinite), "document")
        owner = "the base's " if gate.nonfinite_base else ""
        facts.append(("not finite", f"{owner}logits in {documents}; no statistics"))
    if gate.drift is not None:
        facts.append(("drift", _kl_drift(gate) or _loss_drift(gate.drift, unit)))
    facts += [("doubt", doubt) for doubt in gate.doubts]
    facts += [("note", note) for note in gate.notes[:20]]
    environment = [f"{name} {value}" for name, value in gate.environment.items()]
    facts.append(("environment", ", ".join(environment)))
    return {
        "name": gate.candidate,
        "base": gate.base,
        "verdict": gate.outcome,
        "drift": _drift_verdict(gate),
        "facts": facts,
    }


def _drift_verdict(gate: GateResult) -> str:
    """Return the verdict over a record that the gate itself was not decided by, '' for none."""
    drift = gate.drift
    if drift is None or drift.kl is not None:
        return ""
    return _verdict(drift.interval, drift.margin.nats)


def _loss_drift(drift: Drift, unit: str) -> str:
    loss, verdict = drift.interval, _verdict(drift.interval, drift.margin.nats)
    return (
        f"{loss.delta:+.5f} [{loss.low:+.5f}, {loss.high:+.5f}] {unit} over the accepted record, "
        f"margin {drift.margin.nats:.3g}: {verdict}"
    )


def _score_fact(gate: GateResult) -> tuple[str, str]:
    if (right := gate.accuracy) is not None:
        return (
            "right answers",
            f"base {right.base:,}, candidate {right.candidate:,}; by one alone {right.lost:,} and "
            f"{right.won:,}",
        )
    base, candidate = _number(gate.perplexity_base), _number(gate.perplexity_candidate)
    return "perplexity", f"base {base}, candidate {candidate}"


def _loss_fact(loss: Interval, unit: str) -> str:
    """Return the loss over the base, which the margin decides, with its interval."""
    return f"{loss.delta:+.5f} [{loss.low:+.5f}, {loss.high:+.5f}] {unit}, candidate - base"


def _number(value: float) -> str:
    return f"{value:,.4f}" if math.isfinite(value) else "?"


def _kl(kl: Kl) -> str:
    mean = f"mean {kl.mean.delta:.5f} [{kl.mean.low:.5f}, {kl.mean.high:.5f}]"
    margin = f", margin {kl.margin.nats:.3g}" if kl.margin is not None else ""
    return f"{mean}{margin}, 99.9% quantile {_number(kl.tail[0])} nats ({kl.kind})"


def _check_section(check: Report, limit: int) -> dict[str, Any]:
    findings = sorted(
        check.findings, key=lambda f: (f.standing == "known", SEVERITIES.index(f.severity))
    )
    contents = check.summary.contents
    formats = contents.formats if contents else {}
    return {
        "name": check.uri,
        "verdict": check.verdict,
        "rows": [_finding_row(finding) for finding in findings[:limit]],
        "unshown": max(0, len(findings) - limit),
        "ran": sum(covered.ran for covered in check.coverage),
        "tensors": contents.tensors if contents else "?",
        "formats": listed([f"{count} {name}" for name, count in formats.items()]),
    }


def _finding_row(finding: Finding) -> tuple[str, str, str, str, str]:
    of = f" of {finding.of:,}" if finding.of is not None and finding.of > 1 else ""
    place = finding.where.tensor or finding.where.file or ""
    count = f"{finding.count:,}{of}"
    return finding.severity, finding.rule, finding.message, count, place
