# SPDX-License-Identifier: Apache-2.0
"""Read back what `ckptgate gate` and `ckptgate check` printed with ``--format json``."""

from __future__ import annotations

import json
import os
from typing import Any

from verifier.errors import ContentError, UsageError
from verifier.evaluation import GateResult, gate_result_of
from verifier.findings import Report
from verifier.run.merge import report_of

MAX_BYTES = 256 << 20
Result = GateResult | Report
_NEITHER = "neither the JSON of `ckptgate gate` nor that of `ckptgate check`"


def read_result(file: str | os.PathLike[str]) -> Result:
    """Read the result of a gate or a check from its JSON file.

    Raises:
        UsageError: no such file, or one that is too large.
        ContentError: it is something else, or a field has a wrong type; numbers that are not finite
            are refused.
    """
    name = os.fspath(file)
    try:
        with open(file, "rb") as handle:
            raw = handle.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        raise UsageError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    if len(raw) > MAX_BYTES:
        raise UsageError(f"{name}: larger than {MAX_BYTES:,} bytes")
    try:
        value = json.loads(raw, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise ContentError(f"{name}: not JSON: {str(error)[:120]}") from error
    if not isinstance(value, dict):
        raise ContentError(f"{name}: {_NEITHER}")
    try:
        return result_of(value)
    except ContentError as error:
        raise ContentError(f"{name}: {error}") from error


def result_of(value: dict[str, Any]) -> Result:
    """Return the result that a parsed JSON object holds.

    Raises:
        ContentError: it is something else, or a field has a wrong type.
    """
    if "candidate" in value and "interval" in value:
        return gate_result_of(value)
    if "uri" in value and "coverage" in value:
        return report_of(value)
    raise ContentError(_NEITHER)


def _refuse(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")
