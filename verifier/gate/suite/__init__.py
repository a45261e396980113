# SPDX-License-Identifier: Apache-2.0
"""One release decision over several corpora and tasks, each scored as a gate."""

from verifier.gate.suite.file import Suite, SuiteEntry, read_suite
from verifier.gate.suite.result import SuiteResult
from verifier.gate.suite.run import SuiteOptions, run_suite

__all__ = ["Suite", "SuiteEntry", "SuiteOptions", "SuiteResult", "read_suite", "run_suite"]
