# SPDX-License-Identifier: Apache-2.0
"""Jobs that take long enough to be disturbed, and a driver that runs one: ``python -m
tests.ray.jobs ADDRESS OUT``.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporter.exporting import plan_export
from exporter.units import PlanCall, WriteJob
from exporter.writing import WriteOptions
from tests.paths import ROOT
from verifier.ray_runner import on_ray

SOURCE = ROOT / "goldens" / "qwen3-moe-tiny" / "bf16"
SHARD = 200_000
SECONDS = 1.0
OPTIONS = {"recipe": "nvfp4_experts_only", "input_scale": "one"}


def export_job(out: Path) -> WriteJob:
    call = PlanCall(plan_export, (("source", str(SOURCE)), *OPTIONS.items()))
    return WriteJob(call, out, WriteOptions(shard_bytes=SHARD, workers=1))


@dataclass(frozen=True)
class Slow:
    """A job whose units take a second more; ``log`` gets a line, node and unit, when one begins."""

    job: WriteJob
    log: Path

    def units(self) -> list[str]:
        return self.job.units()

    def do(self, units: Sequence[str]) -> Any:
        import ray

        node = ray.get_runtime_context().get_node_id()
        with self.log.open("a") as file:
            file.writelines(f"{node} {unit}\n" for unit in units)
        time.sleep(SECONDS)
        return self.job.do(units)


@dataclass(frozen=True)
class Deadly:
    """A job whose units end the process that does them."""

    def units(self) -> list[str]:
        return ["1"]

    def do(self, _units: Sequence[str]) -> None:
        os._exit(1)


def main(address: str, out: Path) -> None:
    job = Slow(export_job(out), out.with_name("log"))
    with on_ray(address, 1, lambda _done, _total: None) as runner:
        runner(job)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
