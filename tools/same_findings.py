# SPDX-License-Identifier: Apache-2.0
"""Prove that a change of the code changes no finding.

    python tools/same_findings.py record BEFORE.json --tree ../other-checkout
    python tools/same_findings.py record AFTER.json
    python tools/same_findings.py compare BEFORE.json AFTER.json

``record`` runs ``check --format json`` at depth header and payload, without and with a base, over
every checkpoint of ``CKPTGATE_TEST_DATA``, the goldens of this checkout, and the exports that
``--exports DIR`` holds (folders named GOLDEN.ANYTHING). It keeps the exit code, the verdict, each
finding's rule, severity, place and count, and each rule's coverage; it drops message texts.
``compare`` prints what differs and exits 1 if anything does.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
GOLDENS = ("gpt-oss-tiny", "minimax-m3-tiny", "qwen3-moe-tiny")
MODELOPT_SOURCES = {
    "qwen3moe": "src_qwen3moe",
    "llama": "src_llama",
    "m3": "src_m3",
    "aria": "src_aria",
}
FORMER_VERDICTS = {"unproven": "inconclusive", "broken": "error"}
SHOWN = 40


@dataclass(frozen=True)
class Subject:
    """A checkpoint to check, with the base and the profile that belong to it."""

    name: str
    path: Path
    base: Path | None = None
    profile: str | None = None


def subjects(exports: Path | None) -> Iterator[Subject]:
    """Yield every checkpoint that is recorded."""
    data = Path(os.environ.get("CKPTGATE_TEST_DATA", ROOT.parent / "shared" / "data"))
    for case in sorted(p.parent for p in data.glob("cases/*/case.json")):
        profile = json.loads((case / "case.json").read_text())["run"].get("profile")
        base = case / "base"
        yield Subject(case.name, case / "checkpoint", base if base.is_dir() else None, profile)
    for folder in sorted(p for p in data.glob("modelopt/*") if p.is_dir()):
        source = MODELOPT_SOURCES.get(folder.name.partition("_")[0])
        yield Subject(folder.name, folder, data / "modelopt" / source if source else None)
    for golden in GOLDENS:
        base = ROOT / "goldens" / golden / "bf16"
        yield Subject(f"golden.{golden}", base)
        for export in sorted(exports.glob(f"{golden}.*")) if exports else ():
            yield Subject(export.name, export, base)


def report_of(subject: Subject, depth: str, tree: Path, *, with_base: bool) -> dict[str, Any]:
    """Run one check of the code in ``tree`` and return what is compared of its report."""
    command = [sys.executable, "-m", "verifier", "check", str(subject.path), "--depth", depth]
    command += ["--format", "json", "--workers", "1"]
    command += ["--base", str(subject.base)] if with_base else []
    command += ["--profile", subject.profile] if subject.profile else []
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=tree, check=False
    )
    try:
        report = json.loads(done.stdout)
    except json.JSONDecodeError:
        return {"exit": done.returncode, "stderr": done.stderr[-300:]}
    findings = [
        [f["rule"], f["severity"], json.dumps(f.get("where"), sort_keys=True), f.get("count")]
        for f in report["findings"]
    ]
    return {
        "exit": done.returncode,
        "verdict": FORMER_VERDICTS.get(report["verdict"], report["verdict"]),
        "findings": sorted(findings),
        "coverage": sorted(
            [c["rule"], c["ran"], c["checked"], c["of"]] for c in report["coverage"]
        ),
    }


def record(out: Path, tree: Path, exports: Path | None) -> None:
    """Check every subject with the code in ``tree`` and write the results."""
    jobs = {}
    for subject in subjects(exports):
        for depth in ("header", "payload"):
            jobs[f"{subject.name} {depth}"] = (subject, depth, False)
            if subject.base is not None:
                jobs[f"{subject.name} {depth} base"] = (subject, depth, True)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        reports = pool.map(lambda j: report_of(j[0], j[1], tree, with_base=j[2]), jobs.values())
        out.write_text(json.dumps(dict(zip(jobs, reports, strict=True)), indent=1), "utf-8")
    print(f"{len(jobs)} checks of {tree} in {out}")


def differences(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Return one line for each field of each check that differs."""
    lines = []
    for name in sorted(before.keys() | after.keys()):
        left, right = before.get(name, {}), after.get(name, {})
        for field in sorted(left.keys() | right.keys()):
            if left.get(field) != right.get(field):
                lines.append(f"{name}: {field}: {left.get(field)} -> {right.get(field)}")
    return lines


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recording = commands.add_parser("record")
    recording.add_argument("out", type=Path)
    recording.add_argument("--tree", type=Path, default=ROOT)
    recording.add_argument("--exports", type=Path)
    comparing = commands.add_parser("compare")
    comparing.add_argument("before", type=Path)
    comparing.add_argument("after", type=Path)
    options = parser.parse_args()
    if options.command == "record":
        record(options.out, options.tree.resolve(), options.exports)
        return 0
    before, after = (json.loads(p.read_text("utf-8")) for p in (options.before, options.after))
    lines = differences(before, after)
    for line in lines[:SHOWN]:
        print(line[:400])
    print(f"{len(lines)} differences in {len(before)} checks")
    return bool(lines)


if __name__ == "__main__":
    sys.exit(main())
