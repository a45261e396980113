# SPDX-License-Identifier: Apache-2.0
"""Export and merge in units that several machines write: one unit is one shard."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from exporter import emit, stream
from exporter.plan import Plan
from exporter.writing import WriteOptions, disk_failures, write_result
from verifier.errors import UsageError
from verifier.manifest import MANIFEST, Manifest


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
        new: OUT did not exist when the job was made. A unit that finds it made by the same plan was
            lost after the last one was done, and is done.
    """

    call: PlanCall
    out: Path
    options: WriteOptions
    new: bool = False

    def units(self) -> list[str]:
        """Return the names of all shards."""
        return [task.file for task in self.options.tasks(_plan_of(self.call))]

    def do(self, units: Sequence[str]) -> Manifest | None:
        """Write some shards; where all are written, give OUT its name and return its manifest.

        Raises:
            EncodeError, MachineError, UsageError: as `exporter.export`.
        """
        plan = _plan_of(self.call)
        try:
            return self._written(plan, units)
        except UsageError:
            made = self._made_by(plan) if self.new else None
            if made is None:
                raise
            return made

    def _written(self, plan: Plan, units: Sequence[str]) -> Manifest | None:
        tasks, progress = self.options.tasks(plan), self.options.progress
        with disk_failures(self.out), stream.sharing(plan, tasks, self.out) as writers:
            writers.write(
                units, workers=self.options.threads, progress=progress or (lambda _nbytes: None)
            )
            if writers.left() or not writers.alone():
                return None
            # The bytes of each shard were reported.
            quiet = replace(self.options, progress=None)
            return write_result(plan, self.out, writers.folder / stream.RESULT, quiet)

    def _made_by(self, plan: Plan) -> Manifest | None:
        """Return the manifest of OUT where the plan made it."""
        try:
            manifest = Manifest.model_validate_json((self.out / MANIFEST).read_bytes())
        except (OSError, ValidationError):  # something else stands there
            return None
        wanted = manifest.model_copy(
            update={
                "kind": plan.kind,
                "name": self.out.name,
                "sources": emit.sources_of(plan),
                "options": plan.options,
            }
        )
        return manifest if manifest.model_dump_json() == wanted.model_dump_json() else None
