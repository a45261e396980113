# SPDX-License-Identifier: Apache-2.0
"""Render docs/proof.md from the results of the mutation score and of fuzzing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PAGE = ROOT / "docs" / "proof.md"
SURVIVORS = 60


def render() -> str:
    """Return the page."""
    results = json.loads((HERE / "results.json").read_text())
    fuzz = HERE.parent / "fuzz" / "results.json"
    parts = [
        "# Proof that the verifier catches defects and raises no false alarms",
        "",
        "Rendered from `tests/mutation/results.json` and `tests/fuzz/results.json`.",
        "",
        "## Every rule, on your machine",
        "",
        "`ckptgate selftest` creates tiny valid checkpoints, verifies that each passes cleanly "
        "with and "
        "without a base, injects every applicable known defect, and verifies that the rule "
        "fires. It "
        "needs neither torch nor a network.",
        "",
        "## Mutation score",
        "",
        f"`{results['command']}` (`tox -e mutation`), {_versions(results['versions'])}. "
        "`tests/mutation/KINDS.md` defines harm, and what a check must know to catch each kind; "
        "it was "
        "committed before the first score.",
        "",
        "| mutations | caught | of | percent | stopped (exit code not 0) |",
        "| --- | ---: | ---: | ---: | ---: |",
        *_scores(results),
        "",
        f"False alarms on {results['harmless']['n']} harmless rewrites: "
        f"{results['harmless']['alarms']}. Crashes: {len(results['crashes'])}.",
        "",
        "The checkpoints are small, so one block is a larger share of a tensor than in a released "
        "checkpoint: rules that measure a whole tensor (QC515) do better here than on a tensor of "
        "millions.",
        "",
        "| kind | needs | number | caught | stopped | caught without a base | rules that fired "
        "most |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
        *(_kind(name, row) for name, row in results["kinds"].items()),
        "",
        *_survivors(results["survivors"]),
    ]
    if fuzz.exists():
        parts += ["", *_fuzz(json.loads(fuzz.read_text()))]
    return "\n".join(parts) + "\n"


def _scores(results: dict[str, Any]) -> list[str]:
    titles = {
        "score": "the tiny checkpoints and two of ModelOpt's",
        "modelopt_score": "five written by ModelOpt",
    }
    lines = []
    for key, title in titles.items():
        for which, words in (("with_base", "with a base"), ("without_base", "without a base")):
            if results[key]:
                row = results[key][which]
                numbers = (row["told"], row["of"], row["percent"], row["stopped"])
                lines.append(f"| {title}, {words} | {' | '.join(map(str, numbers))} |")
    return lines


def _kind(name: str, row: dict[str, Any]) -> str:
    rules = ", ".join(f"{k} {v}" for k, v in row.get("rules", {}).items() if k != "verdict")
    without = row["told_without"] if row["knows"] == "nothing" else ""
    cells = (row["knows"], row["n"], row["told"], row["stopped"], without, rules)
    return f"| `{name}` | {' | '.join(map(str, cells))} |"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in versions.items())


def _survivors(survivors: list[dict[str, Any]]) -> list[str]:
    if not survivors:
        return ["All mutations were caught."]
    lines = [
        f"## Survivors ({len(survivors)})",
        "",
        f"`python -m tests.mutation --seed N` recreates one. The first "
        f"{min(SURVIVORS, len(survivors))}; the JSON has all.",
        "",
        "| seed | kind | checkpoint | edit | caught with a base, without |",
        "| ---: | --- | --- | --- | --- |",
    ]
    for s in survivors[:SURVIVORS]:
        caught = ", ".join("yes" if t else "no" for t in s["told"])
        edit = s["what"][:110].replace("|", "/")
        lines.append(f"| {s['seed']} | `{s['kind']}` | {s['checkpoint']} | {edit} | {caught} |")
    return lines


def _fuzz(results: dict[str, Any]) -> list[str]:
    commands = results["commands"]
    return [
        "## Hostile input",
        "",
        f"`{results['command']}` (`tox -e fuzz`), engine {results['engine']}, "
        f"{_versions(results['versions'])}. Inputs are structural and byte-level edits of valid "
        "headers, "
        "indexes and configs; `tests/fuzz/hostile.py` lists them.",
        "",
        "| | in process | as command lines |",
        "| --- | ---: | ---: |",
        f"| inputs | {results['runs']:,} | {commands['runs']:,} |",
        "| of which a rule on scales or values checked a tensor | "
        f"{results['reached_the_rules']:,} | |",
        f"| exit codes | {_codes(results['exit_codes'])} | {_codes(commands['exit_codes'])} |",
        f"| slowest, CPU seconds | {results['slowest_seconds']} | {commands['slowest_seconds']} |",
        f"| largest resident memory, MB | {results['peak_megabytes']} | "
        f"{commands['peak_megabytes']} |",
        f"| failures | {len(results['failures'])} | {len(commands['failures'])} |",
    ]


def _codes(codes: dict[str, int]) -> str:
    return ", ".join(f"{k}: {v:,}" for k, v in codes.items())
