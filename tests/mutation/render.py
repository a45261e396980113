# SPDX-License-Identifier: Apache-2.0
"""docs/proof.md, from what the mutation score and the fuzzing wrote."""

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
    found = json.loads((HERE / "results.json").read_text())
    fuzz = HERE.parent / "fuzz" / "results.json"
    parts = [
        "# Proof that the verifier catches what it should, and nothing else",
        "",
        "Rendered from `tests/mutation/results.json` and `tests/fuzz/results.json`; nothing here is written by hand.",
        "",
        "## Every rule, on the machine where it is installed",
        "",
        "`ckptgate selftest` makes tiny sound checkpoints, sees that a check of each is silent with a base and "
        "without, makes "
        "every known defect in every one that it suits, and sees that its rule speaks up. It needs neither "
        "torch nor a network.",
        "",
        "## Mutation score",
        "",
        f"`{found['command']}` (`tox -e mutation`), {_versions(found['versions'])}. What counts as harm, and "
        f"what a judge needs "
        "to know each kind, is in `tests/mutation/KINDS.md`, committed before the first score.",
        "",
        "| mutations | told | of | percent | stopped (exit code not 0) |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    titles = {
        "score": "the tiny checkpoints and two of ModelOpt's",
        "modelopt_score": "five that ModelOpt wrote",
    }
    for key, title in titles.items():
        for which, said in (("with_base", "with a base"), ("without_base", "without")):
            if found[key]:
                row = found[key][which]
                parts.append(
                    f"| {title}, {said} | {row['told']} | {row['of']} | {row['percent']} | {row['stopped']} |"
                )
    parts += [
        "",
        f"Harmless rewritings: {found['harmless']['alarms']} new findings on {found['harmless']['n']}. Crashes: "
        f"{len(found['crashes'])}.",
        "",
        "The checkpoints are small, so that one block is a larger share of a tensor than in a released one: "
        "rules that measure "
        "a whole tensor (QC515) do better here than on a tensor of millions.",
        "",
        "| kind | needs | number | told | stopped | told without base | rules that told it most |",
        "| --- | --- | ---: | ---: | ---: | ---: | --- |",
    ]
    for name, row in found["kinds"].items():
        rules = ", ".join(f"{k} {v}" for k, v in row.get("rules", {}).items() if k != "verdict")
        without = row["told_without"] if row["knows"] == "nothing" else ""
        parts.append(
            f"| `{name}` | {row['knows']} | {row['n']} | {row['told']} | {row['stopped']} | {without} | {rules} |"
        )
    parts += ["", *_survivors(found["survivors"])]
    if fuzz.exists():
        parts += ["", *_fuzz(json.loads(fuzz.read_text()))]
    return "\n".join(parts) + "\n"


def _versions(versions: dict[str, str]) -> str:
    return ", ".join(f"{k} {v}" for k, v in versions.items())


def _survivors(survivors: list[dict[str, Any]]) -> list[str]:
    if not survivors:
        return ["No mutation survived."]
    lines = [
        f"## Survivors ({len(survivors)})",
        "",
        f"`python -m tests.mutation --seed N` makes one again. The first {min(SURVIVORS, len(survivors))}; the "
        f"JSON has all.",
        "",
        "| seed | kind | checkpoint | what was done | told with base, without |",
        "| ---: | --- | --- | --- | --- |",
    ]
    for s in survivors[:SURVIVORS]:
        told = ", ".join("yes" if t else "no" for t in s["told"])
        lines.append(
            f"| {s['seed']} | `{s['kind']}` | {s['checkpoint']} | {s['what'][:110].replace('|', '/')} | {told} |"
        )
    return lines


def _fuzz(found: dict[str, Any]) -> list[str]:
    commands = found["commands"]
    return [
        "## Hostile input",
        "",
        f"`{found['command']}` (`tox -e fuzz`), engine {found['engine']}, {_versions(found['versions'])}. "
        f"Inputs are edits of "
        "sound headers, indexes and configs, in their structure and in their bytes; `tests/fuzz/hostile.py` lists them.",
        "",
        "| | in process | as command lines |",
        "| --- | ---: | ---: |",
        f"| inputs | {found['runs']:,} | {commands['runs']:,} |",
        f"| of which a rule on scales or values examined a tensor | {found['reached_the_rules']:,} | |",
        f"| exit codes | {_codes(found['exit_codes'])} | {_codes(commands['exit_codes'])} |",
        f"| slowest, processor seconds | {found['slowest_seconds']} | {commands['slowest_seconds']} |",
        f"| largest resident memory, MB | {found['peak_megabytes']} | {commands['peak_megabytes']} |",
        f"| failures | {len(found['failures'])} | {len(commands['failures'])} |",
    ]


def _codes(codes: dict[str, int]) -> str:
    return ", ".join(f"{k}: {v:,}" for k, v in codes.items())
