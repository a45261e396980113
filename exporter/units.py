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
    """

    call: PlanCall
    out: Path
    options: WriteOptions

    def units(self) -> list[str]:
        """Return the names of all shards."""
        return [task.file for task in self.options.tasks(_plan_of(self.call))]

    def do(self, units: Sequence[str]) -> Manifest | None:
        """Write some shards; where all are written, give OUT its name and return its manifest.

        Units that find OUT made by the same plan are done: they came late, or were lost after the
        last one was done. They return its manifest; without a unit there is nothing to return.

        Raises:
            EncodeError, MachineError, UsageError: as `exporter.export`.
        """
        plan = _plan_of(self.call)
        try:
            return self._written(plan, units)
        except UsageError:
            made = self._made_by(plan)
            if made is None:
                raise
            return made if units else None

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
        """Return the manifest of OUT where the plan made it of these files."""
        file = self.out / MANIFEST
        try:
            manifest = Manifest.model_validate_json(file.read_bytes())
            made = file.stat().st_mtime_ns
        except (OSError, ValidationError):  # something else stands there
            return None
        if _changed(plan) > made:
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


def _changed(plan: Plan) -> int:
    """Return when a local file that a plan reads changed last, in nanoseconds; 0 without one."""
    sources = [source for source in (plan.source, plan.onto) if source is not None]
    versions = [v for source in sources for v in source.versions().values()]
    return max((v[0] for v in versions if v and isinstance(v[0], int)), default=0)
