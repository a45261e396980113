# SPDX-License-Identifier: Apache-2.0
"""Runs of gates and checks as one HTML page: no script, nothing fetched, light and dark, at most 2
MB.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from verifier import __version__
from verifier.findings import EXIT_OF_VERDICT, current_verdict
from verifier.report import figures, svg
from verifier.report.figures import Row
from verifier.text import printable

MAX_BYTES = 2_000_000
MAX_FINDINGS = 200
MAX_RUNS = 60


@dataclass(frozen=True)
class Figure:
    """A picture with its heading, what it shows in words, and a table beside it."""

    heading: str
    words: str
    picture: str
    table: tuple[tuple[str, ...], ...] = ()


def render_runs(runs: Sequence[Mapping[str, Any]], extra: Sequence[Figure] = ()) -> str:
    """Return the page.

    Args:
        runs: JSON objects that `gate --format json` or `check --format json` printed; unknown
            fields are passed over, and what a run does not have is left out.
        extra: further pictures, such as time series and heat maps of weights.

    Pictures are dropped from the last on, and named, where the page would be larger than
    `MAX_BYTES`.
    """
    gates = [r for r in runs if "candidate" in r][:MAX_RUNS]
    checks = [r for r in runs if "candidate" not in r][:MAX_RUNS]
    shown = [*_forest(gates), *(f for g in gates for f in _of_gate(g)), *extra]
    source = (
        resources.files(__name__.rpartition(".")[0]) / "templates" / "runs.html.j2"
    ).read_text(encoding="utf-8")
    environment = Environment(
        loader=DictLoader({"runs": source}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    template = environment.get_template("runs")
    dropped: list[str] = []
    while sum(len(f.picture) for f in shown) > MAX_BYTES - 200_000:
        dropped.append(shown.pop().heading)
    findings = MAX_FINDINGS
    while True:
        page = template.render(
            gates=[_gate(g) for g in gates],
            checks=[_check(c, findings) for c in checks],
            version=__version__,
            style=Markup(svg.COLORS + svg.STYLE),  # noqa: S704  (a constant)
            dropped=dropped,
            figures=[(f, Markup(f.picture)) for f in shown],  # noqa: S704  (our own SVG; its texts are escaped there)
        )
        if len(page.encode()) <= MAX_BYTES or not (shown or findings):
            return page + "\n"
        if shown:
            dropped.append(shown.pop().heading)
        else:
            findings //= 2


def _forest(gates: Sequence[Mapping[str, Any]]) -> list[Figure]:
    rows = []
    for g in gates:
        name = f"{_name(g)} (accuracy)" if _dict(g.get("accuracy")) else _name(g)
        for what, part, verdict in (("", g, _verdict(g)), ("drift of ", _dict(g.get("drift")), "")):
            i = _dict(part.get("interval"))
            value, low, high = (_number(i.get(k)) for k in ("delta", "low", "high"))
            margin = _number(_dict(part.get("margin")).get("nats"))
            if value is not None and low is not None and high is not None:
                rows.append(
                    Row(what + name, value, low, high, margin, verdict or _held(low, high, margin))
                )
    if not rows:
        return []
    words = "Loss over the base with its two-sided 90 % interval; the red mark is the margin. Green is shown to be within."
    return [
        Figure("Loss and margin", words, figures.forest(rows, "nats a token, candidate - base"))
    ]


def _of_gate(g: Mapping[str, Any]) -> list[Figure]:
    found = []
    name, interval = _name(g), _dict(g.get("interval"))
    mean = _number(interval.get("delta"))
    deltas = _deltas(g)
    if deltas and mean is not None:
        worst = sorted(deltas, key=lambda d: -d[1])[: figures.WORST]
        table = (
            ("document", "nats a token", "times the mean"),
            *((n, f"{v:+.5f}", f"{v / mean:.1f}" if mean else "") for n, v in worst),
        )
        words = "Candidate less base, a bar a document. A damaged expert can show as a few documents far above the rest."
        found.append(Figure(f"Documents of {name}", words, figures.documents(deltas, mean), table))
    kl = _dict(_dict(g.get("measures")).get("kl"))
    curves = _curves(kl.get("survival"))
    if curves:
        words = f"How often a token's divergence is above a value ({kl.get('kind', '')})."
        found.append(Figure(f"KL divergence of {name}", words, figures.survival(curves)))
    cells, unit = _experts(g)
    if cells:
        words = "Experts that this text reaches; one that no token reaches was not judged."
        found.append(
            Figure(f"Experts of {name}", words, figures.heat(cells, "Experts by layer", unit))
        )
    return found


def _experts(g: Mapping[str, Any]) -> tuple[dict[tuple[str, str], float], str]:
    """Return tokens by (layer, expert), or 1 and 0 where a run tells only which experts were not
    reached; and the unit.
    """
    cells: dict[tuple[str, str], float] = {}
    unit = "tokens"
    for e in map(_dict, _list(g.get("experts"))[:512]):
        layer, tokens, count = (
            str(e.get("layer"))[:60],
            _list(e.get("tokens"))[:4096],
            e.get("experts"),
        )
        if not tokens and isinstance(count, int) and "unreached" in e:
            missed = {n for n in _list(e["unreached"]) if isinstance(n, int)}
            tokens, unit = (
                [int(n not in missed) for n in range(min(count, 4096))],
                "reached (1) or not (0)",
            )
        cells |= {(layer, str(n)): float(v) for n, v in enumerate(tokens) if _number(v) is not None}
    return cells, unit


def _deltas(g: Mapping[str, Any]) -> list[tuple[str, float]]:
    found = []
    for i, d in enumerate(_list(g.get("documents"))):
        if (
            isinstance(d, list)
            and len(d) == 3
            and all(_number(v) is not None for v in d)
            and d[2] > 0
        ):
            found.append((f"document {i}", (d[1] - d[0]) / d[2]))
    return found


def _curves(value: object) -> dict[str, list[tuple[float, float]]]:
    """Return the survival curves of a run: name -> pairs of (nats, share of tokens above)."""
    curves = value if isinstance(value, dict) else {"candidate": value}
    found = {}
    for name, curve in curves.items():
        pairs = [
            (float(p[0]), float(p[1]))
            for p in _list(curve)[:5000]
            if isinstance(p, list) and len(p) == 2 and all(_number(v) is not None for v in p)
        ]
        if pairs:
            found[str(name)[:40]] = pairs
    return found


def _gate(g: Mapping[str, Any]) -> dict[str, Any]:
    more, key = _dict(g.get("measures")), _dict(g.get("key"))
    kl, top1 = _dict(more.get("kl")), _dict(more.get("top1"))
    right = _dict(g.get("accuracy"))
    unit = "of accuracy" if right else "nats"
    facts = [
        ("corpus", f"{key.get('corpus', '?')}, {key.get('documents', '?')} documents"),
        ("protocol", f"{key.get('protocol', '?')}, window {key.get('window', '?')}"),
        ("activations", str(key.get("activations", "bf16"))),
        (
            "margin",
            f"{_shown(_dict(g.get('margin')).get('nats'))} {unit} ({_dict(g.get('margin')).get('source', '')})",
        ),
        (
            (
                "right answers",
                f"base {_shown(right.get('base'))}, candidate {_shown(right.get('candidate'))}; by one alone "
                f"{_shown(right.get('lost'))} and {_shown(right.get('won'))}",
            )
            if right
            else (
                "perplexity",
                f"base {_shown(g.get('perplexity_base'))}, candidate {_shown(g.get('perplexity_candidate'))}",
            )
        ),
    ]
    if kl:
        mean, tail = _dict(kl.get("mean")), _list(kl.get("tail"))
        facts.append(
            (
                "KL",
                f"mean {_shown(mean.get('delta'))} [{_shown(mean.get('low'))}, {_shown(mean.get('high'))}], 99.9 % "
                f"quantile {_shown(tail[0]) if tail else '?'} nats ({kl.get('kind', '')})",
            )
        )
    if top1:
        facts.append(
            (
                "same top-1",
                f"{_shown(top1.get('delta'))} [{_shown(top1.get('low'))}, {_shown(top1.get('high'))}]",
            )
        )
    bad = _list(g.get("nonfinite"))
    if bad:
        facts.append(("not finite", f"logits in {len(bad)} documents; no statistics"))
    facts += [("note", str(n)) for n in _list(g.get("notes"))[:20]]
    facts += [
        ("environment", ", ".join(f"{k} {v}" for k, v in _dict(g.get("environment")).items()))
    ]
    return {
        "name": str(g["candidate"]),
        "base": str(g.get("base", "")),
        "verdict": _verdict(g),
        "facts": facts,
    }


def _check(c: Mapping[str, Any], limit: int) -> dict[str, Any]:
    order = {"error": 0, "warning": 1, "info": 2}
    findings = [_dict(f) for f in _list(c.get("findings"))]
    findings.sort(
        key=lambda f: (f.get("standing") == "known", order.get(str(f.get("severity")), 3))
    )
    rows = []
    for f in findings[:limit]:
        where = _dict(f.get("where"))
        of = f" of {f['of']:,}" if isinstance(f.get("of"), int) and f["of"] > 1 else ""
        count = f"{f['count']:,}{of}" if isinstance(f.get("count"), int) else ""
        severity = str(f.get("severity")) if f.get("severity") in order else "info"
        rows.append(
            (
                severity,
                str(f.get("rule", "")),
                str(f.get("message", "")),
                count,
                str(where.get("tensor") or where.get("file") or ""),
            )
        )
    stats = _dict(c.get("stats"))
    formats = ", ".join(f"{n} {a}" for a, n in _dict(stats.get("formats")).items())
    ran = sum(bool(_dict(r).get("ran")) for r in _list(c.get("coverage")))
    return {
        "name": str(c.get("uri", "")),
        "verdict": _verdict(c),
        "rows": rows,
        "unshown": max(0, len(findings) - limit),
        "ran": ran,
        "tensors": stats.get("tensors", "?"),
        "formats": formats,
    }


def _name(g: Mapping[str, Any]) -> str:
    uri = str(g.get("candidate", "")).rstrip("/")
    return uri.rpartition("/")[2] or uri


def _verdict(run: Mapping[str, Any]) -> str:
    verdict = current_verdict(run.get("verdict"))
    return str(verdict) if verdict in EXIT_OF_VERDICT else "inconclusive"


def _held(low: float, high: float, margin: float | None) -> str:
    if margin is None or low <= margin < high:
        return "inconclusive"
    return "passed" if high <= margin else "failed"


def _shown(value: object) -> str:
    found = _number(value)
    return f"{found:.6g}" if found is not None else "?"


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        found = float(value)
    except OverflowError:
        return None
    return found if math.isfinite(found) and abs(found) < 1e15 else None


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
