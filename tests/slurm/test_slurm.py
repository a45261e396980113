# SPDX-License-Identifier: Apache-2.0
"""The example of a job array, as it is shipped, on a Slurm cluster of two nodes: what it writes is
what one machine writes, even where a task or a node is killed.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from exporter.out import work_folder
from tests.faults.conditions import RECIPE, Conditions, write_large
from tests.kill.run import files_of
from tests.slurm.cluster import MISSING, NODES, Cluster, Task
from tests.units.cases import (
    CASES,
    CORPUS,
    SCORE_PARTS,
    SHARD,
    SOURCE,
    Alone,
    Case,
    Inputs,
    recorded,
)
from tests.waiting import wait_for
from verifier.gate import read_run
from verifier.run import report_of

pytestmark = [
    pytest.mark.skipif(
        not os.environ.get("CKPTGATE_SLURM"), reason="starts a Slurm cluster: tox -e slurm"
    ),
    pytest.mark.skipif(bool(MISSING), reason="needs the packages slurm-wlm and munge"),
]
SHARDS = ("--shard-size", f"{SHARD / 10**6}MB")
LARGE = (
    *("--recipe", "nvfp4_experts_only_mse", "--input-scale", "one", "--no-check"),
    *("--workers", "1", "--shard-size", "10MB"),
)
"""Options of an export that writes one shard after the other, each for half a second."""


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    one = Cluster(tmp_path_factory.mktemp("slurm"))
    yield one
    one.stop()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Return a cluster of two nodes, where an earlier test killed one, too."""
    running.start_dead_nodes()
    return running


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Alone:
    return Alone(tmp_path_factory.mktemp("alone"))


@dataclass(frozen=True)
class Large:
    """A source that takes seconds to export, and what one machine makes of it."""

    source: Path
    files: Mapping[str, str]

    def line(self, out: Path) -> list[str]:
        """Return the command line of its export."""
        return ["export", str(self.source), str(out), *LARGE]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Large:
    folder = tmp_path_factory.mktemp("large")
    source, out = write_large(folder), tmp_path_factory.mktemp("whole") / "out"
    assert Conditions().run("export", str(source), str(out), *LARGE) == (0, "")
    return Large(source, files_of(out))


@dataclass(frozen=True)
class Line:
    """A case as a command.

    Attributes:
        arguments: of ``ckptgate``, which writes into a folder.
        exit_code: of whoever completes the work.
        result: what was written.
    """

    arguments: Callable[[Inputs, Path], list[str]]
    exit_code: int = 0
    result: Callable[[Path], Any] = lambda _folder: None


def export_line(folder: Path) -> list[str]:
    return ["export", str(SOURCE), str(folder / "out"), *RECIPE, *SHARDS]


def check_line(path: Path, folder: Path) -> list[str]:
    options = ["--base", str(SOURCE), "--depth", "payload", "--records", str(folder / "records")]
    return ["check", str(path), *options, "-o", str(folder / "report.json")]


def report_in(folder: Path) -> Any:
    return report_of(json.loads((folder / "report.json").read_bytes()))


LINES = {
    "export": Line(lambda _inputs, folder: export_line(folder)),
    "merge": Line(
        lambda inputs, folder: [
            *("merge", str(inputs.whole), str(folder / "out"), "--onto", str(SOURCE)),
            *SHARDS,
        ]
    ),
    "check": Line(lambda inputs, folder: check_line(inputs.broken, folder), 1, report_in),
    "check of one shard": Line(
        lambda inputs, folder: check_line(inputs.one_shard, folder), 1, report_in
    ),
    "score": Line(
        lambda _inputs, folder: [
            *("score", str(SOURCE), "--corpus", str(CORPUS), "--documents", str(SCORE_PARTS)),
            *("--seq-len", "32", "--batch-size", "1", "-o", str(folder / "base.run")),
        ],
        result=lambda folder: read_run(folder / "base.run"),
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return an empty folder for what commands write."""
    (tmp_path / "written").mkdir()
    return tmp_path / "written"


def inodes(folder: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in folder.iterdir()}


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_array_makes_what_one_machine_makes(
    case: Case, cluster: Cluster, alone: Alone, folder: Path
) -> None:
    line = LINES[case.name]
    array = cluster.submit(folder.parent, "1-3", *line.arguments(alone.inputs, folder))
    tasks = cluster.ended(array)
    assert [task.number for task in tasks] == [1, 2, 3]
    assert {task.node for task in tasks} == {*NODES}
    assert {task.exit_code for task in tasks} == {0, line.exit_code}
    assert case.outcome(folder, line.result(folder)) == alone.outcome(case)


def kill(cluster: Cluster, array: str, number: int) -> None:
    (process,) = cluster.processes(SLURM_ARRAY_JOB_ID=array, SLURM_ARRAY_TASK_ID=str(number))
    os.kill(process, signal.SIGKILL)


def wait_for_a_shard(out: Path, number: int, of: int) -> dict[str, int]:
    """Wait until a task of an array has written a shard; return all finished shards' inodes."""

    def written() -> bool:
        return any(int(unit.split("-")[1]) % of == number % of for unit in recorded(out))

    wait_for(written)
    files = inodes(work_folder(out) / "checkpoint")
    return {unit: files[unit] for unit in recorded(out)}


@pytest.mark.parametrize(
    ("end", "state", "how"),
    [(kill, "FAILED", (0, 9)), (Cluster.cancel, "CANCELLED", (143, 0))],
    ids=["kill -9", "scancel"],
)
def test_a_task_that_was_ended_is_done_again(
    end: Callable[[Cluster, str, int], None],
    state: str,
    how: tuple[int, int],
    cluster: Cluster,
    large: Large,
    folder: Path,
) -> None:
    out = folder / "out"
    array = cluster.submit(folder.parent, "1-3", *large.line(out))
    kept = wait_for_a_shard(out, 2, of=3)
    end(cluster, array, 2)
    tasks = cluster.ended(array)
    assert [task.state for task in tasks] == ["COMPLETED", state, "COMPLETED"]
    assert (tasks[1].exit_code, tasks[1].signal) == how
    assert not out.exists()
    (again,) = cluster.ended(cluster.submit(folder.parent, "2", *large.line(out), of=3))
    assert (again.number, again.state) == (2, "COMPLETED")
    assert inodes(out).items() >= kept.items()
    assert files_of(out) == large.files


def test_a_task_of_a_killed_node_is_done_on_another(
    cluster: Cluster, large: Large, folder: Path
) -> None:
    out = folder / "out"
    array = cluster.submit(folder.parent, "1-2", *large.line(out))
    on_node: list[Task] = []

    def begun() -> bool:
        on_node[:] = [task for task in cluster.running(array) if task.node == NODES[1]]
        return bool(on_node)

    wait_for(begun)
    kept = wait_for_a_shard(out, on_node[0].number, of=2)
    cluster.kill_node(NODES[1])
    tasks = cluster.ended(array)
    assert [task.state for task in tasks] == ["COMPLETED"] * 2
    assert {task.node for task in tasks} == {NODES[0]}
    assert [task.restarts for task in tasks] == [task.number == on_node[0].number for task in tasks]
    assert inodes(out).items() >= kept.items()
    assert files_of(out) == large.files


def test_an_array_again_keeps_what_is_complete(
    cluster: Cluster, alone: Alone, folder: Path
) -> None:
    out = folder / "out"
    cluster.ended(cluster.submit(folder.parent, "1-2", *export_line(folder), of=3))
    assert not out.exists()
    kept = inodes(work_folder(out) / "checkpoint")
    assert kept.keys() == recorded(out)
    for _ in range(2):  # the second time OUT is complete
        tasks = cluster.ended(cluster.submit(folder.parent, "1-3", *export_line(folder)))
        assert [task.exit_code for task in tasks] == [0, 0, 0]
        assert inodes(out).items() >= kept.items()
        assert files_of(out) == files_of(alone.inputs.whole)
        kept = inodes(out)


def test_a_check_again_takes_its_records(cluster: Cluster, alone: Alone, folder: Path) -> None:
    line = check_line(alone.inputs.whole, folder)
    cluster.ended(cluster.submit(folder.parent, "1-2", *line))
    report = report_in(folder)
    (records,) = (folder / "records").iterdir()
    kept = inodes(records)
    assert len(kept) == 2
    (folder / "report.json").unlink()
    cluster.ended(cluster.submit(folder.parent, "1-2", *line))
    assert inodes(records) == kept
    assert report_in(folder) == report


def test_more_tasks_than_shards(cluster: Cluster, folder: Path) -> None:
    line = ["export", str(SOURCE), str(folder / "out"), *RECIPE]
    tasks = cluster.ended(cluster.submit(folder.parent, "1-4", *line))
    assert [task.exit_code for task in tasks] == [0] * 4
    assert [p.name for p in folder.iterdir()] == ["out"]
