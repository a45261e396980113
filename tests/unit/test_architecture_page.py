# SPDX-License-Identifier: Apache-2.0
"""docs/architecture.md is true: everything that it names exists, and every folder is named."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from tests.paths import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
PACKAGES = ("ckptgate", "verifier", "exporter")


def drawn() -> list[Path]:
    """Return the files and folders of the tree on the page."""
    tree = PAGE.partition("```\n")[2].partition("```")[0]
    found: list[Path] = []
    parent = Path()
    for line in tree.splitlines():
        names = re.match(r"\s*((?:[\w.]+(?:/|\.py)\s)+)", f"{line} ")
        assert names is not None, line
        paths = [Path(name) for name in names[1].split()]
        if not line.startswith(" "):
            parent = paths[0]
            found += paths
        else:
            found += [parent / path for path in paths]
    return found


def test_everything_on_the_page_exists() -> None:
    paths = drawn()
    assert len(paths) > 40
    assert [p for p in paths if not (ROOT / p).exists()] == []
    for name in re.findall(r"`([\w/]+\.(?:py|md|toml))`", PAGE):
        assert (ROOT / name).exists(), name


def test_every_folder_and_module_of_the_packages_is_on_the_page() -> None:
    paths = set(drawn())
    for package in PACKAGES:
        assert Path(package) in paths
        if package == "ckptgate":
            continue
        for child in sorted((ROOT / package).iterdir()):
            is_room = child.is_dir() and any(child.glob("*.py"))
            is_module = child.suffix == ".py" and not child.name.startswith("__")
            if is_room or is_module:
                assert child.relative_to(ROOT) in paths, child.relative_to(ROOT)


def test_every_folder_of_the_repository_is_on_the_page() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    folders = {Path(name).parts[0] for name in listed if "/" in name}
    assert {Path(f) for f in folders if not f.startswith(".")} <= set(drawn())


def test_the_layers_are_drawn_in_the_order_that_is_enforced() -> None:
    import tomllib

    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    for package in ("verifier", "exporter"):
        layers = next(
            c["layers"]
            for c in contracts["contracts"]
            if c["type"] == "layers" and package in c["containers"]
        )
        rank = {
            name.strip(" ()"): i
            for i, line in enumerate(reversed(layers))
            for name in line.split("|")
        }
        order = [p.stem for p in drawn() if p.parent == Path(package)]
        ranks = [rank[name] for name in order if name in rank]
        assert ranks == sorted(ranks), [n for n in order if n in rank]
