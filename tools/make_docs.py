# SPDX-License-Identifier: Apache-2.0
"""Render docs/rules.md and docs/exit-codes.md from the code, docs/performance.md from results.

    python tools/make_docs.py [--check]

``--check`` writes nothing and fails where a committed page differs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from verifier.errors import EXIT_CODES
from verifier.rules import all_rules

DOCS = Path(__file__).parent.parent / "docs"
FAMILIES = {
    "1": "Container, index, files", "2": "Names and layout", "3": "Scale keys, dtypes, shapes", "4": "Configuration",
    "5": "Values", "6": "Reload and round trip",
}  # fmt: skip
MARK = ("<!-- coverage: rendered by tools/make_docs.py -->", "<!-- end of coverage -->")
DAMAGE = ("<!-- damage: rendered by tools/make_docs.py -->", "<!-- end of damage -->")
NOT_YET = """## Not judged yet

Known defects without a rule in this version: QC403, QC405, QC411 to QC415, QC505 to QC507, QC509 to QC514, QC517, and
everything that needs a loaded model or an engine (QC601 to QC604, QC608). Perplexity (QC7xx) is `ckptgate gate`. QC108
(shared storage at save) cannot occur in a file, and the key that it loses is QC301's or QC302's; QC602, QC603 and QC607
need an engine's own loader or a second export.
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
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "headers.json").read_text(encoding="utf-8"))

    def row(what: str, key: str) -> str:
        seconds, memory = [x[f"{key}_s"] for x in r["rounds"]], r["median"][f"{key}_mb"]
        return f"| {what} | {r['median'][f'{key}_s']:.2f} ({min(seconds):.2f} to {max(seconds):.2f}) | {memory:.0f} |"

    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return "\n".join([
        "# Performance", "", "Rendered from `benchmarks/results/` by `tools/make_docs.py`.", "",
        "## Header check of the real MiniMax-M3 mixed release", "",
        f"{r['tensors']:,} tensors in 60 sparse files; `{r['command']}`, median of {len(r['rounds'])} rounds (range),",
        f"each a process of its own, interleaved. {versions}; {r['machine']}.", "",
        "| process | seconds | peak MB |", "| --- | --- | --- |",
        row("`ckptgate check`", "check"), row("parse the same headers with `json` alone", "parse"),
        f"| ratio | {r['median']['check_s'] / r['median']['parse_s']:.1f} | |", "", *scoring_section(),
    ])  # fmt: skip


def scoring_section() -> list[str]:
    """Return what scoring costs over a plain forward."""
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "gate.json").read_text(encoding="utf-8"))
    ways = {
        "forward": "forward of base and candidate alone", "lockstep": "scored in lockstep, exact KL",
        "top_k": "scored with the 64 likeliest tokens",
    }  # fmt: skip
    lines = [
        "## Scoring", "",
        f"The MiniMax-M3 golden (2.4 million parameters) and an export of it on the same {r['tokens']:,} tokens;",
        f"`{r['command']}`, median of {len(r['rounds'])} interleaved rounds of processor time. Larger models, whose",
        "forward weighs more, were not measured.", "",
        f"{', '.join(f'{k} {v}' for k, v in r['versions'].items())}; {r['machine']}.", "",
        "| what | tokens a second | ratio |", "| --- | --- | --- |",
    ]  # fmt: skip
    lines += [f"| {t} | {r['tokens_per_second'][k]:,} | {r['ratio_to_forward'][k]:.2f} |" for k, t in ways.items()]
    return [*lines, ""]


def coverage_table() -> str:
    """Return verifier/gate/coverage.json: what the gate prints of the simulated coverage, by number of documents."""
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    found = {}
    for count in sorted({x["documents"] for x in r["rows"]}):
        rows = [x for x in r["rows"] if x["documents"] == count]

        def span(key: str, effects: list[str], rows: list[dict[str, Any]] = rows) -> list[float]:
            values = [x[key] for x in rows if x["effect"] in effects]
            return [min(values), max(values)]

        found[str(count)] = {
            "symmetric": span("gate", r["symmetric"]), "skewed": span("gate", ["skewed"]), "rare": span("gate", ["rare"]),
            "symmetric_high": span("high_holds", r["symmetric"]), "skewed_high": span("high_holds", ["skewed"]),
            "rare_high": span("high_holds", ["rare"]),
            "worst_found": span("worst_found", ["rare"]), "worst_false": span("worst_false", r["symmetric"]),
        }  # fmt: skip
    return json.dumps(found, indent=1) + "\n"


def gate_page() -> str:
    """Return docs/gate.md with its table of coverage, from the results that the benchmark wrote."""
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "coverage.json").read_text(encoding="utf-8"))
    lines = [
        MARK[0], "",
        "| documents | effects | lengths | tokens alone | linearized | jackknife | **gate** | upper bound | lower bound "
        "| false | found |",
        "| --- " * 11 + "|",
    ]  # fmt: skip
    for x in r["rows"]:
        shown = ("token", "linear", "jackknife", "gate", "high_holds", "low_holds", "worst_false")
        numbers = [f"{100 * x[k]:.1f}" for k in shown]
        numbers.append("" if x["worst_found"] is None else f"{100 * x['worst_found']:.1f}")
        lines.append(f"| {x['documents']} | {r['effects'][x['effect']]} | {x['lengths']} | {' | '.join(numbers)} |")
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    lines += ["", f"`{r['command']}`, {r['rows'][0]['rounds']:,} rounds a row; {versions}.", "", MARK[1]]
    text = (DOCS / "gate.md").read_text(encoding="utf-8")
    text = text[: text.index(MARK[0])] + "\n".join(lines) + text[text.index(MARK[1]) + len(MARK[1]) :]
    return text[: text.index(DAMAGE[0])] + damage_table() + text[text.index(DAMAGE[1]) + len(DAMAGE[1]) :]


def damage_table() -> str:
    """Return what each measure of the gate says of damaged exports, from the results that the benchmark wrote."""
    r = json.loads((DOCS.parent / "benchmarks" / "results" / "damage.json").read_text(encoding="utf-8"))
    lines = [
        DAMAGE[0], "",
        f"| damage (layer {r['layer']}) | loss | absolute | drift [90 %] | with drift margin | KL to the good one | top-1 |",
        "| --- " * 7 + "|", f"| none | {r['good']['loss']:+.4f} | {r['good']['absolute']} | | | | |",
    ]  # fmt: skip
    for x in r["rows"]:
        middle, low, high = x["drift"]
        lines.append(
            f"| {x['damage']} | {x['loss']:+.4f} | {x['absolute']} | {middle:+.4f} [{low:+.4f}, {high:+.4f}] "
            f"| {x['with_drift']} | {x['kl_to_good']:.4f} | {x['top1_to_good']:.1%} |"
        )
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return "\n".join([*lines, "", f"`{r['command']}`; {versions}.", "", DAMAGE[1]])


def main() -> int:
    """Write or compare the pages."""
    stale = []
    pages = {"rules.md": rules_page(), "exit-codes.md": exit_codes_page(), "performance.md": performance_page()}
    pages |= {"gate.md": gate_page(), "../verifier/gate/coverage.json": coverage_table()}
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
