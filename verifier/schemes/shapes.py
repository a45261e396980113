# SPDX-License-Identifier: Apache-2.0
"""Shapes of tensors as formulas: ``out, in/group`` is [out, in/group], the empty text a scalar.

A dimension is a name or a number, followed by ``*n`` and ``/n``, worked out from left to right;
``/`` rounds up. The names ``out`` and ``in`` are the logical dimensions of the linear layer, in
elements; the others (``group``, ``rows``, ``bits``, ``rank``) are parameters of a format. A group
of 0 is the whole input dimension.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import lru_cache

Shape = tuple[int, ...]
_STEP = re.compile(r"([*/])(\w+)")


@lru_cache(maxsize=512)
def _parsed(formula: str) -> tuple[tuple[str, tuple[tuple[str, str], ...]], ...]:
    """Return (first name, steps) of each dimension."""
    dims = [d.strip() for d in formula.split(",")] if formula else []
    parsed = []
    for dim in dims:
        head = re.match(r"\w+", dim)
        steps = tuple(_STEP.findall(dim[head.end() :])) if head else ()
        if head is None or "".join(a + b for a, b in steps) != dim[head.end() :]:
            raise ValueError(f"not a shape formula: {formula!r}")
        parsed.append((head[0], steps))
    return tuple(parsed)


def _value(name: str, values: Mapping[str, int]) -> int:
    return int(name) if name.isdigit() else values[name]


def shape_of(formula: str, values: Mapping[str, int]) -> Shape:
    """Return the shape that a formula gives for some values."""
    shape = []
    for head, steps in _parsed(formula):
        size = _value(head, values)
        for operator, name in steps:
            by = _value(name, values)
            if operator == "*":
                size *= by
            else:
                size = -(-size // by) if by else min(size, 1)
        shape.append(size)
    return tuple(shape)


def solve(formula: str, shape: Shape, values: Mapping[str, int]) -> dict[str, int] | None:
    """Return the ``out`` and ``in`` for which a formula gives ``shape``; None where it has none.

    Where a division rounds up, the largest such value is returned.
    """
    dims = _parsed(formula)
    if len(dims) != len(shape):
        return None
    found: dict[str, int] = {}
    for (head, steps), size in zip(dims, shape, strict=True):
        for operator, name in reversed(steps):
            by = _value(name, values) if name.isdigit() or name in values else 0
            if not by:
                return None
            size = size * by if operator == "/" else size // by
        if head in ("out", "in"):
            found[head] = size
        elif size != _value(head, values):
            return None
    return found if found.keys() == {"out", "in"} else None
