# SPDX-License-Identifier: Apache-2.0
"""Runs over time: an append-only file of JSON lines, an SQLite index rebuilt from it, trends and
change points.
"""

from verifier.history.journal import Loaded, append, load
from verifier.history.record import Measure, Record, recorded

__all__ = ["Loaded", "Measure", "Record", "append", "load", "recorded"]
