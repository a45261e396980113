# SPDX-License-Identifier: Apache-2.0
"""Selects rules, runs them, counts what they examined, and reaches a verdict."""

from verifier.run.engine import check
from verifier.run.merge import merge_reports, report_of

__all__ = ["check", "merge_reports", "report_of"]
