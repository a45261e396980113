# SPDX-License-Identifier: Apache-2.0
"""The report as JSON; its schema is ``schemas/report-2.0.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from importlib import resources
from typing import Any

from verifier.findings import SCHEMA_VERSION, Report


def render_json(report: Report) -> str:
    """Return the report as one JSON object, two-space indented, with a final newline."""
    value = {"schema_version": SCHEMA_VERSION, **asdict(report)}
    for shown, finding in zip(value["findings"], report.findings, strict=True):
        shown["effects"] = {
            e.engine: {"severity": e.severity, "what": e.what} for e in finding.effects
        }
    return json.dumps(value, indent=2, ensure_ascii=True, allow_nan=False) + "\n"


def schema() -> dict[str, Any]:
    """Return the JSON schema of the report."""
    text = (
        resources.files(__name__.rpartition(".")[0]) / "schemas" / f"report-{SCHEMA_VERSION}.json"
    ).read_text(encoding="utf-8")
    value: dict[str, Any] = json.loads(text)
    return value
