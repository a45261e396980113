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


def diff_text(result: Diff) -> str:
    """Return a diff as plain text, at most `LINES` lines per section."""
    lines = [_side("A", result.a), _side("B", result.b)]
    if result.a.nbytes:
        lines[1] += f", {result.b.nbytes / result.a.nbytes:.3f} of A"
    for letter, side in (("A", result.a), ("B", result.b)):
        lines += [
            f"{letter} cannot be read completely: {printable(p)}" for p in side.problems[:LINES]
        ]
    lines += _precision(result)
    tensors = [c for c in result.changes if not c.file]
    for kind, title in SECTIONS:
        lines += _section(title, [c for c in tensors if c.kind == kind], "tensor")
    for file in dict.fromkeys(c.file for c in result.changes if c.file):
        changes = [c for c in result.changes if c.file == file]
        whole = changes[0].kind in ("only A", "only B")
        lines += (
            [f"{file}: {changes[0].kind.replace('only', 'only in')}"]
            if whole
            else _section(file, changes, "field")
        )
    if result.files:
        lines.append("auxiliary files (not counted as differences)")
        lines += [f"  {printable(f)}" for f in result.files[:LINES]] + _rest(
            len(result.files), "file"
        )
    lines.append(_verdict(result))
    return "\n".join(lines) + "\n"


def diff_json(result: Diff) -> str:
    """Return a diff as one JSON object with every group."""
    roles = sorted(result.a.precision.keys() | result.b.precision.keys())
    value: dict[str, Any] = {
        "equal": result.equal,
        "common": result.common,
        "compared": result.compared,
        "a": _side_value(result.a),
        "b": _side_value(result.b),
        "precision": [
            {
                "role": r,
                "format": f,
                "a": result.a.precision.get((r, f), 0),
                "b": result.b.precision.get((r, f), 0),
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
            for c in result.changes
        ],
        "files": list(result.files),
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


def _precision(result: Diff) -> list[str]:
    def texts(side: Side) -> dict[str, str]:
        counts: dict[str, list[str]] = {}
        for (role, name), n in sorted(side.precision.items()):
            counts.setdefault(role, []).append(f"{n:,} {printable(name, 40)}")
        return {role: ", ".join(c) for role, c in counts.items()}

    a, b = texts(result.a), texts(result.b)
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


def _verdict(result: Diff) -> str:
    if result.a.problems or result.b.problems:
        return "different: cannot read both completely; `ckptgate check` reports why"
    if not result.equal:
        return f"different: {counted(len(result.changes), 'group')} of differences"
    tensors = f"names, dtypes and shapes of {counted(result.common, 'tensor')}, both configs"
    if result.compared is None:
        return f"equal: {tensors} (--depth payload also compares bytes)"
    return f"equal: {tensors}, and the bytes of {result.compared:,}"


# stats


def stats_text(result: CheckpointStats) -> str:
    """Return statistics as plain text."""
    lines = [
        f"{printable(result.uri)}: {printable(result.model_type or 'no model_type', 60)}, "
        f"{counted(result.tensors, 'tensor')} in {counted(result.shards, 'shard')}, "
        f"{size(result.nbytes)}"
    ]
    lines += [f"cannot be read completely: {printable(p)}" for p in result.problems[:LINES]]
    header = ("role", "format", "modules", "parameters", "weights", "scales", "bits/parameter")
    rows = [header, *(_cells(r) for r in (*result.rows, result.total))]
    widths = [max(len(r[i]) for r in rows) for i in range(len(header))]
    for row in rows:
        left = [c.ljust(w) for c, w in zip(row[:2], widths[:2], strict=True)]
        right = [c.rjust(w) for c, w in zip(row[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
    for codes in result.codes:
        lines += _codes(codes)
    if result.floats:
        lines.append("\nfloat32 scales")
        lines += [line for f in result.floats for line in _floats(f)]
    lines += [f"not counted: {printable(s)}" for s in result.skipped]
    if result.depth == "header" and any(r.scale_bytes for r in result.rows):
        lines.append("--depth payload also shows the values of scales")
    return "\n".join(lines) + "\n"


def stats_json(result: CheckpointStats) -> str:
    """Return statistics as one JSON object; histograms are 256 counts by code."""
    value: dict[str, Any] = {
        "uri": result.uri,
        "model_type": result.model_type,
        "tensors": result.tensors,
        "shards": result.shards,
        "bytes": result.nbytes,
        "depth": result.depth,
        "problems": list(result.problems),
        "rows": [_row_value(r) for r in result.rows],
        "total": _row_value(result.total),
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
            for c in result.codes
        ],
        "floats": [{k: getattr(f, k) for k in FLOAT_FIELDS} for f in result.floats],
        "skipped": list(result.skipped),
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
    totals = shares(counts, codes.kind)
    lines = [
        f"\n{printable(codes.format, 40)} {codes.leaf}: {totals['total']:,} {codes.kind} scales "
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
        lines.append(f"  {label:>{width}}  {bar:{BAR}}  {n:,} ({percentage(n, totals['total'])})")
    for role, of_role in (
        *sorted(codes.roles.items()),
        *([("all", counts)] if len(codes.roles) > 1 else []),
    ):
        parts = shares(of_role, codes.kind)
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


def _floats(scales: FloatScales) -> list[str]:
    head = f"  {scales.role} {printable(scales.format, 40)} {scales.leaf}: {scales.count:,}"
    odd = ((scales.zero, "zero"), (scales.negative, "negative"), (scales.invalid, "NaN or Inf"))
    parts = [f"{n:,} {what}" for n, what in odd if n]
    if scales.low is None or scales.high is None:
        return [f"{head}, none finite"]
    if scales.distinct == 1:
        return [", ".join([f"{head}, all {scales.low:.6g}", *parts])]
    return [
        ", ".join([f"{head}, {scales.distinct:,} distinct", *parts]),
        f"    min {scales.low:.6g}  {printable(scales.low_at)}",
        f"    max {scales.high:.6g}  {printable(scales.high_at)}",
    ]


# show


def show_text(view: BlockView) -> str:
    """Return a block as plain text: tensor, module, scales, then one line per element."""
    t = view.tensor
    lines = [
        f"tensor   {printable(t.name)}",
        f"         {t.dtype} {list(t.shape)}, bytes {t.offset:,} to {t.offset + t.nbytes - 1:,} "
        f"of {printable(t.file)}",
        f"module   {printable(view.module)}: {view.role}, {view.format}",
        f"         {printable(', '.join(view.siblings))}",
        f"location {_location(view)}, from byte {view.byte:,}",
    ]
    for s in view.scales:
        lines.append(
            f"  {s.leaf:20} {s.raw:10} {_number(s.value):>14}  at byte {s.byte:,}; valid: {s.valid}"
        )
    if view.scale is not None:
        lines.append(f"  {'total scale':20} {'':10} {_number(view.scale):>14}")
    lines += _element_table(view)
    if view.expected is not None:
        e = view.expected
        lines.append(
            f"expected {e.leaf} {e.raw} = {_number(e.value)} from the base's block; RMS error "
            f"{_number(e.error)} with it, {_number(e.stored_error)} as stored"
        )
    lines += [f"note     {printable(n)}" for n in view.notes]
    return "\n".join(lines) + "\n"


def _location(view: BlockView) -> str:
    columns = "none"
    if view.elements:
        first, last = view.elements[0].column, view.elements[-1].column
        columns = f"{first:,} to {last:,} of {view.width:,}"
    if len(view.tensor.shape) < 2 and not view.scales:
        return f"elements {columns}"
    block = f", block {view.block:,}" if view.block is not None else ""
    return f"row {view.row:,}{block}: columns {columns}"


def _element_table(view: BlockView) -> list[str]:
    """Return one line per element; columns without any entry are left out."""
    quantized = view.scale is not None
    raw = "code" if quantized else "bytes"
    head = ["column", raw, "decoded", "value", "base", "nearest", "its value"]
    rows = [_element_cells(e) for e in view.elements]
    used = [i for i in range(len(head)) if any(row[i] for row in rows)]
    used = [i for i in used if quantized or head[i] != "decoded"]
    table = [[row[i] for i in used] for row in [head, *rows]]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    marks = ["  ", *("> " if e.column in view.asked else "  " for e in view.elements)]
    return [
        mark + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True))
        for mark, row in zip(marks, table, strict=True)
    ]


def show_json(view: BlockView) -> str:
    """Return a block as one JSON object; values that JSON lacks are the strings NaN, Infinity and
    -Infinity.
    """
    value = {"wanted" if k == "expected" else k: v for k, v in asdict(view).items()}
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
