# SPDX-License-Identifier: Apache-2.0
"""A newcomer walks the quick start: the commands of a page run in an empty folder, with the
``ckptgate`` on the path, and print what the page shows.

    cd EMPTY && python CHECKOUT/tests/acceptance/newcomer.py

Of the checkout it uses the page and the goldens: what runs is the installed wheel.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

CHECKOUT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)
FILE = re.compile(r"# (\S+\.\w+)\n")
"""The first line of a block that is a file."""
INSTALLS = ("pip install ", "python -m venv ", ". ")


def steps_of(block: str) -> Iterator[tuple[str, list[str]]]:
    """Yield the commands of a console block, each with the output that the block shows."""
    command, shown = "", list[str]()
    for line in [*block.splitlines(), "$ "]:
        if not line.startswith("$ "):
            shown.append(line)
            continue
        if command:
            yield command, shown
        command, shown = line.removeprefix("$ "), []


def shell(command: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a command in a folder as on the newcomer's own machine, with both streams in stdout."""
    settings = {"CKPTGATE": str(CHECKOUT), "NO_COLOR": "1", "HF_HUB_OFFLINE": "1"}
    own = {name: value for name, value in os.environ.items() if name != "CI"}
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-c", command],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=300,
        env={**own, **settings},
    )


def difference(printed: list[str], shown: list[str]) -> str:
    """Return in what shown lines differ from the printed ones, '' for nothing.

    A shown line ``…`` stands for any number of lines, and ``…`` in a line for any characters; a
    command without shown lines may print anything.
    """
    if not shown:
        return ""
    lines = [re.escape(line).replace("…", ".*") + "\n" for line in shown]
    pattern = "".join("(?:.*\n)*" if line == ".*\n" else line for line in lines)
    if re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)):
        return ""
    return "shown:\n" + "\n".join(shown) + "\nprinted:\n" + "\n".join(printed)


def walk(page: str, folder: Path) -> int:
    """Run the console blocks of a page in a folder, and return how many commands ran.

    Blocks that begin with ``# NAME.yaml`` are written to that file.

    Raises:
        AssertionError: a command prints something that the page does not show, or it fails and the
            page shows nothing.
    """
    count = 0
    for language, block in BLOCK.findall(page):
        named = FILE.match(block)
        if named:
            (folder / named[1]).write_text(block, encoding="utf-8")
        if language != "console":
            continue
        for command, shown in steps_of(block):
            if not command.startswith(INSTALLS):
                _run(command, shown, folder)
                count += 1
    return count


def _run(command: str, shown: list[str], folder: Path) -> None:
    done = shell(command, folder)
    assert done.returncode == 0 or shown, f"$ {command}\n{done.stdout}"
    wrong = difference(done.stdout.splitlines(), shown)
    assert not wrong, f"$ {command}\n{wrong}"


def main() -> int:
    """Walk docs/index.md here."""
    folder = Path.cwd()
    if any(folder.iterdir()):
        print(f"{folder} is not empty")
        return 2
    count = walk((CHECKOUT / "docs" / "index.md").read_text(encoding="utf-8"), folder)
    print(f"{count} commands of the quick start run and print what it shows")
    return 0


if __name__ == "__main__":
    sys.exit(main())
