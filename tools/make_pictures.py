# SPDX-License-Identifier: Apache-2.0
"""The picture of a failed check in docs/pictures: the page of a golden with a broken shard.

``python tools/make_pictures.py`` needs Debian's package chromium.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
PICTURES = ROOT / "docs" / "pictures"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync"
).split()
DARK = 0
"""Chromium's number of the color scheme."""


def ckptgate(work: Path, *arguments: str, status: int = 0) -> None:
    """Run a command in a directory.

    Raises:
        SystemExit: it ended with a different status.
    """
    command = [sys.executable, "-m", "ckptgate", "--progress", "none", *arguments]
    done = subprocess.run(
        command, cwd=work, check=False, stdout=subprocess.PIPE, text=True, timeout=900
    )
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}")


def screenshot(page: Path, picture: str, scheme: int, size: str) -> None:
    """Write what Chromium shows of a page."""
    with tempfile.TemporaryDirectory() as profile:
        options = [
            f"--user-data-dir={profile}",
            f"--blink-settings=preferredColorScheme={scheme}",
            f"--window-size={size}",
            f"--screenshot={PICTURES / picture}",
        ]
        subprocess.run(
            ["chromium", *FLAGS, *options, page.as_uri()],
            check=True,
            capture_output=True,
            timeout=120,
        )


def main() -> None:
    """Write the picture."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in ("bf16", "mxfp8"):
            shutil.copytree(GOLDEN / name, work / name)
        (work / "mxfp8" / "model-00001-of-00002.safetensors").open("r+b").write(b"\xff")
        ckptgate(work, "check", "mxfp8", "--base", "bf16", "-o", "check.html", status=1)
        screenshot(work / "check.html", "report-check-dark.png", DARK, "900,760")


if __name__ == "__main__":
    main()
