# SPDX-License-Identifier: Apache-2.0
"""The report for a person: one block a finding, then what was and was not examined, then the verdict."""

from __future__ import annotations

from verifier.findings import Finding, Report


def printable(text: str, limit: int = 400) -> str:
    """Return text with control characters escaped and a bounded length; names come from files and may be hostile."""
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return safe if len(safe) <= limit else f"{safe[: limit - 1]}…"


def render_text(report: Report) -> str:
    """Return the report as plain text lines."""
    lines: list[str] = []
    for finding in report.findings:
        lines += _finding(finding)
    lines.append(_footer(report))
    not_run: dict[str, list[str]] = {}
    for c in report.coverage:
        if not c.ran:
            not_run.setdefault(c.reason, []).append(c.rule)
        elif c.checked < c.of:
            not_run.setdefault(f"on {c.of - c.checked:,} of {c.of:,} {c.unit}: {c.reason}", []).append(c.rule)
    if not_run:
        lines.append("not run: " + "; ".join(f"{' '.join(rules)} ({printable(why)})" for why, rules in not_run.items()))
    errors, warnings = report.count("error"), report.count("warning")
    why = report.stats.get("unproven") or report.stats.get("error")
    detail = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}"
    lines.append(f"verdict: {report.verdict.upper()} ({detail}{f'; {printable(str(why))}' if why else ''})")
    return "\n".join(lines) + "\n"


def _finding(f: Finding) -> list[str]:
    amount = f"   {f.count:,} of {f.of:,}" if f.of and f.of > 1 else (f"   {f.count:,}" if f.count > 1 else "")
    lines = [f"{f.severity:7} {f.rule}  {printable(f.message)}{amount}"]
    place = f.where.tensor or f.where.file
    if place:
        spots = [
            f"{label} {value:,}"
            for label, value in (("row", f.where.row), ("block", f.where.block), ("byte", f.where.byte))
            if value is not None
        ]
        if f.where.file and f.where.tensor:
            spots.append(f"of {printable(f.where.file)}" if f.where.byte is not None else f"in {printable(f.where.file)}")
        lines.append(f"        {printable(place)}{' [' + ', '.join(spots) + ']' if spots else ''}")
    seen = [f"{label} {printable(v, 160)}" for label, v in (("observed", f.observed), ("expected", f.expected)) if v]
    if seen:
        lines.append(f"        {', '.join(seen)}")
    return lines


def _footer(report: Report) -> str:
    s = report.stats
    if "tensors" not in s:
        return f"checked {printable(report.uri)}: nothing could be read"
    formats = ", ".join(f"{n:,} {a}" for a, n in sorted(s["formats"].items())) or "none"
    payload = any(c.ran and "scales" in c.unit for c in report.coverage)
    scales = f", {_size(s['scale_bytes'])} of scales read" if payload else ""
    size = f"{s['tensors']:,} tensors in {s['shards']} shard{'s' * (s['shards'] != 1)}, {_size(s['bytes'])}"
    options = s.get("options", {})
    of = f"subset {options['subset']} of " if options.get("subset") else ""
    if options.get("sample"):
        of = f"by a sample of {options['sample']:g}% (seed {options['seed']}), "
    return f"checked {of}{size}{scales}; quantized modules: {formats}"


def _size(count: int) -> str:
    value, unit = float(count), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.1f} {unit}"
