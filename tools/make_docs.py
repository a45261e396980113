# SPDX-License-Identifier: Apache-2.0
"""Render docs/rules.md and docs/exit-codes.md from the code, docs/performance.md from results.

    python tools/make_docs.py [--check]

``--check`` writes nothing and fails where a committed page differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from verifier.errors import EXIT_CODES
from verifier.rules import all_rules

DOCS = Path(__file__).parent.parent / "docs"
FAMILIES = {
    "1": "Container, index, files", "2": "Names and layout", "3": "Scale keys, dtypes, shapes", "4": "Configuration",
    "5": "Values", "6": "Reload and round trip",
}  # fmt: skip
NOT_YET = """## Not judged yet

Known defects without a rule in this version: everything that needs a loaded model or an engine (QC601 to QC604, QC608).
Perplexity (QC7xx) is `ckptgate gate`. QC108 (shared storage at save) cannot occur in a file, and the key that it loses is
QC301's or QC302's; QC602, QC603 and QC607 need an engine's own loader or a second export.
"""


def rules_page() -> str:
    """Return docs/rules.md."""
    lines = [
        "# Rules", "",
        "Rendered from the rules' own docstrings by `tools/make_docs.py`; `ckptgate explain QC501` prints one.", "",
        "An error fails the check. A warning does not, unless `--fail-on warning`. A rule that needs a base is listed as",
        "*not run* without one and does not change the verdict, unless `--require` names it.", "",
        "| rule | severity | depth | what |", "| --- | --- | --- | --- |",
    ]  # fmt: skip
    for r in all_rules().values():
        lines.append(f"| [{r.id}](#{r.id.lower()}) | {r.severity} | {r.depth} | {r.title} |")
    family = ""
    for r in all_rules().values():
        if r.id[2] != family:
            family = r.id[2]
            lines += ["", f"## QC{family}xx {FAMILIES[family]}"]
        needs = f", needs {' or '.join('`--' + n.replace('_', '-') + '`' for n in r.needs[0].split('|'))}" if r.needs else ""
        lines += ["", f'<a id="{r.id.lower()}"></a>', f"### {r.id} {r.title}", ""]
        lines += [f"*{r.severity}, depth {r.depth}{needs}; counts {r.unit}*", "", r.doc, ""]
        lines.append(f"Engines: {', '.join(r.consumers)}. Seen in: {', '.join(r.sources)}.")
    return "\n".join(lines) + "\n\n" + NOT_YET


def exit_codes_page() -> str:
    """Return docs/exit-codes.md."""
    lines = [
        "# Exit codes", "", "The same in every command. With `--format json`, stdout is one valid report for 0, 1, 3 and 4.",
        "", "| code | meaning |", "| --- | --- |",
    ]  # fmt: skip
    lines += [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


def performance_page() -> str:
    """Return docs/performance.md, from the results that the benchmarks wrote."""
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "verify.json").read_text(encoding="utf-8"))
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())

    def row(what: str, part: str, key: str, must: str, aim: str, digits: int = 2) -> str:
        raw = [x[key] for x in r[part]["rounds"]]
        unit = " MB" if key.endswith("_mb") else " s" if key.endswith("_s") else ""
        middle = f"{r[part]['median'][key]:.{digits}f}{unit}"
        return f"| {what} | {middle} ({min(raw):.{digits}f} to {max(raw):.{digits}f}) | {must} | {aim} |"

    counts = r["header"]["tensors"]
    head = ["", "| what | median (range) | must | aim |", "| --- | --- | --- | --- |"]
    lines = [
        "# Performance", "", "Rendered from `benchmarks/results/` by `tools/make_docs.py`.", "",
        f"`{r['command']}`, medians of {len(r['header']['rounds'])} rounds (range) after one that fills caches; what a row",
        f"is compared with runs in the same rounds. {versions}; {r['machine']}; load {r['load'][0]:.1f} at the end.", "",
        "## Header check", "",
        f"The real MiniMax-M3 mixed release, {counts['60']:,} tensors in 60 sparse files, all header rules; each a process",
        f"of its own, as a user starts it. {min(counts.values()):,} to {max(counts.values()):,} tensors: the same release",
        "with fewer or more layers.", *head,
        row(f"{counts['60']:,} tensors", "header", "check_60_s", "2 s", "1 s"),
        row("processor seconds of it", "header", "check_60_cpu_s", "", ""),
        row("memory", "header", "check_60_mb", "300 MB", "200 MB", 0),
        row("parsing the same headers with `json` alone", "header", "parse_60_s", "", ""),
        *(
            row(f"{count:,} tensors", "header", f"check_{layers}_s", "", "")
            for layers, count in counts.items() if layers != "60"
        ),
        row("slope of log time over log tensors", "header", "slope", "1.1", "1.0"),
        row("a tiny checkpoint", "header", "tiny_s", "1 s", "0.4 s"), "",
        "## Depth payload", "",
        f"Scan: one layer as released, 128 experts, {r['scan']['tensors']:,} tensors, {r['scan']['bytes'] / 1e6:,.0f} MB of",
        f"scales and unquantized tensors. With a base: one layer with six experts and its BF16 base, "
        f"{r['payload']['bytes'] / 1e6:,.0f} MB;",
        "every quantized weight is decoded, its error measured and compared with `max` calibration. The files are in the",
        "page cache. A ratio is the seconds of `readinto` of the same bytes over those of the check, by one thread; below",
        "it that of processor seconds, which other work on the machine changes less.", *head,
        row("scan, ratio", "scan", "ratio", "0.25", "0.4"),
        row("scan, ratio of processor seconds", "scan", "cpu_ratio", "", ""),
        row("with a base, ratio", "payload", "ratio", "0.04", "0.1", 3),
        row("with a base, ratio of processor seconds", "payload", "cpu_ratio", "", "", 3),
        row("with a base, two threads against one", "payload", "speedup", "1.7", ""), "",
        "Private pages beyond those of the idle process, with an embedding of "
        f"{r['memory']['largest_tensor_mb']:,.0f} MB and an expert of 16,384 x 16,384", "",
        *head[1:],
        row("scan", "memory", "scan_mb", "500 MB", "150 MB", 0),
        row("with a base", "memory", "payload_mb", "500 MB", "150 MB", 0),
        row("with a base, two threads", "memory", "payload_two_threads_mb", "500 MB", "150 MB", 0), "",
    ]  # fmt: skip
    return "\n".join(lines)


def main() -> int:
    """Write or compare the pages."""
    stale = []
    pages = {"rules.md": rules_page(), "exit-codes.md": exit_codes_page(), "performance.md": performance_page()}
    for name, text in pages.items():
        file = DOCS / name
        if "--check" in sys.argv:
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            file.write_text(text, encoding="utf-8")
    if stale:
        print("differ from the code (python tools/make_docs.py writes them):", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
