# SPDX-License-Identifier: Apache-2.0
"""Jobs that take long enough to be disturbed, and one that disturbs."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 1.0


@dataclass(frozen=True)
class Slow:
    """A job whose units take a second more; ``log`` gets a line as one begins and ends."""

    job: Any
    log: Path

    def units(self) -> list[str]:
        return list(self.job.units())

    def do(self, units: Sequence[str]) -> Any:
        import ray

        node = ray.get_runtime_context().get_node_id()
        self._note("begun", node, units)
        time.sleep(SECONDS)
        result = self.job.do(units)
        self._note("ended", node, units)
        return result

    def noted(self, what: str) -> list[tuple[str, str]]:
        """Return (node, unit) for each unit that has ``begun`` or ``ended``, in that order."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        fields = (line.split() for line in lines)
        return [(node, unit) for noted, node, unit in fields if noted == what]

    def _note(self, what: str, node: str, units: Sequence[str]) -> None:
        with self.log.open("a") as file:
            file.writelines(f"{what} {node} {unit}\n" for unit in units)


@dataclass(frozen=True)
class Deadly:
    """A job whose units end the process that does them."""

    def units(self) -> list[str]:
        return ["1"]

    def do(self, _units: Sequence[str]) -> None:
        os._exit(1)
