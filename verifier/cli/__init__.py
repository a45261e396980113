# SPDX-License-Identifier: Apache-2.0
"""The command line. Commands are imported when they run; other packages add commands through the
entry-point group ckptgate.commands.
"""

from verifier.cli.main import cli, main, run

__all__ = ["cli", "main", "run"]
