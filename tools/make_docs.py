# SPDX-License-Identifier: Apache-2.0
"""Render docs/rules.md and docs/exit-codes.md from the code, and docs/performance.md and
docs/families.md from results.

    python tools/make_docs.py [--check]

``--check`` writes nothing and fails if a committed page differs.
"""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from draw_formats import drawings
from goldens_page import damage_lines
from goldens_page import page as goldens_page
from reference_pages import command_line_page, python_page
from scale_page import faults_lines, scale_lines

from verifier.errors import EXIT_CODES
from verifier.layouts.family import known
from verifier.rules import all_rules
from verifier.text import counted, size

DOCS = Path(__file__).parent.parent / "docs"
FAMILIES = {
    "1": "Container, index, files",
    "2": "Names and layout",
    "3": "Scale keys, dtypes, shapes",
    "4": "Configuration",
    "5": "Values",
    "6": "Reload and round trip",
    "7": "Quality on text",
}
MARK = ("<!-- coverage: rendered by tools/make_docs.py -->", "<!-- end of coverage -->")
SUITE = ("<!-- suite: rendered by tools/make_docs.py -->", "<!-- end of suite -->")
DAMAGE = ("<!-- damage: rendered by tools/make_docs.py -->", "<!-- end of damage -->")
FAULTS = ("<!-- faults: rendered by tools/make_docs.py -->", "<!-- end of faults -->")
COSTS = ("<!-- costs: rendered by tools/make_docs.py -->", "<!-- end of costs -->")
LAYERS = range(4)
"""The layers of the goldens."""
LOCATED = ("<!-- located: rendered by tools/make_docs.py -->", "<!-- end of located -->")
NOT_YET = {
    "QC108 shared storage at save": "cannot occur in a file; the key that it loses is reported by "
    "QC301 or QC302",
    "QC607 the export depends on the form of the path": "needs a second export; missing MTP "
    "tensors are QC206",
    "QC706 draft acceptance": "needs an engine with speculative decoding and a GPU; defects of the "
    "head are QC206 and QC403",
}
"""Defects of the catalog without a rule, and why."""


def rules_page() -> str:
    """Return docs/rules.md."""
    lines = [
        "# Rules",
        "",
        "Rendered from the docstrings of the rules by `tools/make_docs.py`; `ckptgate explain "
        "QC501` "
        "prints one.",
        "",
        "An error fails the check. A warning does not, unless `--fail-on warning`. Without a "
        "base, a "
        "rule that needs one is",
        "*skipped*, which does not change the verdict unless `--require` names the rule.",
        "",
        "| rule | severity | depth | defect |",
        "| --- | --- | --- | --- |",
    ]
    for r in all_rules().values():
        lines.append(f"| [{r.id}](#{r.id.lower()}) | {r.severity} | {r.depth} | {r.title} |")
    family = ""
    for r in all_rules().values():
        if r.id[2] != family:
            family = r.id[2]
            lines += ["", f"## QC{family}xx {FAMILIES[family]}"]
        names = r.needs[0].split("|") if r.needs else []
        options = " or ".join(f"`--{name.replace('_', '-')}`" for name in names)
        needs = f", needs {options}" if options else ""
        lines += ["", f'<a id="{r.id.lower()}"></a>', f"### {r.id} {r.title}", ""]
        lines += [f"*{r.severity}, depth {r.depth}{needs}; counts {r.unit}*", "", r.doc, ""]
        lines.append(f"Engines: {', '.join(r.consumers)}. Seen in: {', '.join(r.sources)}.")
    lines += ["", "## Defects without a rule", "", "| defect | why |", "| --- | --- |"]
    lines += [f"| {row} | {why} |" for row, why in NOT_YET.items()]
    return "\n".join(lines) + "\n"


def exit_codes_page() -> str:
    """Return docs/exit-codes.md."""
    lines = [
        "# Exit codes",
        "",
        "All commands use the same codes. With `--format json`, stdout is one valid report for "
        "0, 1, "
        "3 and 4.",
        "",
        "| code | meaning |",
        "| --- | --- |",
    ]
    lines += [f"| {code} | {text} |" for code, text in EXIT_CODES.items()]
    return "\n".join(lines) + "\n"


def performance_page() -> str:
    """Return docs/performance.md, from the results that the benchmarks wrote."""
    results = DOCS.parent / "benchmarks" / "results"
    page = ["# Performance", "", "Rendered from `benchmarks/results/` by `tools/make_docs.py`.", ""]
    page += verify_section(json.loads((results / "verify.json").read_text(encoding="utf-8")))
    if (results / "real.json").is_file():
        page += real_section(json.loads((results / "real.json").read_text(encoding="utf-8")))
        page += before_section(
            json.loads((results / "real-0.1.0.json").read_text(encoding="utf-8"))
        )
    if (results / "codecs.json").is_file():
        page += codecs_section(json.loads((results / "codecs.json").read_text(encoding="utf-8")))
    page += scoring_section()
    page += device_section()
    page += busy_section()
    page += ["", "## Remote checkpoints", "", *remote_table()]
    return "\n".join(page)


def verify_section(r: dict[str, Any]) -> list[str]:
    """Return the sections on the verifier's speed and memory."""
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())

    def row(what: str, part: str, key: str, must: str, aim: str, digits: int = 2) -> str:
        raw = [x[key] for x in r[part]["rounds"]]
        unit = " MB" if key.endswith("_mb") else " s" if key.endswith("_s") else ""
        middle = f"{r[part]['median'][key]:.{digits}f}{unit}"
        span = f"({min(raw):.{digits}f} to {max(raw):.{digits}f})"
        return f"| {what} | {middle} {span} | {must} | {aim} |"

    counts = r["header"]["tensors"]
    ratios = [x["check_60_cpu_s"] / x["parse_60_cpu_s"] for x in r["header"]["rounds"]]
    head = ["", "| measurement | median (range) | limit | target |", "| --- | --- | --- | --- |"]
    lines = [
        f"`{r['command']}`, medians (range) of {len(r['header']['rounds'])} rounds after a warm-up "
        f"round. Reference measurements",
        f"run in the same rounds. {versions}; {r['machine']}; load {r['load'][0]:.1f} at the end.",
        "",
        "## Header check",
        "",
        f"The real MiniMax-M3 mixed release, {counts['60']:,} tensors in 60 sparse files, all "
        "header "
        f"rules; each run in its",
        f"own process, as a user starts it. {min(counts.values()):,} to {max(counts.values()):,} "
        "tensors: the same release with",
        "fewer or more layers.",
        *head,
        row(f"{counts['60']:,} tensors", "header", "check_60_s", "2 s", "1 s"),
        row("CPU time of the same", "header", "check_60_cpu_s", "", ""),
        row("memory", "header", "check_60_mb", "300 MB", "200 MB", 0),
        row("with `--base`, the BF16 model", "header", "with_base_s", "", "1.5 s"),
        row("memory with `--base`", "header", "with_base_mb", "", "", 0),
        row("with `--merged-from`, the vendor's", "header", "with_merged_from_s", "", "1.5 s"),
        row("parsing the same headers with `json` alone", "header", "parse_60_s", "", ""),
        "| the check as a multiple of that, CPU time | "
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f}) | | |",
        *(
            row(f"{count:,} tensors", "header", f"check_{layers}_s", "", "")
            for layers, count in counts.items()
            if layers != "60"
        ),
        row("slope of log time over log tensors", "header", "slope", "1.1", "1.0"),
        row("a tiny checkpoint", "header", "tiny_s", "1 s", "0.4 s"),
        "",
        "## Depth payload",
        "",
        f"Scan: one layer as released, 128 experts, {r['scan']['tensors']:,} tensors, "
        f"{r['scan']['bytes'] / 1e6:,.0f} MB of",
        "scales and pass-through tensors. With a base: one layer with six experts and its BF16 "
        "base, "
        f"{r['payload']['bytes'] / 1e6:,.0f} MB;",
        "every quantized weight is decoded, and its error is compared with that of a `max` scale "
        "search. The files are in",
        "the page cache. The ratio is the time of `readinto` of the same bytes divided by the "
        "time of "
        "the check, in one",
        "process; the ratio of CPU time depends less on other work on the machine.",
        *head,
        row("scan, ratio", "scan", "ratio", "0.25", "0.4"),
        row("scan, ratio of CPU time", "scan", "cpu_ratio", "", ""),
        row("with a base, ratio", "payload", "ratio", "0.04", "0.1", 3),
        row("with a base, ratio of CPU time", "payload", "cpu_ratio", "", "", 3),
        row("with a base, speedup of two processes", "payload", "speedup", "1.7", ""),
        "",
        "Memory allocated beyond the idle process, with an embedding of "
        f"{r['memory']['largest_tensor_mb']:,.0f} MB and an expert of 16,384 x 16,384:",
        "",
        *head[1:],
        row("scan", "memory", "scan_mb", "500 MB", "150 MB", 0),
        row("with a base", "memory", "payload_mb", "500 MB", "150 MB", 0),
        row(
            "with a base, two processes", "memory", "payload_two_workers_mb", "500 MB", "150 MB", 0
        ),
        "",
    ]
    return lines


REAL_STEPS = {
    "read": "plain read of the source",
    "codec_max": "encoding the source by `max` alone, one thread",
    "codec_max_2": "the same in two processes of their own",
    "codec_sweep": "encoding the source by the sweep alone, one thread",
    "codec_sweep_2": "the same in two processes of their own",
    "sha256": "SHA-256 of the export, by hashlib",
    "cp_sync": "`cp` and `sync` of the export",
    "start": "start of an export: imports, headers, plan (`--dry-run`)",
    "export_max": "export, `max`, without the check",
    "export_sweep_1": "export, sweep, without the check, one worker",
    "export_sweep": "export, sweep, without the check",
    "export_command": "`ckptgate export`, `max`, with the check",
    "merge": "merge of the export onto the source, without the check",
    "check_header": "check, depth header",
    "check_payload": "check, depth payload",
    "check_base_numpy": "check, depth payload, with the source as base, one worker, without numba",
    "check_base_1": "check, depth payload, with the source as base, one worker",
    "check_base_pair": "two such checks next to each other",
    "check_base": "check, depth payload, with the source as base",
    "dry_run_whole": "export `--dry-run` of the whole model, 854 GB in sparse files",
    "dry_run_onto": "the same with `--onto` the vendor's",
}


def real_section(r: dict[str, Any]) -> list[str]:
    """Return the section on a layer of real size."""
    steps, nbytes = r["rounds"]["after"], r["bytes"]
    lines = [
        "## A layer of real size",
        "",
        f"`{r['command']} --experts {r['arguments']['experts']}`: one MoE layer of MiniMax-M3, "
        f"{nbytes['source'] / 1e9:.1f} GB of BF16, and its NVFP4 export of",
        f"{nbytes['export'] / 1e9:.1f} GB; {r['arguments']['workers']} workers; medians of "
        f"{counted(_rounds(steps), 'round')} in which everything runs in turn. The machine was "
        f"shared: load {r['load'][0]:.1f} at the",
        "end on two processors, so only the ratios within the table mean anything, and those of "
        "processor time more than",
        "those of seconds. Every step begins with a page cache that fills the memory. Memory is "
        "what a process and its",
        "children have allocated, sampled twice a second.",
        "",
        "| step | seconds | CPU seconds | MB |",
        "| --- | --- | --- | --- |",
    ]
    for name, text in REAL_STEPS.items():
        if name in steps:
            # Encoding alone runs for some seconds, and its rate is that of the whole source.
            cpu = "" if name.startswith("codec") else f"{_middle(steps, name, 'cpu_s'):.1f}"
            seconds = _middle(steps, name, "s")
            memory = _middle(steps, name, "allocated_mb")
            lines.append(f"| {text} | {seconds:.1f} | {cpu} | {memory:.0f} |")
    lines += ["", *_speedups(steps)]
    return [*lines, "", _versions(r), ""]


def _versions(r: dict[str, Any]) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return f"{versions}; {r['machine']}."


def _rounds(steps: dict[str, Any]) -> int:
    return min(map(len, steps.values()))


def _middle(steps: dict[str, Any], name: str, key: str) -> float:
    return statistics.median(one[key] for one in steps[name])


def before_section(r: dict[str, Any]) -> list[str]:
    """Return the section that compares a layer of real size with an earlier version."""
    before, after = r["rounds"]["before"], r["rounds"]["after"]
    lines = [
        "### Compared with version 0.1.0",
        "",
        f"`{r['command']} --experts {r['arguments']['experts']} --before TREE` of commit faf5ddf, "
        f"a layer of {r['bytes']['source'] / 1e9:.1f} GB: version 0.1.0 and that commit in turn, "
        f"{counted(_rounds(before), 'round')} and {_rounds(after)}.",
        "The machine was slower than above, and nothing filled the page cache. Today's benchmark "
        "runs `--no-check`, which version 0.1.0",
        "does not have.",
        "",
        "| step | 0.1.0, s | faf5ddf, s | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for name, text in REAL_STEPS.items():
        if name in before:
            old, new = (_middle(steps, name, "s") for steps in (before, after))
            lines.append(f"| {text} | {old:.1f} | {new:.1f} | {new / old:.2f} |")
    return [*lines, "", _versions(r), ""]


def _speedups(steps: dict[str, Any]) -> list[str]:
    """Return what two workers gain, next to what two processes gain that share nothing."""

    def gain(one: str, two: str, work: int = 1, start: str = "") -> str:
        starts = steps[start] if start else [{"s": 0.0}] * len(steps[one])
        rounds = zip(steps[one], steps[two], starts, strict=True)
        gains = (work * (a["s"] - s["s"]) / (b["s"] - s["s"]) for a, b, s in rounds)
        return f"{statistics.median(gains):.2f}x"

    rows = (
        (
            "export, sweep",
            gain("export_sweep_1", "export_sweep"),
            gain("export_sweep_1", "export_sweep", start="start"),
            gain("codec_sweep", "codec_sweep_2"),
        ),
        (
            "check",
            gain("check_base_1", "check_base"),
            gain("check_base_1", "check_base", start="check_header"),
            gain("check_base_1", "check_base_pair", 2),
        ),
    )
    return [
        "Commands with two workers against one: whole, and less their start (that of an export; a "
        "check of the headers). And two",
        "processes that share nothing against one (encoding alone; two checks), which is what the "
        "machine gains. The digest of the",
        "last shard of an export is not divided either.",
        "",
        "| step | two workers | less the start | two processes |",
        "| --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


PEERS = ("modelopt", "torchao", "compressed-tensors")
MOVED = {"nvfp4": 0.5 + 1 / 16, "mxfp8": 1 + 1 / 32}
"""Bytes per weight on the encoded side."""


def codecs_section(r: dict[str, Any]) -> list[str]:
    """Return the section on the codecs' speed."""
    found = {
        (m["op"], m["dtype"], tuple(m["shape"]), m["threads"], m["library"]): m["rounds_s"]
        for m in r["measured"]
    }
    cases = list(dict.fromkeys(key[:4] for key in found))

    def cell(case: tuple[Any, ...], library: str) -> str:
        rounds = found.get((*case, library))
        if rounds is None:
            return "not run" if library in r["not_run"] else ""
        low, middle, high = (1e3 * f(rounds) for f in (min, statistics.median, max))
        return f"{middle:.1f} ({low:.1f} to {high:.1f})"

    def times(case: tuple[Any, ...], library: str, ours: str = "ckptgate") -> str:
        """Return how many times as long as ours, round by round, the median of these."""
        theirs, mine = found.get((*case, library)), found[(*case, ours)]
        if theirs is None:
            return ""
        return f"{statistics.median(t / m for t, m in zip(theirs, mine, strict=False)):.1f}x"

    def share(case: tuple[Any, ...]) -> str:
        """Return bytes in and out a second, over those of the copy of a float32 input in the same
        round.
        """
        op, dtype = case[:2]
        moved = (4 if dtype == "f32" else 2) + MOVED[op.split("_")[0]]
        copies, mine = found[(*case, "copy")], found[(*case, "ckptgate")]
        shares = (moved * c / (8 * m) for c, m in zip(copies, mine, strict=True))
        return f"{statistics.median(shares):.2f}"

    ours = ("ckptgate", "ckptgate fresh", "ckptgate torch")
    lines = [
        "## Encoding and decoding on a CPU",
        "",
        f"`{r['command']}`, {r['seconds']} s; {r['machine']}. Milliseconds, median (range); in "
        "each "
        "round every library",
        "makes one call in its own environment, on standard normal weights. *out*: into existing "
        "tensors; *new*: into new",
        "tensors, as the other libraries do; *torch*: *out* without the compiled back end. "
        "*share*: "
        "bytes in and out per",
        f"second, relative to a float32 copy in the same rounds. Rounds: {r['rounds']}.",
        "",
        ", ".join(f"{k} {v}" for k, v in r["versions"].items() if k != "copy") + ".",
        "",
    ]
    for threads in (1, 2):
        chosen = [c for c in cases if c[3] == threads and c[0] in OPS]
        if not chosen:
            continue
        lines += [f"### {threads} thread{'s' * (threads > 1)}", ""]
        head = ["operation", "dtype", "shape", "copy", "out", "new", "torch", "share", *PEERS]
        head += ["ModelOpt / out", "ModelOpt / torch"]
        head += ["one thread / out"] if threads > 1 else []
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        for c in chosen:
            row = [
                c[0]
                .replace("_", " ")
                .upper()
                .replace("CODE", "code")
                .replace("EN", "en")
                .replace("DE", "de"),
                c[1],
            ]
            row += [
                "x".join(map(str, c[2])),
                *(cell(c, n) for n in ("copy", *ours)),
                share(c),
                *(cell(c, p) for p in PEERS),
            ]
            row += [times(c, "modelopt"), times(c, "modelopt", "ckptgate torch")]
            if threads > 1:
                alone, both = (statistics.median(found[(*c[:3], t, "ckptgate")]) for t in (1, 2))
                row.append(f"{alone / both:.2f}x")
            lines.append("| " + " | ".join(row) + " |")
        lines.append("")
    return lines + sweep_lines(found, cell) + agreement_lines(r)


OPS = ("nvfp4_encode", "nvfp4_decode", "mxfp8_encode", "mxfp8_decode")


def sweep_lines(
    found: dict[Any, list[float]], cell: Callable[[tuple[Any, ...], str], str]
) -> list[str]:
    """Return the table of the sweep."""
    case = next((key[1:3] for key in found if key[0] == "sweep"), None)
    if case is None:
        return []
    rows = [
        ("ckptgate", ("sweep", *case, 1), "ckptgate"),
        ("ckptgate, torch", ("sweep", *case, 1), "ckptgate torch"),
        ("ckptgate, 2 threads", ("sweep", *case, 2), "ckptgate"),
        ("our brute force (`sweep_all`, torch)", ("sweep_all", *case, 1), "ckptgate torch"),
        ("ModelOpt's loop, `NVFP4MSECalibrator`", ("sweep", *case, 1), "modelopt"),
    ]
    count = math.prod(case[1])
    base = statistics.median(found[(*rows[0][1], rows[0][2])])
    lines = [
        f"### FP8 scale sweep, {case[0]} {case[1][0]}x{case[1][1]}",
        "",
        "| search | ms | Mweights/s | relative to ckptgate |",
    ]
    lines.append("| --- | --- | --- | --- |")
    for name, key, library in rows:
        if (rounds := found.get((*key, library))) is not None:
            middle = statistics.median(rounds)
            speed, relative = f"{count / middle / 1e6:.1f}", f"{middle / base:.1f}"
            lines.append(f"| {name} | {cell(key, library)} | {speed} | {relative} |")
    return [*lines, ""]


def agreement_lines(r: dict[str, Any]) -> list[str]:
    """Return the share of results that equal ours."""
    count = sum(len(libraries) for libraries in r["agreement"].values())
    lines = [
        "### Agreement",
        "",
        "Share of bytes (decoding: of values) that equal ours, by leaf, for those of "
        f"{count} comparisons that are not fully equal.",
        "",
        "| case | library | equal |",
        "| --- | --- | --- |",
    ]
    for case, libraries in r["agreement"].items():
        for library, leaves in libraries.items():
            if all(v == 1 for v in leaves.values()):
                continue
            shares = ", ".join(
                f"{leaf} {'all' if v == 1 else f'{v:.7f}'}" for leaf, v in sorted(leaves.items())
            )
            lines.append(f"| {case} | {library} | {shares} |")
    return [*lines, ""]


def scoring_section() -> list[str]:
    """Return the cost of scoring relative to a plain forward pass."""
    folder = DOCS.parent / "benchmarks" / "results"
    found = {
        n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8"))
        for n in ("gate", "gate-wide")
    }
    small, wide = found.values()
    ways = {
        "forward": "forward pass of base and candidate",
        "lockstep": "scored in lockstep, exact KL",
        "top_k": "scored with the top 64 tokens",
        "declared": "scored in lockstep, activations rounded as declared",
        "lm_eval": "lm-eval on the same windows, loss only",
    }
    lines = [
        "## Scoring",
        "",
        "Golden: MiniMax-M3 with 2.4 million parameters and an export of it, "
        f"{small['tokens']:,} tokens,",
        f"`{small['command']}`. Wide: a Qwen3-MoE of {wide['parameters']:,} parameters with random "
        "weights (24 layers,",
        "hidden size 1,024, vocabulary of 32,768, 4 of 16 experts) and an export of it, "
        f"{wide['tokens']:,} tokens,",
        f"`{wide['command']}`. CPU time of one thread, medians of {len(small['rounds'])} and "
        f"{len(wide['rounds'])}",
        "interleaved rounds; ratios to the forward pass of the same round, with their range. The "
        "cost "
        "of scoring grows with",
        "the vocabulary, the cost of the forward pass with the parameters.",
        "",
        f"{', '.join(f'{k} {v}' for k, v in wide['versions'].items())}; {wide['machine']}.",
        "",
        "| operation | golden, tokens/s | ratio | wide, tokens/s | ratio |",
        "| --- | --- | --- | --- | --- |",
    ]

    def cells(r: dict[str, Any], key: str) -> str:
        if key not in r["ratio_to_forward"]:
            return "not measured | "
        each = [row[key] / row["forward"] for row in r["rounds"]]
        span = "" if key == "forward" else f" ({min(each):.2f} to {max(each):.2f})"
        return f"{r['tokens_per_second'][key]:,} | {r['ratio_to_forward'][key]:.2f}{span}"

    lines += [
        f"| {text} | {cells(small, key)} | {cells(wide, key)} |" for key, text in ways.items()
    ]
    return [*lines, ""]


def device_section() -> list[str]:
    """Return the rates of codecs and searches on each device that was measured, and calibration
    next to a plain forward pass.
    """
    folder = DOCS.parent / "benchmarks" / "results"
    results = [json.loads(p.read_text(encoding="utf-8")) for p in folder.glob("device-*.json")]
    lines = ["## By device", ""]
    for r in sorted(results, key=lambda r: str(r["command"])):
        versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
        medians = {n: statistics.median(row[n] for row in r["rounds"]) for n in r["rounds"][0]}
        ratios = [row["calibrate"] / row["forward"] for row in r["rounds"]]
        rates = {name: nbytes / medians[name] / 1e9 for name, nbytes in r["nbytes"].items()}
        sentence = (
            f"`{r['command']}`: {r['machine']}; {versions}; medians of {len(r['rounds'])} "
            "rounds in which everything runs in turn. Encoding and decoding of a BF16 weight: "
            "bytes in and out. Searches: bytes in. `calibrate` takes "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) of the "
            "plain forward pass of the golden MiniMax-M3, 512 tokens at a time."
        )
        lines += [
            *textwrap.wrap(sentence, 120, break_on_hyphens=False),
            "",
            "| operation | GB/s | share of a copy |",
            "| --- | --- | --- |",
            *(f"| {n} | {v:#.3g} | {v / rates['copy']:.3f} |" for n, v in rates.items()),
            "",
        ]
    if not any("cuda" in r["command"] for r in results):
        lines += ["No GPU has been measured: `python benchmarks/device.py` does it.", ""]
    return lines


def busy_section() -> list[str]:
    """Return what another process costs a command that runs a model."""
    path = DOCS.parent / "benchmarks" / "results" / "busy.json"
    r = json.loads(path.read_text(encoding="utf-8"))
    rounds = r["rounds"]
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    sentence = (
        f"`{r['command']}`: each command on the golden MiniMax-M3, alone and next to a process "
        f"that holds one processor, in turn; medians of {len(rounds)} rounds. `calibrate` is one "
        "process; `score` and `gate` start one for each processor, and two processes that share "
        f"two processors with a third take 1.5 times as long at best. {versions}; {r['machine']}."
    )
    lines = [
        "## With other work on the machine",
        "",
        *textwrap.wrap(sentence, 120, break_on_hyphens=False),
        "",
        "| command | alone, s | next to it, s | ratio |",
        "| --- | --- | --- | --- |",
    ]
    for command, ratio in r["ratios"].items():
        alone, beside = (
            statistics.median(row[command][key] for row in rounds) for key in ("quiet_s", "busy_s")
        )
        lines.append(f"| `{command}` | {alone:.1f} | {beside:.1f} | {ratio:.2f} |")
    return [*lines, ""]


def coverage_table() -> str:
    """Return verifier/gate/coverage.json: the simulated coverage that the gate prints, by number of
    documents.
    """
    r = json.loads(
        (DOCS.parent / "benchmarks" / "results" / "intervals.json").read_text(encoding="utf-8")
    )
    found = {}
    for count in sorted({x["documents"] for x in r["rows"]}):
        rows = [x for x in r["rows"] if x["documents"] == count]

        def span(key: str, effects: list[str], rows: list[dict[str, Any]] = rows) -> list[float]:
            values = [x[key] for x in rows if x["effect"] in effects]
            return [min(values), max(values)]

        found[str(count)] = {
            "symmetric": span("gate", r["symmetric"]),
            "skewed": span("gate", ["skewed"]),
            "rare": span("gate", ["rare"]),
            "symmetric_high": span("high_holds", r["symmetric"]),
            "skewed_high": span("high_holds", ["skewed"]),
            "rare_high": span("high_holds", ["rare"]),
            "worst_found": span("worst_found", ["rare"]),
            "worst_false": span("worst_false", r["symmetric"]),
        }
    return json.dumps(found, indent=1) + "\n"


REMOTE = ("<!-- requests: rendered by tools/make_docs.py -->", "<!-- end of requests -->")


def remote_table() -> list[str]:
    """Return the table of requests and bytes per command, as benchmarks/remote.py measured it."""
    file = DOCS.parent / "benchmarks" / "results" / "remote.json"
    r = json.loads(file.read_text(encoding="utf-8"))
    known = r["checkpoints"]
    release, tiny = known["org/MiniMax-M3-NVFP4"], known["org/tiny-nvfp4"]
    lines = [
        f"`{r['command']}`: a server in the shape of the hub waits {1000 * r['delay']:.0f} ms "
        "before each answer and counts requests and bytes, redirects included.",
        f"MiniMax-M3-NVFP4 is the real layout, {release['tensors']:,} tensors in "
        f"{release['shards']} shards ({size(release['bytes'])}; headers and JSON files "
        f"{size(release['headers'])}); tiny-nvfp4 has {size(tiny['bytes'])}, its base tiny-bf16 "
        f"{size(known['org/tiny-bf16']['bytes'])}. CPU time is of the whole "
        "process.",
        "",
        "| ckptgate | requests | fetched | CPU time |",
        "| --- | ---: | ---: | ---: |",
    ]
    for row in r["rows"]:
        numbers = f"{row['requests']:,} | {size(row['bytes'])} | {row['cpu_seconds']:.1f} s"
        lines.append(f"| `{row['command']}` | {numbers} |")
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return [*lines, "", f"{versions}; {r['machine']}.", ""]


def remote_page() -> str:
    """Return docs/remote.md with its table of requests."""
    text = (DOCS / "remote.md").read_text(encoding="utf-8")
    before, after = text.index(REMOTE[0]), text.index(REMOTE[1])
    table = "\n".join([REMOTE[0], "", *remote_table()])
    return text[:before] + table + text[after:]


def scale_page() -> str:
    """Return docs/scale.md with its costs and faults, from committed results."""
    text = (DOCS / "scale.md").read_text(encoding="utf-8")
    results = DOCS.parent / "benchmarks" / "results" / "real.json"
    if not results.is_file():
        return text
    before, after = text.index(COSTS[0]), text.index(COSTS[1])
    lines = scale_lines(json.loads(results.read_text(encoding="utf-8")))
    text = text[:before] + "\n".join([COSTS[0], "", *lines, ""]) + text[after:]
    before, after = text.index(FAULTS[0]), text.index(FAULTS[1])
    return text[:before] + "\n".join([FAULTS[0], "", *faults_lines(), ""]) + text[after:]


def gate_page() -> str:
    """Return docs/gate.md with its table of coverage, from the results that the benchmark wrote."""
    r = json.loads(
        (DOCS.parent / "benchmarks" / "results" / "intervals.json").read_text(encoding="utf-8")
    )
    lines = [
        MARK[0],
        "",
        "| documents | effects | lengths | tokens only | linearized | jackknife | **gate** "
        "| upper bound | lower bound | false alarms | found |",
        "| --- " * 11 + "|",
    ]
    for x in r["rows"]:
        shown = ("token", "linear", "jackknife", "gate", "high_holds", "low_holds", "worst_false")
        numbers = [f"{100 * x[k]:.1f}" for k in shown]
        numbers.append("" if x["worst_found"] is None else f"{100 * x['worst_found']:.1f}")
        cells = (str(x["documents"]), r["effects"][x["effect"]], x["lengths"], *numbers)
        lines.append(f"| {' | '.join(cells)} |")
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    lines += [
        "",
        f"`{r['command']}`, {r['rows'][0]['rounds']:,} rounds per row; {versions}.",
        "",
        MARK[1],
    ]
    text = (DOCS / "gate.md").read_text(encoding="utf-8")
    text = (
        text[: text.index(MARK[0])] + "\n".join(lines) + text[text.index(MARK[1]) + len(MARK[1]) :]
    )
    return (
        text[: text.index(DAMAGE[0])]
        + damage_table()
        + text[text.index(DAMAGE[1]) + len(DAMAGE[1]) :]
    )


def suite_page() -> str:
    """Return docs/suite.md with its tables, from the results of the simulation."""
    text = (DOCS / "suite.md").read_text(encoding="utf-8")
    before, after = text.index(SUITE[0]), text.index(SUITE[1])
    return text[:before] + "\n".join([SUITE[0], "", *suite_lines(), "", ""]) + text[after:]


def suite_lines() -> list[str]:
    """Return what benchmarks/suite.py simulated, as tables."""
    file = DOCS.parent / "benchmarks" / "results" / "suite.json"
    r = json.loads(file.read_text(encoding="utf-8"))
    lines = [
        "Items that show a loss of accuracy with 80% power at a one-sided error of 5%: by "
        "McNemar's test on the same answers (paired), and",
        "by the unpaired rule of TensorRT-LLM's accuracy tests, a difference beyond z(0.05) "
        "sqrt(2 * 50^2 / n) points. *Planned*: what",
        "that rule's own formula asks for (β = 0.2, independent answers); *unpaired*: what it "
        "needs on answers to the same items. *False*: how",
        "often a candidate without a loss is called a regression.",
        "",
        "| answers that differ | loss | planned | unpaired | paired | unpaired / paired | false, "
        "unpaired | false, paired |",
        "| --- " * 8 + "|",
    ]
    lines += [
        f"| {x['discordant']:.0%} | {x['loss']:.1%} | {x['unpaired_planned']:,} | "
        f"{x['unpaired']:,} | {x['paired']:,} | {x['unpaired'] / x['paired']:.1f} | "
        f"{x['false_unpaired']:.1%} | {x['false_paired']:.1%} |"
        for x in r["items"]
    ]
    lines += [
        "",
        "Criteria that are all at their margin (corpora of 62 documents, tasks of 1,000 items, "
        "lengths of 500 completions): how often one is called",
        "beyond it, each at 5% and by Holm; and how often a suite passes with one criterion at its "
        "margin.",
        "",
        "| criteria | wrong failure, each at 5% | wrong failure, Holm | wrong pass |",
        "| --- " * 4 + "|",
    ]
    lines += [
        f"| {x['criteria']} | {x['uncorrected']:.1%} | {x['holm']:.1%} | {x['wrong_pass']:.1%} |"
        for x in r["families"]
    ]
    lines += [
        "",
        "A candidate at its margin that is tried again on other text until it passes:",
        "",
        "| looks | each at 5% | as the suite counts |",
        "| --- " * 3 + "|",
    ]
    lines += [f"| {x['looks']} | {x['each_5']:.1%} | {x['suite']:.1%} |" for x in r["looks"]]
    lines += [
        "",
        "Repeated answers at a margin that is the truth, where one item in 20 loses 70% of its "
        "chance to be answered right; *naive*: all answers",
        "taken as independent.",
        "",
        "| items | repeats | wrong pass | wrong failure | naive wrong pass | naive wrong failure |",
        "| --- " * 6 + "|",
    ]
    lines += [
        f"| {x['items']:,} | {x['repeats']} | {x['pass']:.1%} | {x['fail']:.1%} | "
        f"{x['naive_pass']:.1%} | {x['naive_fail']:.1%} |"
        for x in r["repeats"]
    ]
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return [*lines, "", f"`{r['command']}`, {r['rounds']:,} rounds per row; {versions}."]


def damage_table() -> str:
    """Return the table of damaged exports and the measures that catch them, from the results of the
    benchmark.
    """
    return "\n".join([DAMAGE[0], "", *damage_lines(), "", DAMAGE[1]])


ENGINES = {
    "qwen3_moe": "vLLM 0.32: NVFP4, MXFP8, MXFP8 with NVFP4 experts, FP8",
    "minimax_m2": "vLLM 0.32: NVFP4",
    "minimax_m3_vl": "vLLM 0.32: MXFP8 with NVFP4 experts",
}
"""Engines whose loader accepted a small checkpoint of that layout and wrote every parameter;
others were not tested."""


COLUMNS = (
    "*detected*: linear layers of routed experts that `exporter.detect` finds in the model, and "
    "again "
    "from its config.",
    "*exported*: from disk (`export`) and from memory (`export_model`), with identical bytes. "
    "Names, "
    "shapes and bytes of the layout equal those of transformers' `save_pretrained`. Every expert "
    "is "
    "quantized, and only linear layers of the text model are.",
    "*check*: `check --depth payload` has no error and no warning, with the source as base and "
    "without "
    "a base; *base only*: the layout of the family is not known without a base.",
    "*round trip*: the quantized tensors and their scales are converted to the shapes in memory "
    "and "
    "back, with identical bytes.",
    "*reload*: decoded by the verifier, loaded by transformers without missing, unexpected or "
    "mismatched keys; pass-through tensors keep their values, quantized ones are within the "
    "error of "
    "their format; logits are finite.",
    "*engines*: engines whose loader accepted such a checkpoint and wrote every parameter. Most "
    "were "
    "not tested: an export is not a promise that an engine serves the family.",
)


def families_page() -> str:
    """Return docs/families.md, from the results of the zoo."""
    r = json.loads((DOCS.parent / "tests" / "zoo" / "results.json").read_text(encoding="utf-8"))
    rows = r["families"]
    works, refused = [x for x in rows if working(x)], [x for x in rows if not working(x)]
    classes = {c for x in rows for c in x.get("classes", ())}
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    introduction = (
        f"`{r['command']}` (`tox -e zoo`), {versions}: small models of {len(rows)} architectures "
        "with "
        f"random weights, with the {len(classes)} classes of transformers that have fused experts. "
        f"**{len(works)} are exported, round-tripped and reloaded; {len(refused)} are "
        "rejected**, each "
        "with a reason. If a new version of transformers adds a class, `tests/zoo/test_zoo.py` "
        "fails "
        "and names it until the zoo has a model of it."
    )
    lines = [
        "# Families with fused experts",
        "",
        "Rendered by `tools/make_docs.py` from `tests/zoo/results.json`.",
        "",
        *textwrap.wrap(introduction, 120),
        "",
        *(
            line
            for item in COLUMNS
            for line in textwrap.wrap(f"- {item}", 120, subsequent_indent="  ")
        ),
        "",
        "| family | experts in memory | on the hub | detected | exported | check | round trip | "
        "reload "
        "| recipes | engines |",
        "| --- " * 10 + "|",
    ]
    for x in works:
        steps = [x["recipes"][n] for n in working(x)]
        alone = all(s["check"] == "ok" for s in steps)
        cells = [
            f"`{x['family']}`",
            "; ".join(dict.fromkeys(map(_layout, x["experts"]))),
            x["stored"],
            f"{x['linears']}",
            "disk, memory",
            "yes" if alone else "base only",
            "yes",
            "yes",
            "all" if len(steps) == 3 else ", ".join(f"`{n}`" for n in working(x)),
            ENGINES.get(x["family"], "not tested"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    names = ", ".join(f"`{n}`" for n in rows[0]["recipes"])
    lines += ["", f"Recipes: {names}.", "", f"## Rejected ({len(refused)})", ""]
    lines += ["| family | experts in memory | on the hub | reason |", "| --- " * 4 + "|"]
    for x in refused:
        layouts = "; ".join(dict.fromkeys(map(_layout, x.get("experts", {}))))
        experts = layouts or ", ".join(x.get("classes", ()))
        reason = next(iter(reasons(x)), "").replace("|", "/")
        lines.append(f"| `{x['family']}` | {experts} | {x.get('stored', '')} | {reason} |")
    lines += ["", "## Layouts known without a base", ""]
    names = ", ".join(f"`{n}`" for n in known())
    sentence = (
        f"`verifier/layouts/families` has {len(known())} families, generated by "
        f"`tools/make_families.py` from checkpoints that transformers saves: {names}."
    )
    lines += textwrap.wrap(sentence, 120)
    return "\n".join(lines) + "\n"


def working(row: dict[str, Any]) -> list[str]:
    """Return the recipes with which every step of the zoo succeeded."""
    if (row["built"], row.get("detected"), row.get("layout")) != ("ok", "ok", "ok"):
        return []
    fine = ("ok", "inconclusive")
    return [
        n
        for n, s in row["recipes"].items()
        if "reload" in s and all(v.startswith(fine) for v in s.values())
    ]


def reasons(row: dict[str, Any]) -> list[str]:
    """Return why a family is rejected, each reason once."""
    steps = [row["built"], row.get("detected", "ok"), row.get("layout", "ok")]
    steps += [v for s in row.get("recipes", {}).values() for v in s.values()]
    found = dict.fromkeys(
        s.removeprefix("refused: ") for s in steps if not s.startswith(("ok", "inconclusive"))
    )
    stacked = [f for f in found if "stacks of this family" in f]
    return stacked[:1] or list(found)


def _layout(words: str) -> str:
    """Return a layout of `Detection.layouts` without the class and the sizes of the model."""
    return re.sub(r"^\w+: \d+ experts, |, hidden .*$", "", words)


def locate_page() -> str:
    """Return docs/locate.md, with what the benchmark found."""
    page = (DOCS / "locate.md").read_text(encoding="utf-8")
    file = DOCS.parent / "benchmarks" / "results" / "locate.json"
    r = json.loads(file.read_text(encoding="utf-8"))
    rows = [
        row | {"golden": e["golden"], "scales": e["scales"]}
        for e in r["exports"]
        for row in e["rows"]
    ]
    start, end = LOCATED
    before, _, rest = page.partition(start)
    body = "\n".join(located_lines(r, rows))
    return f"{before}{start}\n\n{body}\n\n{end}{rest.partition(end)[2]}"


def located_cell(row: dict[str, Any]) -> str:
    """Return the KL ratio of a damage, and whether the first blame is right."""
    blame = ("right" if row["right"] else "wrong") if row["first"] else ""
    notes = [blame] * bool(blame) + ["open"] * (row["outcome"] == "inconclusive")
    return f"{row['ratio']:.2f}" + f" ({', '.join(notes)})" * bool(notes)


def located_lines(r: dict[str, Any], rows: list[dict[str, Any]]) -> list[str]:
    """Return what the benchmark of `ckptgate locate` found."""
    damaged = [row for row in rows if row["damage"] != "no damage"]
    beyond = [row for row in damaged if row["outcome"] == "failed"]
    open_ = [row for row in damaged if row["outcome"] == "inconclusive"]
    goldens = sorted({row["golden"] for row in rows})
    with_blame = [row for row in open_ if row["first"]]
    right, right_open = (sum(row["right"] for row in group) for group in (beyond, with_blame))
    lines = [
        f"`{r['command']}`, {r['documents']} documents of {r['tokens']} tokens; run on: "
        f"{', '.join(goldens)}. {len(damaged)} damaged exports: {len(beyond)} failed, "
        f"{len(open_)} inconclusive, {len(damaged) - len(beyond) - len(open_)} within the margin. "
        f"The first blame is right in {right} of the {len(beyond)} that failed, and in "
        f"{right_open} of the {len(with_blame)} inconclusive ones that diverge more than the norm; "
        f"the largest cost is {max(row['cost'] for row in rows):.2f} gates.",
        "",
        "A cell has the KL ratio and, in brackets, whether the first blame is right; *open*: the "
        "search is inconclusive; without brackets the ratio is within the margin.",
        "",
        f"| golden, scales | damage | {' | '.join(f'layer {n}' for n in LAYERS)} |",
        "| --- " * (2 + len(LAYERS)) + "|",
    ]
    by_layer: dict[tuple[str, str], dict[int, str]] = {}
    for row in rows:
        key = f"{row['golden']}, {row['scales']}", row["damage"]
        by_layer.setdefault(key, {})[max(row["layer"], 0)] = located_cell(row)
    for key, cells in by_layer.items():
        lines.append(f"| {' | '.join([*key, *(cells.get(n, '') for n in LAYERS)])} |")
    return lines


def main() -> int:
    """Write or compare the pages."""
    stale = []
    pages = {
        "rules.md": rules_page(),
        "exit-codes.md": exit_codes_page(),
        "performance.md": performance_page(),
        "remote.md": remote_page(),
    }
    pages |= {"gate.md": gate_page(), "../verifier/gate/coverage.json": coverage_table()}
    pages |= {"suite.md": suite_page(), "families.md": families_page()}
    pages |= {"goldens.md": goldens_page(), "locate.md": locate_page()}
    pages |= {"command-line.md": command_line_page(), "python.md": python_page(), **drawings()}
    pages |= {"scale.md": scale_page()}
    for name, text in pages.items():
        file = DOCS / name
        if "--check" in sys.argv:
            if not file.is_file() or file.read_text(encoding="utf-8") != text:
                stale.append(name)
        else:
            file.write_text(text, encoding="utf-8")
    if stale:
        print("out of date (run python tools/make_docs.py):", ", ".join(stale))
    return bool(stale)


if __name__ == "__main__":
    sys.exit(main())
