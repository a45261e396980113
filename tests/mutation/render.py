# SPDX-License-Identifier: Apache-2.0
"""Renders docs/proof.md from the results of the mutation score and of fuzzing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "proof.md"
SURVIVORS = 60
INTRO = """\
# Proof that the verifier catches defects, and reports nothing else

Rendered from `tests/mutation/results.json` and `tests/fuzz/results.json`.

## Every rule, on your machine

`ckptgate selftest` makes tiny valid checkpoints and verifies that each passes cleanly with and
without a base. It then injects every applicable known defect, and verifies that the rule fires. It
needs neither torch nor a network.

## Mutation score
"""
SCORES = (("score", "tiny, and two of ModelOpt's"), ("modelopt_score", "five of ModelOpt's"))


def render() -> str:
    """Return the page."""
    results = json.loads((HERE / "results.json").read_text())
    formats, fuzz = HERE / "formats.json", HERE.parent / "fuzz" / "results.json"
    lines = [INTRO, *_scores(results), "", *_kinds(results["kinds"])]
    lines += ["", *_survivors(results["survivors"])]
    if formats.exists():
        lines += ["", *_formats(json.loads(formats.read_text()))]
    if fuzz.exists():
        lines += ["", *_fuzz(json.loads(fuzz.read_text()))]
    return "\n".join(lines) + "\n"


def _scores(results: dict[str, Any]) -> list[str]:
    lines = [
        f"`{results['command']}` (`tox -e mutation`), {_versions(results['versions'])}.",
        "",
        "`tests/mutation/KINDS.md`, committed before the first score, defines what counts as harm,",
        "and what a check needs to catch each kind.",
        "",
        "| checkpoints | base | caught | of | percent | stopped (exit code not 0) |",
        "| --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for key, checkpoints in SCORES:
        for column, base in (("with_base", "yes"), ("without_base", "no")):
            if results[key]:
                row = results[key][column]
                cells = (row["caught"], row["of"], row["percent"], row["stopped"])
                lines.append(f"| {checkpoints} | {base} | {' | '.join(map(str, cells))} |")
    harmless = results["harmless"]
    return [
        *lines,
        "",
        f"Harmless rewrites: {harmless['alarms']} new findings on {harmless['n']}. "
        f"Crashes: {len(results['crashes'])}.",
        "",
        "The checkpoints are small, so one block is a larger share of a tensor than in a released",
        "one: rules that measure a whole tensor (QC515) do better here than on one of millions.",
    ]


def _kinds(kinds: dict[str, Any]) -> list[str]:
    lines = [
        "| kind | needs | number | caught | stopped | without base | rules that fired most |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in kinds.items():
        fired = {rule: n for rule, n in row.get("rules", {}).items() if rule != "verdict"}
        rules = ", ".join(f"{rule} {n}" for rule, n in fired.items())
        without = row["caught_without"] if row["knows"] == "nothing" else ""
        cells = (row["knows"], row["n"], row["caught"], row["stopped"], without, rules)
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    return lines


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())


def _survivors(survivors: list[dict[str, Any]]) -> list[str]:
    if not survivors:
        return ["All mutations were caught."]
    lines = [
        f"## Survivors ({len(survivors)})",
        "",
        f"`python -m tests.mutation --seed N` reproduces one. results.json has all; here are"
        f" {min(SURVIVORS, len(survivors))}.",
        "",
        "| seed | kind | checkpoint | edit | caught with base, without |",
        "| ---: | --- | --- | --- | --- |",
    ]
    for s in survivors[:SURVIVORS]:
        caught = ", ".join("yes" if t else "no" for t in s["caught"])
        edit = s["what"][:110].replace("|", "/")
        lines.append(f"| {s['seed']} | `{s['kind']}` | {s['checkpoint']} | {edit} | {caught} |")
    return lines


def _formats(results: dict[str, Any]) -> list[str]:
    lines = [
        "## Mutations of every format",
        "",
        f"`{results['command']}`: {results['n']:,} mutations of clean checkpoints in"
        f" {len(results['formats'])} formats (docs/formats.md) and {results['harmless']:,}"
        f" harmless rewrites. Survivors: {len(results['survivors'])}. New findings on rewrites:"
        f" {len(results['alarms'])}. Crashes: {len(results['crashes'])}.",
        "",
        "| kind | edit | needs | number | caught | without base |",
        "| --- | --- | --- | ---: | ---: | ---: |",
    ]
    for name, row in results["kinds"].items():
        without = row["caught_without"] if row["knows"] == "nothing" else ""
        cells = (row["edit"], row["knows"], row["n"], row["caught"], without)
        lines.append(f"| `{name}` | {' | '.join(map(str, cells))} |")
    for m in results["survivors"]:
        lines.append(f"* seed {m['seed']} survives: `{m['kind']}` in {m['format']}, {m['what']}")
    return lines


def _fuzz(results: dict[str, Any]) -> list[str]:
    commands = results["commands"]
    slowest, memory = "slowest_seconds", "peak_megabytes"
    return [
        "## Hostile input",
        "",
        f"`{results['command']}` (`tox -e fuzz`), engine {results['engine']}, "
        f"{_versions(results['versions'])}.",
        "",
        "Inputs are edits of valid headers, indexes and configs, in their structure and in their",
        "bytes; `tests/fuzz/hostile.py` lists them.",
        "",
        "| | in process | as command lines |",
        "| --- | ---: | ---: |",
        f"| inputs | {results['runs']:,} | {commands['runs']:,} |",
        f"| inputs whose scales or values were checked | {results['reached_the_rules']:,} | |",
        f"| exit codes | {_codes(results['exit_codes'])} | {_codes(commands['exit_codes'])} |",
        f"| slowest, processor seconds | {results[slowest]} | {commands[slowest]} |",
        f"| largest resident memory, MB | {results[memory]} | {commands[memory]} |",
        f"| failures | {len(results['failures'])} | {len(commands['failures'])} |",
    ]


def _codes(codes: dict[str, int]) -> str:
    return ", ".join(f"{code}: {count:,}" for code, count in codes.items())
