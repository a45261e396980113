# SPDX-License-Identifier: Apache-2.0
"""Run the commands that README.md shows and put their real output below them.

    python tools/make_readme.py [--check]

A block of README.md whose first line is ``    $ ckptgate …`` is run in a folder with the golden's
``bf16``, ``mxfp8`` and ``corpus.jsonl``; ``broken`` is made as the demo makes it. ``--check``
writes nothing and fails where the output differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
PROMPT = "    $ ckptgate "


def run(arguments: list[str], folder: Path) -> list[str]:
    """Return what a command prints, and its exit code."""
    environment = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment.pop("GITHUB_STEP_SUMMARY", None)
    done = subprocess.run(
        [sys.executable, "-c", "from verifier.cli import main; main()", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return [*(done.stdout + done.stderr).rstrip().splitlines(), f"exit {done.returncode}"]


def rendered(text: str, folder: Path) -> str:
    """Return the page with every shown command's output made anew."""
    lines, made = text.split("\n"), []
    i = 0
    while i < len(lines):
        made.append(lines[i])
        if not lines[i].startswith(PROMPT):
            i += 1
            continue
        arguments = shlex.split(lines[i].removeprefix(PROMPT))
        if "broken" in arguments and not (folder / "broken").exists():
            sys.path.insert(0, str(ROOT / "goldens"))
            import demo  # noqa: PLC0415

            demo.break_copy(folder / "M3-NVFP4", folder / "broken")
        made += [f"    {line}".rstrip() for line in run(arguments, folder)]
        i += 1
        while i < len(lines) and (lines[i].startswith("    ") and not lines[i].startswith(PROMPT)):
            i += 1
    return "\n".join(made)


def main() -> int:
    """Write or compare README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for entry in ("bf16", "mxfp8", "corpus.jsonl"):
            (folder / entry).symlink_to(GOLDEN / entry)
        text = README.read_text()
        found = rendered(text, folder)
    if args.check:
        if found != text:
            print(
                "README.md does not show what its commands print; run python tools/make_readme.py"
            )
        return found != text
    README.write_text(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
