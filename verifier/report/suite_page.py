# SPDX-License-Identifier: Apache-2.0
"""The result of a suite as one HTML page: no script, nothing fetched, light and dark."""

from __future__ import annotations

import math
from importlib import resources

from jinja2 import DictLoader, Environment, StrictUndefined
from markupsafe import Markup

from verifier.evaluation import Interval
from verifier.gate.suite.render import table_of
from verifier.gate.suite.result import Criterion, EntryResult, SuiteResult
from verifier.report import figures, svg
from verifier.report.figures import Figure, Row
from verifier.text import printable

_TITLES = {
    "loss": ("Loss", "nats per token, or share of right answers; candidate - base"),
    "KL": ("KL divergence from the base", "nats per token"),
    "length": ("Length of completions", "logarithm of the ratio of tokens, candidate / base"),
}


def render_suite_page(result: SuiteResult) -> str:
    """Return the page: the verdict, the table, the reasons, a picture for each measure that
    decides, and what identifies the run.
    """
    file = resources.files("verifier.report") / "templates" / "suite.html.j2"
    environment = Environment(
        loader=DictLoader({"suite": file.read_text(encoding="utf-8")}),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["printable"] = printable
    headings, *rows = table_of(result)
    return (
        environment.get_template("suite").render(
            result=result,
            headings=headings,
            rows=rows,
            pictures=[
                (f, Markup(f.picture))  # noqa: S704  (our own SVG, escaped)
                for f in map(lambda m: _picture(result, m), _TITLES)
                if f is not None
            ],
            style=Markup(svg.COLORS + svg.STYLE),  # noqa: S704  (a constant)
            level=f"{100 - 200 * result.alpha:.4g}%",
        )
        + "\n"
    )


def _picture(result: SuiteResult, measure: str) -> Figure | None:
    """Return the intervals and margins of one measure, None where no entry has it."""
    rows = [
        Row(entry.name, criterion.interval, criterion.margin.nats, _verdict(criterion))
        for entry in result.entries
        for criterion in _drawable(entry)
        if criterion.measure == measure
    ]
    if not rows:
        return None
    title, unit = _TITLES[measure]
    words = (
        "Each entry with its interval; the upright mark is the margin. Green: the interval ends "
        "before it; red: it is shown to be beyond it; amber: open."
    )
    return Figure(title, words, figures.forest(rows, unit))


def _drawable(entry: EntryResult) -> list[Criterion]:
    return [criterion for criterion in entry.criteria if _finite(criterion.interval)]


def _finite(interval: Interval) -> bool:
    return all(map(math.isfinite, (interval.delta, interval.low, interval.high)))


def _verdict(criterion: Criterion) -> str:
    return {"within": "passed", "beyond": "failed"}.get(criterion.status, "inconclusive")
