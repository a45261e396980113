# SPDX-License-Identifier: Apache-2.0
"""Select rules, run them, count what they examined, reach a verdict."""

from verifier.run.engine import check
from verifier.run.merge import merge_reports, report_of

__all__ = ["check", "merge_reports", "report_of"]
