# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin as it is installed: `verifier.pytest_plugin`, unless another package shadows
``verifier``. A project with a ``verifier`` of its own can still run its tests.
"""

from __future__ import annotations

import pytest

from ckptgate.shadowing import shadowing_package


def pytest_addoption(parser: pytest.Parser, pluginmanager: pytest.PytestPluginManager) -> None:
    """Load the plugin, or add the one option that says why it cannot be loaded."""
    if not shadowing_package():
        pluginmanager.import_plugin("verifier.pytest_plugin")
        return
    parser.getgroup("ckptgate").addoption("--ckptgate", metavar="PATH", dest="ckptgate_uri")


def pytest_configure(config: pytest.Config) -> None:
    """Refuse ``--ckptgate`` if another package shadows ``verifier``."""
    problem = shadowing_package()
    if problem and config.getoption("ckptgate_uri") is not None:
        raise pytest.UsageError(f"ckptgate: {problem}")
