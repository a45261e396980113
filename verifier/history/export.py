# SPDX-License-Identifier: Apache-2.0
"""A history for other tools: Bencher's metric format, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from verifier.history.record import Record

FORMATS = ("bmf", "csv", "json")
MAX_BENCHMARK = 1024
_FIELDS = (
    "id",
    "time",
    "kind",
    "name",
    "label",
    "verdict",
    "commit",
    "measure",
    "value",
    "low",
    "high",
    "se",
    "margin",
)


def export(records: Sequence[Record], to: str) -> str:
    """Return records as ``bmf``, ``csv`` (a row a measure) or ``json`` (a list)."""
    if to == "bmf":
        return to_bmf(records)
    return (
        to_csv(records)
        if to == "csv"
        else json.dumps([r.model_dump() for r in records], indent=2) + "\n"
    )


def to_bmf(records: Sequence[Record]) -> str:
    """Return Bencher Metric Format (bencher.dev/docs/reference/bencher-metric-format): the last run
    of each series.

    A benchmark of Bencher has one value a measure, so that a run is exported when it was made;
    names are cut to the 1024 characters that Bencher takes. Series of one name are told apart by
    their digest.
    """
    last = {r.series: r for r in records if r.kind != "golden"}
    names = [r.name for r in last.values()]
    found: dict[str, dict[str, dict[str, float]]] = {}
    for series, r in last.items():
        name = f"{r.kind} {r.name}" + (f" {series}" if names.count(r.name) > 1 else "")
        found[name[:MAX_BENCHMARK]] = {
            n.replace("_", "-"): {"value": m.value}
            | ({"lower_value": m.low} if m.low is not None else {})
            | ({"upper_value": m.high} if m.high is not None else {})
            for n, m in r.measures.items()
        }
    return json.dumps(found, indent=2) + "\n"


def to_csv(records: Sequence[Record]) -> str:
    """Return one row for each measure of each run; texts that a spreadsheet would run as a formula
    get a quote before.
    """
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(_FIELDS)
    for r in records:
        told = [_plain(str(getattr(r, f))) for f in _FIELDS[:7]]
        for name, m in r.measures.items():
            rows.writerow(
                [
                    *told,
                    name,
                    *(
                        "" if v is None else repr(v)
                        for v in (m.value, m.low, m.high, m.se, m.margin)
                    ),
                ]
            )
    return out.getvalue()


def _plain(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
