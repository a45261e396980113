# SPDX-License-Identifier: Apache-2.0
"""Ten broken codecs, each made by editing the source of a copy, and each told from a right one by
the properties alone.

The vectors play no part. A copy of ``exporter`` and of the few test files it takes lies in a folder
of its own, where pytest runs in a subprocess; the unbroken copy must pass there before any kill
counts.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.paths import ROOT

PROPERTIES = "tests/properties/test_codec_properties.py"
COPIED = ["pyproject.toml", "tests/__init__.py", "tests/conftest.py", "tests/oracle.py", PROPERTIES]
EXAMPLES = "6"
LIMIT = 120.0
"""Seconds for one run: many times what it takes."""

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Saboteur:
    """One edit of one file of exporter/codecs; ``old`` occurs there exactly once."""

    file: str
    old: str
    new: str


SABOTEURS = {
    "ties away from even": Saboteur(
        "nvfp4.py",
        "quotient.add_(0.0).clamp_(-E2M1_MAX, E2M1_MAX)",
        "quotient.add_(0.0).mul_(1 + 2.0**-23).clamp_(-E2M1_MAX, E2M1_MAX)",
    ),
    "nibbles swapped": Saboteur(
        "nvfp4.py",
        "return pairs.bitwise_or_(odd)",
        "return pairs.bitwise_left_shift_(4).bitwise_or_(pairs >> 20)",
    ),
    "no clamp at 2^-9": Saboteur(
        "nvfp4.py", "clamp_(SCALE_FLOOR, E4M3_MAX)", "clamp_(0.0, E4M3_MAX)"
    ),
    "amax / (6 * 256)": Saboteur(
        "constants.py", "NVFP4_RANGE = E2M1_MAX * E4M3_MAX", "NVFP4_RANGE = E2M1_MAX * 256.0"
    ),
    "codes by the unrounded scale": Saboteur(
        "nvfp4.py",
        "combined = scale_values(scales).mul_(scale_2)\n        chunk",
        "combined = torch.where((maxima > 0) & (self.fixed is None), maxima / E2M1_MAX, "
        "scales.float() * scale_2)\n        chunk",
    ),
    "reciprocal for division": Saboteur(
        "nvfp4.py",
        "torch.div(values.view(grid), combined.unsqueeze(-1), out",
        "torch.mul(values.view(grid), combined.reciprocal().unsqueeze(-1), out",
    ),
    "-0 kept as 0x8": Saboteur("nvfp4.py", "quotient.add_(0.0).clamp_", "quotient.clamp_"),
    "exponent floor for ceil": Saboteur(
        "mxfp8.py",
        "(maxima.view(torch.int32) + 0x1FFFFF)",
        "(maxima.view(torch.int32) - 0x600000)",
    ),
    "blocks begin one off": Saboteur(
        "nvfp4.py",
        "maxima = block_amax(values, NVFP4_BLOCK, scratch)",
        "maxima = block_amax(values.roll(1, -1), NVFP4_BLOCK, scratch)",
    ),
    "last chunk dropped": Saboteur(
        "blocks.py",
        "for start in range(0, rows, step):",
        "for start in range(0, rows - step if rows > step else rows, step):",
    ),
}


def workshop(place: Path, saboteur: Saboteur | None) -> Path:
    """Return ``place`` with a copy of the exporter, edited, and of the tests that judge it."""
    shutil.copytree(
        ROOT / "exporter", place / "exporter", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in COPIED:
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, place / name)
    if saboteur is not None:
        path = place / "exporter" / "codecs" / saboteur.file
        source = path.read_text(encoding="utf-8")
        assert source.count(saboteur.old) == 1, (
            f"{saboteur.file} holds {saboteur.old!r} {source.count(saboteur.old)} times"
        )
        path.write_text(source.replace(saboteur.old, saboteur.new), encoding="utf-8")
    return place


def judge(place: Path) -> subprocess.CompletedProcess[str]:
    """Run the properties in ``place``, whose exporter comes before any installed one."""
    inherited = {
        k: v
        for k, v in os.environ.items()
        if not k.startswith(("PYTEST", "COV", "HYPOTHESIS", "PYTHON"))
    }
    chosen = {
        "PYTHONPATH": os.pathsep.join([str(place), str(ROOT)]),
        "CKPTGATE_EXAMPLES": EXAMPLES,
        "HYPOTHESIS_PROFILE": "ci",
        "OMP_NUM_THREADS": "1",
        "COLUMNS": "300",  # the summary names the exception only where the line is long enough
    }
    command = [sys.executable, "-m", "pytest", PROPERTIES, "-x", "-q", "-p", "no:cacheprovider"]
    command += ["-k", "not numba"]  # the edits are of the torch code
    return subprocess.run(
        command,
        cwd=place,
        env=inherited | chosen,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Require that the unbroken copy passes: else no failure of a broken one means anything."""
    run = judge(workshop(tmp_path_factory.mktemp("unbroken"), None))
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]


@pytest.mark.usefixtures("control")
def test_the_unbroken_copy_passes() -> None:
    """Held by the fixture, and named here so that its failure has a test of its own."""


def test_there_are_ten() -> None:
    assert len(SABOTEURS) == len(set(SABOTEURS.values())) == 10


@pytest.mark.usefixtures("control")
@pytest.mark.parametrize("name", SABOTEURS)
def test_a_saboteur_is_killed(name: str, tmp_path: Path) -> None:
    """By an assertion about values, not by an exception that the edit itself raises."""
    run = judge(workshop(tmp_path, SABOTEURS[name]))
    assert run.returncode == 1, f"{name} survived\n{run.stdout[-2000:]}{run.stderr[-2000:]}"
    killers = re.findall(
        r"^FAILED \S+::(\w+)\S* - (?:AssertionError|assert|ExceptionGroup)",
        run.stdout,
        re.MULTILINE,
    )
    assert killers, run.stdout[-4000:]
