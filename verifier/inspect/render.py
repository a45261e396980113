# SPDX-License-Identifier: Apache-2.0
"""Diffs, statistics and blocks as text and as JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from verifier.inspect.diff import Change, Diff, Side
from verifier.inspect.show import BlockView, Element
from verifier.inspect.stats import CheckpointStats, FloatScales, RoleStats, ScaleCodes, bins, shares
from verifier.text import counted, percentage, printable, size

FLOAT_FIELDS = (
    "format",
    "leaf",
    "role",
    "count",
    "zero",
    "negative",
    "invalid",
    "distinct",
    "low",
    "high",
    "low_at",
    "high_at",
)
LINES = 30
BAR = 40
SECTIONS = (
    ("only A", "only in A"),
    ("only B", "only in B"),
    ("dtype", "different dtype"),
    ("shape", "different shape"),
    ("dtype and shape", "different dtype and shape"),
    ("bytes", "different bytes"),
)


def diff_text(found: Diff) -> str:
    """Return a diff as plain text, at most `LINES` lines per section."""
    lines = [_side("A", found.a), _side("B", found.b)]
    if found.a.nbytes:
        lines[1] += f", {found.b.nbytes / found.a.nbytes:.3f} of A"
    for letter, side in (("A", found.a), ("B", found.b)):
        lines += [
            f"{letter} cannot be read completely: {printable(p)}" for p in side.problems[:LINES]
        ]
    lines += _precision(found)
    tensors = [c for c in found.changes if not c.file]
    for kind, title in SECTIONS:
        lines += _section(title, [c for c in tensors if c.kind == kind], "tensor")
    for file in dict.fromkeys(c.file for c in found.changes if c.file):
        changes = [c for c in found.changes if c.file == file]
        whole = changes[0].kind in ("only A", "only B")
        lines += (
            [f"{file}: {changes[0].kind.replace('only', 'only in')}"]
            if whole
            else _section(file, changes, "field")
        )
    if found.files:
        lines.append("auxiliary files (not counted as differences)")
        lines += [f"  {printable(f)}" for f in found.files[:LINES]] + _rest(
            len(found.files), "file"
        )
    lines.append(_verdict(found))
    return "\n".join(lines) + "\n"


def diff_json(found: Diff) -> str:
    """Return a diff as one JSON object with every group."""
    roles = sorted(found.a.precision.keys() | found.b.precision.keys())
    value: dict[str, Any] = {
        "equal": found.equal,
        "common": found.common,
        "compared": found.compared,
        "a": _side_value(found.a),
        "b": _side_value(found.b),
        "precision": [
            {
                "role": r,
                "format": f,
                "a": found.a.precision.get((r, f), 0),
                "b": found.b.precision.get((r, f), 0),
            }
            for r, f in roles
        ],
        "changes": [
            {
                "kind": c.kind,
                "file": c.file or None,
                "name": c.names.label,
                "pattern": c.names.pattern,
                "example": c.names.example,
                "count": c.names.count,
                "a": c.a,
                "b": c.b,
            }
            for c in found.changes
        ],
        "files": list(found.files),
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _side(letter: str, side: Side) -> str:
    return (
        f"{letter}  {printable(side.uri)}: {counted(side.tensors, 'tensor')} in "
        f"{counted(side.shards, 'shard')}, {size(side.nbytes)}"
    )


def _side_value(side: Side) -> dict[str, Any]:
    return {
        "uri": side.uri,
        "tensors": side.tensors,
        "shards": side.shards,
        "bytes": side.nbytes,
        "problems": list(side.problems),
    }


def _precision(found: Diff) -> list[str]:
    def texts(side: Side) -> dict[str, str]:
        counts: dict[str, list[str]] = {}
        for (role, name), n in sorted(side.precision.items()):
            counts.setdefault(role, []).append(f"{n:,} {printable(name, 40)}")
        return {role: ", ".join(c) for role, c in counts.items()}

    a, b = texts(found.a), texts(found.b)
    rows = [(r, a.get(r, "none"), b.get(r, "none")) for r in sorted(a.keys() | b.keys())]
    width = max((len(r) for r, _, _ in rows), default=0)
    lines = [
        f"  {role:{width}}  {left if left == right else f'{left} → {right}'}"
        for role, left, right in rows
    ]
    return ["modules by role", *lines] if rows else []


def _section(title: str, changes: list[Change], unit: str) -> list[str]:
    if not changes:
        return []
    total = sum(c.names.count for c in changes)
    lines = [f"{title}: {counted(total, unit)}"]
    for c in changes[:LINES]:
        left, right = printable(c.a, 160), printable(c.b, 160)
        if c.kind in ("only A", "only B"):
            what = left or right
        elif c.kind == "bytes":
            what = f"{left}; {right}"
        else:
            what = f"{left or '(none)'} → {right or '(none)'}"
        partly = (
            f"  (of {c.names.spanned:,} in these ranges)" if c.names.spanned > c.names.count else ""
        )
        lines.append(f"  {c.names.count:>6,}  {printable(c.names.label)}  {what}{partly}".rstrip())
    return lines + _rest(len(changes), "group")


def _rest(count: int, noun: str) -> list[str]:
    rest = count - LINES
    return [f"  … and {counted(rest, f'more {noun}')}; --format json has all"] if rest > 0 else []


def _verdict(found: Diff) -> str:
    if found.a.problems or found.b.problems:
        return "different: cannot read both completely; `ckptgate check` reports why"
    if not found.equal:
        return f"different: {counted(len(found.changes), 'group')} of differences"
    tensors = f"names, dtypes and shapes of {counted(found.common, 'tensor')}, both configs"
    if found.compared is None:
        return f"equal: {tensors} (--payload also compares bytes)"
    return f"equal: {tensors}, and the bytes of {found.compared:,}"


# stats


def stats_text(found: CheckpointStats) -> str:
    """Return statistics as plain text."""
    lines = [
        f"{printable(found.uri)}: {printable(found.model_type or 'no model_type', 60)}, "
        f"{counted(found.tensors, 'tensor')} in {counted(found.shards, 'shard')}, "
        f"{size(found.nbytes)}"
    ]
    lines += [f"cannot be read completely: {printable(p)}" for p in found.problems[:LINES]]
    header = ("role", "format", "modules", "parameters", "weights", "scales", "bits/parameter")
    rows = [header, *(_cells(r) for r in (*found.rows, found.total))]
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    for row in rows:
        left = [c.ljust(w) for c, w in zip(row[:2], widths[:2], strict=True)]
        right = [c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    for codes in found.codes:
        lines += _codes(codes)
    if found.floats:
        lines.append("\nfloat32 scales")
        lines += [line for f in found.floats for line in _floats(f)]
    lines += [f"not counted: {printable(s)}" for s in found.skipped]
    if found.depth == "header" and any(r.scale_bytes for r in found.rows):
        lines.append("--depth payload also shows the values of scales")
    return "\n".join(lines) + "\n"


def stats_json(found: CheckpointStats) -> str:
    """Return statistics as one JSON object; histograms are 256 counts by code."""
    value: dict[str, Any] = {
        "uri": found.uri,
        "model_type": found.model_type,
        "tensors": found.tensors,
        "shards": found.shards,
        "bytes": found.nbytes,
        "depth": found.depth,
        "problems": list(found.problems),
        "rows": [_row_value(r) for r in found.rows],
        "total": _row_value(found.total),
        "codes": [
            {
                "format": c.format,
                "leaf": c.leaf,
                "kind": c.kind,
                **shares(c.counts, c.kind),
                "roles": {
                    r: {**shares(n, c.kind), "counts": n.tolist()}
                    for r, n in sorted(c.roles.items())
                },
            }
            for c in found.codes
        ],
        "floats": [{k: getattr(f, k) for k in FLOAT_FIELDS} for f in found.floats],
        "skipped": list(found.skipped),
    }
    return json.dumps(value, indent=2, allow_nan=False) + "\n"


def _cells(row: RoleStats) -> tuple[str, ...]:
    bits = "-" if row.bits is None else f"{row.bits:.3f}"
    count = "unknown" if row.parameters is None else f"{row.parameters:,}"
    sizes = (size(row.weight_bytes), size(row.scale_bytes))
    return (row.role, printable(row.format, 40), f"{row.modules:,}", count, *sizes, bits)


def _row_value(row: RoleStats) -> dict[str, Any]:
    return {
        "role": row.role,
        "format": row.format,
        "modules": row.modules,
        "parameters": row.parameters,
        "weight_bytes": row.weight_bytes,
        "scale_bytes": row.scale_bytes,
        "other_bytes": row.other_bytes,
        "bits_per_parameter": row.bits,
    }


def _codes(codes: ScaleCodes) -> list[str]:
    counts = codes.counts
    found = shares(counts, codes.kind)
    lines = [
        f"\n{printable(codes.format, 40)} {codes.leaf}: {found['total']:,} {codes.kind} scales "
        f"by power of two"
    ]
    rows = bins(counts, codes.kind)
    top = max((n for _, n in rows), default=1)
    width = max((len(label) for label, _ in rows), default=0)
    for i, (label, n) in enumerate(rows):
        if not n:  # a run of empty bins is one line
            lines += [] if i and not rows[i - 1][1] else [f"  {'…':>{width}}"]
            continue
        bar = "█" * max(1, round(BAR * n / top))
        lines.append(f"  {label:>{width}}  {bar:{BAR}}  {n:,} ({percentage(n, found['total'])})")
    for role, mine in (
        *sorted(codes.roles.items()),
        *([("all", counts)] if len(codes.roles) > 1 else []),
    ):
        parts = shares(mine, codes.kind)
        of = parts.pop("total")
        names = {
            "floor": "at the floor 2^-9",
            "max": "at 448",
            "least": "at 2^-127",
            "invalid": "NaN",
        }
        texts = [
            f"{percentage(n, of)} {names.get(k, k)}"
            for k, n in parts.items()
            if n or k in ("floor", "zero", "least")
        ]
        lines.append(f"  {role}: {of:,} scales, {', '.join(texts)}")
    return lines


def _floats(found: FloatScales) -> list[str]:
    head = f"  {found.role} {printable(found.format, 40)} {found.leaf}: {found.count:,}"
    odd = ((found.zero, "zero"), (found.negative, "negative"), (found.invalid, "NaN or Inf"))
    parts = [f"{n:,} {what}" for n, what in odd if n]
    if found.low is None or found.high is None:
        return [f"{head}, none finite"]
    if found.distinct == 1:
        return [", ".join([f"{head}, all {found.low:.6g}", *parts])]
    return [
        ", ".join([f"{head}, {found.distinct:,} distinct", *parts]),
        f"    min {found.low:.6g}  {printable(found.low_at)}",
        f"    max {found.high:.6g}  {printable(found.high_at)}",
    ]


# show


def show_text(found: BlockView) -> str:
    """Return a block as plain text: tensor, module, scales, then one line per element."""
    t, elements = found.tensor, found.elements
    block = f", block {found.block:,}" if found.block is not None else ""
    columns = "none"
    if elements:
        columns = f"{elements[0].column:,} to {elements[-1].column:,} of {found.width:,}"
    where = (
        f"row {found.row:,}{block}: columns {columns}"
        if len(t.shape) > 1 or found.scales
        else f"elements {columns}"
    )
    lines = [
        f"tensor   {printable(t.name)}",
        f"         {t.dtype} {list(t.shape)}, bytes {t.offset:,} to {t.offset + t.nbytes - 1:,} "
        f"of {printable(t.file)}",
        f"module   {printable(found.module)}: {found.role}, {found.format}",
        f"         {printable(', '.join(found.siblings))}",
        f"location {where}, from byte {found.byte:,}",
    ]
    for s in found.scales:
        lines.append(
            f"  {s.leaf:20} {s.raw:10} {_number(s.value):>14}  at byte {s.byte:,}; valid: {s.valid}"
        )
    if found.scale is not None:
        lines.append(f"  {'total scale':20} {'':10} {_number(found.scale):>14}")
    rows = [_element_cells(e) for e in found.elements]
    quantized = found.scale is not None
    head = [
        "column",
        "code" if quantized else "bytes",
        "decoded",
        "value",
        "base",
        "nearest",
        "its value",
    ]
    keep = [i for i in range(7) if (i != 2 or quantized) and any(r[i] for r in rows)]
    table = [[r[i] for i in keep] for r in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    marks = ["  ", *("> " if e.column in found.asked else "  " for e in found.elements)]
    for mark, row in zip(marks, table, strict=True):
        lines.append(mark + "  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)))
    if found.expected is not None:
        w = found.expected
        lines.append(
            f"expected {w.leaf} {w.raw} = {_number(w.value)} from the base's block; RMS error "
            f"{_number(w.error)} with it, {_number(w.stored_error)} as stored"
        )
    lines += [f"note     {printable(n)}" for n in found.notes]
    return "\n".join(lines) + "\n"


def show_json(found: BlockView) -> str:
    """Return a block as one JSON object; values that JSON lacks are the strings NaN, Infinity and
    -Infinity.
    """
    value = {"wanted" if k == "expected" else k: v for k, v in asdict(found).items()}
    return json.dumps(_plain_value(value), indent=2, allow_nan=False) + "\n"


def _plain_value(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _plain_value(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain_value(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _element_cells(e: Element) -> list[str]:
    base, gives = ("" if v is None else _number(v) for v in (e.base, e.gives))
    return [
        f"{e.column:,}",
        e.raw,
        _number(e.stands_for),
        _number(e.value),
        base,
        e.code or "",
        gives,
    ]


def _number(value: float) -> str:
    return f"{value:.7g}"
