# SPDX-License-Identifier: Apache-2.0
"""A history for other tools: Bencher's metric format, CSV, JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence

from verifier.history.record import Measure, Record

FORMATS = ("bmf", "csv", "json")
MAX_BENCHMARK = 1024
_RUN_FIELDS = ("id", "time", "kind", "name", "label", "verdict", "commit")
_MEASURE_FIELDS = ("value", "low", "high", "se", "margin")


def export(records: Sequence[Record], to: str) -> str:
    """Return records as ``bmf``, ``csv`` (one row per measure) or ``json`` (a list)."""
    if to == "bmf":
        return to_bmf(records)
    if to == "csv":
        return to_csv(records)
    return json.dumps([record.model_dump() for record in records], indent=2) + "\n"


def to_bmf(records: Sequence[Record]) -> str:
    """Return the last run of each series in Bencher Metric Format
    (bencher.dev/docs/reference/bencher-metric-format).

    A benchmark of Bencher has one value per measure, so a run is exported after it was made. Names
    are cut to the 1024 characters that Bencher takes; series with the same name are distinguished
    by their digest.
    """
    last = {record.series: record for record in records if record.kind != "golden"}
    names = [record.name for record in last.values()]
    benchmarks: dict[str, dict[str, dict[str, float]]] = {}
    for series, record in last.items():
        suffix = f" {series}" if names.count(record.name) > 1 else ""
        benchmark = f"{record.kind} {record.name}{suffix}"[:MAX_BENCHMARK]
        benchmarks[benchmark] = {
            name.replace("_", "-"): _bmf(measure) for name, measure in record.measures.items()
        }
    return json.dumps(benchmarks, indent=2) + "\n"


def _bmf(measure: Measure) -> dict[str, float]:
    fields = {"value": measure.value}
    if measure.low is not None:
        fields["lower_value"] = measure.low
    if measure.high is not None:
        fields["upper_value"] = measure.high
    return fields


def to_csv(records: Sequence[Record]) -> str:
    """Return one row for each measure of each run; text that a spreadsheet would run as a formula
    gets a leading quote.
    """
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow((*_RUN_FIELDS, "measure", *_MEASURE_FIELDS))
    for record in records:
        run = [_plain(str(getattr(record, field))) for field in _RUN_FIELDS]
        for name, measure in record.measures.items():
            values = [getattr(measure, field) for field in _MEASURE_FIELDS]
            rows.writerow([*run, name, *("" if v is None else repr(v) for v in values)])
    return out.getvalue()


def _plain(text: str) -> str:
    return f"'{text}" if text[:1] in ("=", "+", "-", "@", "\t", "\r") else text
