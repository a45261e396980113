# SPDX-License-Identifier: Apache-2.0
"""Export and merge in units that several machines write: one unit is one shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from exporter import stream
from exporter.plan import Plan
from exporter.writing import WriteOptions, disk_failures, write_result
from verifier.manifest import Manifest


@dataclass(frozen=True)
class PlanCall:
    """A call that returns a plan, which every process makes once."""

    function: Callable[..., Plan]
    options: tuple[tuple[str, Any], ...]


@lru_cache(maxsize=1)
def _plan_of(call: PlanCall) -> Plan:
    return call.function(**dict(call.options))


@dataclass(frozen=True)
class WriteJob:
    """The shards of one plan, each a unit.

    Attributes:
        call: makes the plan.
        out: the directory to make, on a file system that all machines share.
        options: how each process writes.
    """

    call: PlanCall
    out: Path
    options: WriteOptions

    def units(self) -> list[str]:
        """Return the names of all shards."""
        return [task.file for task in self.options.tasks(_plan_of(self.call))]

    def do(self, units: Sequence[str]) -> Manifest | None:
        """Write some shards; where all are written, give OUT its name and return its manifest.

        Raises:
            EncodeError, MachineError, UsageError: as `exporter.export`.
        """
        plan, progress = _plan_of(self.call), self.options.progress
        tasks = self.options.tasks(plan)
        with disk_failures(self.out), stream.sharing(plan, tasks, self.out) as writers:
            writers.write(
                units, workers=self.options.threads, progress=progress or (lambda _nbytes: None)
            )
            if writers.left() or not writers.alone():
                return None
            # The bytes of each shard were reported.
            quiet = replace(self.options, progress=None)
            return write_result(plan, self.out, writers.folder / stream.RESULT, quiet)
