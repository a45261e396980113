# SPDX-License-Identifier: Apache-2.0
"""The report as SARIF 2.1.0.

A tensor has no lines: its name is a logical location, and the physical one is the file that holds
it (the config or the index where none does), relative to the checkpoint that the user named.
``partialFingerprints`` are those of the baseline.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import quote

from verifier import __version__
from verifier.findings import FINGERPRINT_VERSION, Finding, Report
from verifier.report.wording import (
    amount,
    location,
    observation,
    reason,
    remarks,
    verdict_line,
    worst_first,
)
from verifier.text import printable

SCHEMA = (
    "https://docs.oasis-open.org/sarif/sarif/v2.1.0/errata01/os/schemas/sarif-schema-2.1.0.json"
)
ROOT = "CHECKPOINT"
_LEVEL = {"error": "error", "warning": "warning", "info": "note"}
_LINK = re.compile(r"\[(?=[^\]]*\]\()")


def render_sarif(report: Report) -> str:
    """Return a SARIF log of one run, two-space indented, ASCII only."""
    rules = _rules(report)
    index = {r["id"]: i for i, r in enumerate(rules)}
    driver = {
        "name": "ckptgate",
        "version": __version__,
        "semanticVersion": __version__,
        "rules": rules,
        "shortDescription": {"text": "Validate quantized LLM checkpoints before you ship them."},
    }
    run = {
        "tool": {"driver": driver},
        "invocations": [_invocation(report)],
        "originalUriBaseIds": {ROOT: {"uri": _root(report.uri)}},
        "columnKind": "unicodeCodePoints",
        "results": [_result(f, index[f.rule]) for f in worst_first(report.findings)],
        "properties": {
            "verdict": report.verdict,
            "summary": verdict_line(report),
            "options": _options(report),
        },
    }
    return (
        json.dumps(
            {"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2, allow_nan=False
        )
        + "\n"
    )


def _rules(report: Report) -> list[dict[str, Any]]:
    titles = {c.rule: c.title for c in report.coverage} | {f.rule: "" for f in report.findings}
    titles |= {c.rule: c.title for c in report.coverage}
    return [
        {
            "id": printable(rule),
            "shortDescription": {"text": _message(printable(title) or rule)},
            "help": {"text": f"ckptgate explain {printable(rule)}"},
        }
        for rule, title in sorted(titles.items())
    ]


def _invocation(report: Report) -> dict[str, Any]:
    invocation: dict[str, Any] = {
        "executionSuccessful": report.verdict != "error",
        "exitCode": report.exit_code,
    }
    if report.verdict in ("inconclusive", "error"):
        why = _message(reason(report) or report.verdict)
        invocation["toolExecutionNotifications"] = [{"level": "error", "message": {"text": why}}]
    skipped = [
        {
            "level": "note",
            "message": {"text": _message(printable(f"{c.rule} did not run: {c.reason}"))},
        }
        for c in report.coverage
        if not c.ran
    ]
    if skipped:
        invocation["toolConfigurationNotifications"] = skipped
    return invocation


def _result(f: Finding, index: int) -> dict[str, Any]:
    parts = [printable(f.message), amount(f), location(f), observation(f)]
    result: dict[str, Any] = {
        "ruleId": printable(f.rule),
        "ruleIndex": index,
        "level": _LEVEL[f.severity],
        "kind": "fail",
        "message": {"text": _message("; ".join(p for p in parts if p))},
        "locations": [_location(f)],
        "partialFingerprints": {FINGERPRINT_VERSION: f.fingerprint} if f.fingerprint else {},
        "occurrenceCount": f.count,
        "properties": _properties(f),
    }
    if f.standing == "known":
        result["suppressions"] = [{"kind": "external", "justification": printable(f.note, 2000)}]
    return result


def _location(f: Finding) -> dict[str, Any]:
    where = f.where
    # Code scanning drops a result without a file; a tensor that is nowhere is missed where the
    # tensors are declared.
    artifact: dict[str, Any] = {"uri": _quoted(where.file or "config.json"), "uriBaseId": ROOT}
    physical: dict[str, Any] = {"artifactLocation": artifact}
    if where.byte is not None:
        physical["region"] = {"byteOffset": where.byte}
    entry: dict[str, Any] = {"physicalLocation": physical}
    if where.tensor:
        name = printable(where.tensor, 2000)
        entry["logicalLocations"] = [
            {"fullyQualifiedName": name, "name": name.rpartition(".")[2] or name, "kind": "member"}
        ]
    return entry


def _properties(f: Finding) -> dict[str, Any]:
    values: dict[str, Any] = {
        "observed": printable(f.observed),
        "expected": printable(f.expected),
        "of": f.of,
        "row": f.where.row,
        "block": f.where.block,
        "standing": f.standing,
        "remarks": remarks(f),
        "engines": {
            e.engine: {"severity": e.severity, "what": printable(e.what)} for e in f.effects
        },
    }
    return {k: v for k, v in values.items() if v not in (None, "", [], {})}


def _options(report: Report) -> dict[str, Any]:
    options = report.summary.options_json()
    return {k: printable(v, 2000) if isinstance(v, str) else v for k, v in options.items()}


def _message(text: str) -> str:
    """Escape what SARIF reads in a message: braces are placeholders, and brackets before
    parentheses a link.
    """
    return _LINK.sub(r"\\[", text.replace("{", "{{").replace("}", "}}"))


def _root(uri: str) -> str:
    """Return the checkpoint's address as the user knows it, as a folder's URI."""
    address = (
        _quoted(uri, ":/@")
        if "://" in uri
        else Path(os.path.abspath(printable(uri, 4000))).as_uri()
    )
    return address if address.endswith("/") else f"{address}/"


def _quoted(text: str, safe: str = "/") -> str:
    return quote(text.encode("utf-8", "backslashreplace"), safe=safe)
