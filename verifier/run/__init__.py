# SPDX-License-Identifier: Apache-2.0
"""Select rules, run them, count what they examined, reach a verdict."""

from verifier.run.engine import check

__all__ = ["check"]
