# SPDX-License-Identifier: Apache-2.0
"""The report as JSON; its schema is ``schemas/report-2.0.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from verifier.findings import SCHEMA_VERSION, Finding, Report
from verifier.inspect.names import gathered


def render_json(report: Report) -> str:
    """Return the report as one JSON object, two-space indented, with a final newline."""
    return json.dumps(report_value(report), indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def report_value(report: Report) -> dict[str, Any]:
    """Return the report as JSON values."""
    return {
        "schema_version": SCHEMA_VERSION,
        "verdict": report.verdict,
        "uri": report.uri,
        "base": report.base,
        "findings": [_finding(f) for f in report.findings],
        "coverage": [asdict(c) for c in report.coverage],
        "stats": report.summary.as_json(),
    }


def _finding(finding: Finding) -> dict[str, Any]:
    effects = {e.engine: {"severity": e.severity, "what": e.what} for e in finding.effects}
    places = [names.label for names in gathered(finding.places)]
    value = {**asdict(finding), "effects": effects, "places": places}
    return value if places else {k: v for k, v in value.items() if k != "places"}


def schema() -> dict[str, Any]:
    """Return the JSON schema of the report."""
    text = (
        resources.files(__name__.rpartition(".")[0]) / "schemas" / f"report-{SCHEMA_VERSION}.json"
    ).read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text)
    return value
