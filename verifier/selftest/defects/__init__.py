# SPDX-License-Identifier: Apache-2.0
"""Known defects, by rule family: every rule below depth eval has at least one."""

from __future__ import annotations

from verifier.selftest.corruptor import REGISTERED, Corruptor
from verifier.selftest.defects import qc1xx, qc2xx, qc3xx, qc4xx, qc5xx, qc6xx

__all__ = ["CORRUPTORS", "qc1xx", "qc2xx", "qc3xx", "qc4xx", "qc5xx", "qc6xx"]

CORRUPTORS: tuple[Corruptor, ...] = tuple(sorted(REGISTERED, key=lambda c: c.rule))
