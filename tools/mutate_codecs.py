# SPDX-License-Identifier: Apache-2.0
"""Score the codecs' property tests by mutants: small edits of exporter/codecs, one at a time, that
a test must detect.

    python tools/mutate_codecs.py [--count 40] [--seed 0] [--seconds 600]

An edit replaces an operator by a related one, adds one to a number or doubles it, negates a
condition, or removes a call. The edits are a sample by seed; each runs in a copy of the project
against the properties, the exhaustive tests and the vectors, with the torch back end.
"""

from __future__ import annotations

import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
FILES = ["nvfp4.py", "mxfp8.py", "fp8.py", "blocks.py", "constants.py"]
TESTS = [f"tests/properties/test_codec_{n}.py" for n in ("properties", "exhaustive", "vectors")]
LIMIT = 90.0
"""Seconds per mutant, several times what the tests take; longer counts as detected."""
SWAPS: dict[type, type] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.LShift: ast.RShift,
    ast.RShift: ast.LShift,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


def edits(tree: ast.Module) -> Iterator[tuple[int, str, ast.Module]]:
    """Yield line, description and mutated tree of every possible edit."""
    for number, node in enumerate(list(ast.walk(tree))):
        for edit in edits_of(node):
            mutant = copy.deepcopy(tree)
            description = apply(list(ast.walk(mutant))[number], edit)
            if description is not None:
                yield getattr(node, "lineno", 0), description, ast.fix_missing_locations(mutant)


def edits_of(node: ast.AST) -> list[str]:
    """Return the names of the edits that a node allows."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        return ["swap"]
    if isinstance(node, ast.Compare) and len(node.ops) == 1:
        return ["swap"]
    if (
        isinstance(node, ast.Constant)
        and isinstance(node.value, int | float)
        and not isinstance(node.value, bool)
    ):
        return ["more", "twice"] if node.value else ["more"]
    if isinstance(node, ast.If | ast.IfExp):
        return ["not"]
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        return ["drop"]
    return []


def apply(node: ast.AST, edit: str) -> str | None:
    """Change a node in place and describe the change; None if there is none."""
    if isinstance(node, ast.BinOp | ast.AugAssign | ast.BoolOp):
        new = SWAPS.get(type(node.op))
        if new is None:
            return None
        old, node.op = type(node.op).__name__, new()
        return f"{old} to {new.__name__}"
    if isinstance(node, ast.Compare):
        new = SWAPS.get(type(node.ops[0]))
        if new is None:
            return None
        old, node.ops[0] = type(node.ops[0]).__name__, new()
        return f"{old} to {new.__name__}"
    if isinstance(node, ast.Constant):
        number = node.value
        node.value = number + 1 if edit == "more" else number * 2
        return f"{number} to {node.value}"
    if isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return "condition negated"
    if isinstance(node, ast.Expr):
        source = ast.unparse(node)
        node.value = ast.Constant(None)
        return f"without {source}"
    return None


def outcome(project: Path) -> str:
    """Run the tests of a copy; return "killed", "survived" or "slow"."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV", "HYPOTHESIS"))
    }
    env = inherited | {
        "PYTHONPATH": os.pathsep.join([str(project), os.environ.get("PYTHONPATH", "")]),
        "CKPTGATE_EXAMPLES": "8",
        "OMP_NUM_THREADS": "1",
        "CKPTGATE_FAST": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", *TESTS, "-x", "-q"]
    command += ["-p", "no:cacheprovider", "-k", "not numba"]
    try:
        run = subprocess.run(
            command, cwd=project, env=env, capture_output=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return "slow"
    return "killed" if run.returncode else "survived"


def main() -> None:
    """Sample the edits, run the tests on each, print the score."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        project = Path(name)
        for folder in ("exporter", "verifier", "tests"):
            shutil.copytree(
                ROOT / folder, project / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", project)
        if outcome(project) == "killed":
            sys.exit("the unchanged copy fails its tests")
        sites = []
        for file in FILES:
            source = (ROOT / "exporter" / "codecs" / file).read_text(encoding="utf-8")
            sites += [(file, *edit) for edit in edits(ast.parse(source))]
        sample = random.Random(args.seed).sample(sites, min(args.count, len(sites)))  # noqa: S311
        run_mutants(project, sample, len(sites), args.seconds)


def run_mutants(
    project: Path, sample: list[tuple[str, int, str, ast.Module]], sites: int, seconds: float
) -> None:
    """Run the tests on each mutant until the time is up; print each outcome and the score."""
    started, counts = time.monotonic(), {"killed": 0, "slow": 0, "survived": 0}
    for file, line, description, tree in sample:
        if time.monotonic() - started > seconds:
            break
        path = project / "exporter" / "codecs" / file
        original = path.read_text(encoding="utf-8")
        path.write_text(ast.unparse(tree), encoding="utf-8")
        result = outcome(project)
        path.write_text(original, encoding="utf-8")
        counts[result] += 1
        print(f"{result:9} {file}:{line} {description}", flush=True)
    total = sum(counts.values())
    print(f"{counts['killed'] + counts['slow']} of {total} detected, {sites} sites; {counts}")


if __name__ == "__main__":
    main()
