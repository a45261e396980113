# SPDX-License-Identifier: Apache-2.0
"""The command line under conditions: limits of the system, files that cannot be read, signals."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.paths import ROOT

SOURCE = ROOT / "goldens" / "qwen3-moe-tiny" / "bf16"
RECIPE = ("--recipe", "nvfp4_experts_only", "--input-scale", "one")


@dataclass(frozen=True)
class Conditions:
    """Under which a command runs.

    Attributes:
        limits: by the number of a resource, as `resource.setrlimit` takes it.
        environment: added to that of this process.
        folder: the working directory.
        umask: of the process.
    """

    limits: Mapping[int, int] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    folder: Path = ROOT
    umask: int = 0o022

    def start(self, arguments: Sequence[str]) -> subprocess.Popen[str]:
        """Start ``ckptgate`` with arguments."""
        return subprocess.Popen(
            [sys.executable, "-m", "ckptgate", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), **self.environment},
            cwd=self.folder,
            umask=self.umask,
            preexec_fn=self._limit,
        )

    def run(self, *arguments: str) -> tuple[int, str]:
        """Run ``ckptgate`` to its end; return its exit code and stderr."""
        process = self.start([*arguments, "--progress", "none"])
        _, stderr = process.communicate(timeout=300)
        return process.returncode, stderr

    def export(self, out: Path, source: Path = SOURCE, *more: str) -> tuple[int, str]:
        """Export without a check."""
        return self.run("export", str(source), str(out), *RECIPE, "--no-check", *more)

    def _limit(self) -> None:
        for name, value in self.limits.items():
            resource.setrlimit(name, (value, value))


def write_large(folder: Path) -> Path:
    """Write a source of 800 MB of holes, which takes seconds to export, and return its folder."""
    rows, width, count = 4096, 4096, 24
    (folder / "config.json").write_text('{"model_type": "qwen3_moe"}')
    size = rows * width * 2
    header = {
        f"model.layers.0.mlp.experts.{i}.down_proj.weight": {
            "dtype": "BF16",
            "shape": [rows, width],
            "data_offsets": [i * size, (i + 1) * size],
        }
        for i in range(count)
    }
    raw = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + count * size)
    return folder
