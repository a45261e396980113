# SPDX-License-Identifier: Apache-2.0
"""Run the example of README.md and write its real output below the command.

    python tools/make_readme.py [--check]

Indented commands (``    $ ckptgate …``) run in a directory with the checkpoint ``broken`` of the
demo. ``--check`` writes nothing and fails if the output differs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from goldens.demo import break_copy  # noqa: E402

README = ROOT / "README.md"
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
PROMPT = "    $ ckptgate "


def run(arguments: list[str], directory: Path) -> list[str]:
    """Return the output of a command, and its exit code."""
    environment = os.environ | {"NO_COLOR": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    environment.pop("GITHUB_STEP_SUMMARY", None)
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run(
        [sys.executable, "-m", "ckptgate", *arguments],
        cwd=directory,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    return [*(done.stdout + done.stderr).rstrip().splitlines(), f"exit {done.returncode}"]


def rendered(text: str, directory: Path) -> str:
    """Return the page with the current output of every command."""
    lines: list[str] = []
    in_output = False
    for line in text.split("\n"):
        in_output = in_output and line.startswith("    ") and not line.startswith(PROMPT)
        if in_output:
            continue
        lines.append(line)
        if line.startswith(PROMPT):
            output = run(shlex.split(line.removeprefix(PROMPT)), directory)
            lines += [f"    {text}".rstrip() for text in output]
            in_output = True
    return "\n".join(lines)


def prepare(directory: Path) -> None:
    """Export the golden and break a copy of the result, as the demo does."""
    for entry in ("bf16", "mxfp8"):
        (directory / entry).symlink_to(GOLDEN / entry)
    export = ["export", "bf16", "M3-NVFP4", "--recipe", "nvfp4_experts_only", "--onto", "mxfp8"]
    output = run(export, directory)
    if output[-1] != "exit 0":
        raise SystemExit("\n".join(output))
    break_copy(directory / "M3-NVFP4", directory / "broken")


def main() -> int:
    """Write or compare README.md."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name))
        current = rendered(text, Path(name))
    if not args.check:
        README.write_text(current, encoding="utf-8")
    elif current != text:
        print("README.md does not show the current output; run python tools/make_readme.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
