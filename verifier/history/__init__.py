# SPDX-License-Identifier: Apache-2.0
"""Runs over time: an append-only file of JSON lines, trends and change points."""

from verifier.history.journal import History, append, load
from verifier.history.record import Measure, Record, recorded, recorded_suite
from verifier.history.results import Result, read_result

__all__ = [
    "History",
    "Measure",
    "Record",
    "Result",
    "append",
    "load",
    "read_result",
    "recorded",
    "recorded_suite",
]
