# SPDX-License-Identifier: Apache-2.0
"""Score the codecs' property tests by mutants: small edits of exporter/codecs, one at a time, that
a test must notice.

    python tools/mutate_codecs.py [--count 40] [--seed 0] [--seconds 600]

Edits of the syntax tree: an arithmetic, bit or comparison operator for its neighbour, a number one
more or twice as large, ``not`` added to a condition, a statement left out. A sample of all sites by
seed; each runs in a copy of the project against the properties, the exhaustive tests and the
vectors, torch back end.
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
"""Seconds for one mutant: several times what the tests take; longer counts as noticed."""
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
    """Yield line, description and mutated tree for every site of every edit."""
    nodes = list(ast.walk(tree))
    for place, node in enumerate(nodes):
        for how in changes_of(node):
            other = copy.deepcopy(tree)
            target = list(ast.walk(other))[place]
            text = apply(target, how)
            if text is not None:
                yield getattr(node, "lineno", 0), text, ast.fix_missing_locations(other)


def changes_of(node: ast.AST) -> list[str]:
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


def apply(node: ast.AST, how: str) -> str | None:
    """Change a node in place and say how; None where nothing changes."""
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
        old, node.value = node.value, node.value + 1 if how == "more" else node.value * 2
        return f"{old} to {node.value}"
    if isinstance(node, ast.If | ast.IfExp):
        node.test = ast.UnaryOp(ast.Not(), node.test)
        return "condition negated"
    if isinstance(node, ast.Expr):
        text = ast.unparse(node)
        node.value = ast.Constant(None)
        return f"without {text}"
    return None


def judge(place: Path) -> str:
    """Return "killed", "survived" or "slow"."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "COV", "HYPOTHESIS"))
    }
    env = inherited | {
        "PYTHONPATH": os.pathsep.join([str(place), os.environ.get("PYTHONPATH", "")]),
        "CKPTGATE_EXAMPLES": "8",
        "OMP_NUM_THREADS": "1",
        "CKPTGATE_FAST": "0",
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        *TESTS,
        "-x",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not numba",
    ]
    try:
        done = subprocess.run(
            command, cwd=place, env=env, capture_output=True, timeout=LIMIT, check=False
        )
    except subprocess.TimeoutExpired:
        return "slow"
    return "killed" if done.returncode else "survived"


def main() -> None:
    """Sample, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        for folder in ("exporter", "verifier", "tests"):
            shutil.copytree(
                ROOT / folder, place / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
        shutil.copy(ROOT / "pyproject.toml", place)
        if judge(place) != "killed":
            every = [
                (file, *edit)
                for file in FILES
                for edit in edits(
                    ast.parse((ROOT / "exporter" / "codecs" / file).read_text(encoding="utf-8"))
                )
            ]
            chosen = random.Random(args.seed).sample(every, min(args.count, len(every)))  # noqa: S311
            run(place, chosen, len(every), args.seconds)
        else:
            sys.exit("the unchanged copy fails its tests")


def run(
    place: Path, chosen: list[tuple[str, int, str, ast.Module]], sites: int, seconds: float
) -> None:
    """Judge mutants until the time is up."""
    started, counts = time.monotonic(), {"killed": 0, "slow": 0, "survived": 0}
    for file, line, text, tree in chosen:
        if time.monotonic() - started > seconds:
            break
        path = place / "exporter" / "codecs" / file
        original = path.read_text(encoding="utf-8")
        path.write_text(ast.unparse(tree), encoding="utf-8")
        verdict = judge(place)
        path.write_text(original, encoding="utf-8")
        counts[verdict] += 1
        print(f"{verdict:9} {file}:{line} {text}", flush=True)
    total = sum(counts.values())
    print(f"{counts['killed'] + counts['slow']} of {total} noticed, {sites} sites; {counts}")


if __name__ == "__main__":
    main()
