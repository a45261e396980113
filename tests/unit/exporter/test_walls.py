# SPDX-License-Identifier: Apache-2.0
"""The exporter's library shares no decoder, rule or run with the verifier, at run time too.

import-linter follows import statements; this test follows what Python loads, package ``__init__``
files included.
"""

from __future__ import annotations

import pkgutil
import subprocess
import sys

import pytest

import exporter

FORBIDDEN = ("verifier.decoding", "verifier.rules", "verifier.run")
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(exporter.__path__, "exporter.")
    if not module.name.startswith("exporter.cli")
)
SCRIPT = f"""
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    loaded = [m for m in sys.modules if m.startswith({FORBIDDEN!r})]
    if loaded:
        sys.exit(f"{{name}} loads {{', '.join(loaded)}}")
"""


def test_every_library_module_of_the_exporter_is_covered() -> None:
    assert {"exporter.exporting", "exporter.calibration.model", "exporter.stream.evidence"} < set(
        MODULES
    )


def test_no_library_module_loads_the_verifiers_decoder_or_rules() -> None:
    """One fresh process imports them one by one, so that the first culprit is named."""
    pytest.importorskip("transformers")
    command = [sys.executable, "-c", SCRIPT, *MODULES]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
