# SPDX-License-Identifier: Apache-2.0
"""The pictures of pages: a check of a golden with a broken shard, and the gate of an
export in which gate and up of one expert are swapped, with its drift from the accepted record.

``python tools/make_pictures.py`` needs Debian's package chromium, and some minutes for the gate.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from verifier.selftest.editor import CheckpointEditor

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "goldens" / "minimax-m3-tiny"
RECORD = ROOT / "goldens" / "records" / "minimax-m3-tiny.mixed.golden.json"
EXPERT = "language_model.model.layers.2.block_sparse_moe.experts.5"
PICTURES = ROOT / "docs" / "pictures"
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --disable-sync"
).split()
DARK, LIGHT = 0, 1
"""Chromium's numbers of the color schemes."""


def ckptgate(work: Path, *arguments: str, status: int = 0) -> str:
    """Run a command in a directory and return what it prints.

    Raises:
        SystemExit: it ended with a different status.
    """
    command = [sys.executable, "-m", "ckptgate", "--progress", "none", *arguments]
    done = subprocess.run(
        command, cwd=work, check=False, stdout=subprocess.PIPE, text=True, timeout=900
    )
    if done.returncode != status:
        raise SystemExit(f"{' '.join(arguments)}: exit {done.returncode}")
    return done.stdout


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


def check_page(work: Path) -> None:
    """Draw a check of a checkpoint with a broken shard."""
    broken = work / "broken"
    shutil.copytree(work / "mxfp8", broken)
    with (broken / "model-00001-of-00002.safetensors").open("r+b") as shard:
        shard.write(b"\xff")
    ckptgate(work, "check", "broken", "--base", "bf16", "-o", "check.html", status=1)
    screenshot(work / "check.html", "report-check-dark.png", DARK, "900,760")


def gate_page(work: Path) -> None:
    """Draw the gate of an export with a damaged expert."""
    recipe = ("--recipe", "nvfp4_experts_only", "--onto", "mxfp8")
    ckptgate(work, "export", "bf16", "M3-NVFP4", *recipe)
    swapped: dict[str, str] = {}
    for part in ("weight", "weight_scale"):
        gate, up = f"{EXPERT}.w1.{part}", f"{EXPERT}.w3.{part}"
        swapped |= {gate: up, up: gate}
    CheckpointEditor(work / "M3-NVFP4").rename(swapped)
    shutil.copy(RECORD, work / "M3-NVFP4.golden.json")
    corpus = ("--corpus", str(GOLDEN / "corpus.jsonl"))
    result = ckptgate(work, "gate", "M3-NVFP4", "--base", "bf16", *corpus, "--format", "json")
    (work / "gate.json").write_text(result, encoding="utf-8")
    ckptgate(work, "report", "gate.json", "--golden", "M3-NVFP4.golden.json", "-o", "gate.html")
    screenshot(work / "gate.html", "report-gate-light.png", LIGHT, "900,880")


def main() -> None:
    """Write the pictures."""
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        for name in ("bf16", "mxfp8"):
            shutil.copytree(GOLDEN / name, work / name)
        check_page(work)
        gate_page(work)


if __name__ == "__main__":
    main()
