# SPDX-License-Identifier: Apache-2.0
"""What imports what. The layers themselves are contracts of import-linter in pyproject.toml."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED = (
    "verifier.checkpoint",
    "verifier.errors",
    "verifier.files",
    "verifier.jsonl",
    "verifier.layouts",
    "verifier.load.experts",
    "verifier.load.hf",
    "verifier.manifest",
    "verifier.memory",
    "verifier.schemes",
    "verifier.text",
)
"""What the exporter's library may import of the verifier."""


def modules_of(package: str) -> dict[str, Path]:
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path
    return found


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Yield nodes, imports for type checkers alone left out."""
    for child in ast.iter_child_nodes(node):
        test = child.test if isinstance(child, ast.If) else None
        if isinstance(test, ast.Name) and test.id == "TYPE_CHECKING":
            continue
        yield child
        yield from statements(child)


def imports_of(path: Path, modules: Mapping[str, Path]) -> set[str]:
    """Return the modules that a file imports, wherever in the file it does."""
    found = set()
    for node in statements(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in modules else node.module)
    return found & set(modules)


def circle(arrows: Mapping[str, set[str]]) -> list[str]:
    """Return the nodes of circles and between them, or nothing."""
    left = {node: set(targets) for node, targets in arrows.items()}
    while left:
        reached = set().union(*left.values())
        inner = {n for n, targets in left.items() if n in reached and targets & left.keys()}
        if inner == left.keys():
            return sorted(left)
        left = {n: targets & inner for n, targets in left.items() if n in inner}
    return []


def test_a_circle_is_found() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


@pytest.mark.parametrize("package", ["verifier", "exporter"])
def test_no_file_imports_itself_through_others(package: str) -> None:
    modules = modules_of(package)
    arrows = {name: imports_of(path, modules) - {name} for name, path in modules.items()}
    assert circle(arrows) == []


@pytest.mark.parametrize("package", ["verifier", "exporter"])
def test_no_room_imports_itself_through_others(package: str) -> None:
    modules = modules_of(package)
    rooms: dict[str, set[str]] = {}
    for name, path in modules.items():
        here = name.split(".")[1:2]
        there = {other.split(".")[1] for other in imports_of(path, modules) if "." in other}
        if here:
            rooms.setdefault(here[0], set()).update(there - set(here))
    assert circle(rooms) == []


def test_the_exporters_library_imports_shared_rooms_only() -> None:
    modules = modules_of("verifier")
    rooms = [p for p in (ROOT / "exporter").iterdir() if p.is_dir() and p.name != "cli"]
    for path in [p for room in rooms for p in room.rglob("*.py")]:
        for name in imports_of(path, modules) - {"verifier"}:
            assert _is_shared(name), (path, name)


def test_importing_the_exporters_library_loads_shared_rooms_only() -> None:
    code = """
import importlib, pkgutil, sys
import exporter
for module in pkgutil.walk_packages(exporter.__path__, "exporter."):
    if not module.name.startswith("exporter.cli"):
        importlib.import_module(module.name)
print(*[name for name in sys.modules if name.startswith("verifier.")])
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split()) - {"verifier.load"}  # an empty package
    assert "verifier.schemes" in loaded
    assert not [name for name in loaded if not _is_shared(name)]


def _is_shared(name: str) -> bool:
    return name in SHARED or name.startswith(tuple(f"{room}." for room in SHARED))
