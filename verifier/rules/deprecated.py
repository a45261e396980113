# SPDX-License-Identifier: Apache-2.0
"""Attributes that a rule's context had in 0.1.0, for rules of plugins; they go with 0.3.0."""

from __future__ import annotations

import warnings
from operator import attrgetter

_CANDIDATE = (
    "modules tensors shapes names declarations declaration tied_heads declared_for format_of"
    " quantized_modules formatted scales scale_tensors kv_scales linears values"
)
_PAYLOAD = "bytes_of digest pieces extremes array"
_EXPECTATIONS = "family naming layers is_mtp wrapped_exclusions unrelated_base"
_INPUTS = "tp ep loader evaluation"
MOVED = {
    **{name: f"candidate.{name}" for name in _CANDIDATE.split()},
    **{name: f"payload.{name}" for name in _PAYLOAD.split()},
    **{name: f"expectations.{name}" for name in _EXPECTATIONS.split()},
    **{name: f"inputs.{name}" for name in _INPUTS.split()},
    "alike": "candidate.module_groups",
    "declared_group": "candidate.declared_group_size",
    "facts": "payload.scan",
    "expected": "expectations.shapes",
    "why_not_expected": "expectations.why_unknown",
    "once": "cached",
    "untouched": "pass_through",
    "rule_severity": "severity",
}


def moved_attribute(context: object, name: str) -> object:
    """Return an attribute under its old name, with a `DeprecationWarning` that names the new one.

    Raises:
        AttributeError: there was no attribute of this name either.
    """
    path = MOVED.get(name)
    if path is None:
        raise AttributeError(f"{type(context).__name__!r} object has no attribute {name!r}")
    warnings.warn(f"ctx.{name} is now ctx.{path}", DeprecationWarning, stacklevel=3)
    value: object = attrgetter(path)(context)
    return value
