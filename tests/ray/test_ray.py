# SPDX-License-Identifier: Apache-2.0
"""A Ray cluster of two nodes on this machine: what they write is what one machine writes, even
where a node or the driver is killed.
"""

from __future__ import annotations

import signal
import socket
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import exporter
from exporter.out import work_folder
from tests.faults.conditions import RECIPE, Conditions, write_large
from tests.kill.run import files_of
from tests.ray.commands import ckptgate_in
from tests.ray.jobs import Deadly, Slow
from tests.units.cases import CASES, EXPORT, SOURCE, Alone, Case, recorded
from tests.waiting import wait_for
from verifier.errors import MachineError
from verifier.ray_runner import on_ray

pytest.importorskip("ray", reason="needs the extra 'ray': tox -e ray")

NORMAL = Conditions()


def ignore(_done: int, _total: int) -> None:
    """Show no progress."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_killed_node_loses_nothing(
    case: Case, cluster: Any, alone: Alone, tmp_path: Path
) -> None:
    (second,) = cluster.worker_nodes
    folder = tmp_path / "units"
    folder.mkdir()
    job = Slow(case.job(alone.inputs, folder), tmp_path / "log")
    lost: set[str] = set()

    def kill_it_at_work() -> None:
        def at_work() -> set[str]:
            ended = {unit for _, unit in job.noted("ended")}
            return {u for node, u in job.noted("begun") if node == second.node_id} - ended

        wait_for(lambda: bool(at_work()))
        lost.update(at_work())
        cluster.remove_node(second, allow_graceful=False)

    killer = threading.Thread(target=kill_it_at_work, daemon=True)
    killer.start()
    with on_ray(cluster.address, 1, ignore) as runner:
        assert runner.slots == 2
        result = runner(job)
    killer.join()
    assert lost
    assert {unit for node, unit in job.noted("begun") if node != second.node_id} >= lost
    assert case.outcome(folder, result) == alone.outcome(case)


def test_a_killed_command_resumes(cluster: Any, tmp_path: Path) -> None:
    for name in ("large", "alone"):
        (tmp_path / name).mkdir()
    source, out = write_large(tmp_path / "large"), tmp_path / "out"
    more = ["--shard-size", "20MB", "--ray", cluster.address]
    with NORMAL.start(["export", str(source), str(out), *RECIPE, "--no-check", *more]) as command:
        wait_for(lambda: len(recorded(out)) >= 2)
        command.send_signal(signal.SIGKILL)
    assert command.returncode == -signal.SIGKILL
    assert not out.exists()
    kept = {unit: (work_folder(out) / "checkpoint" / unit).stat().st_ino for unit in recorded(out)}
    assert NORMAL.export(out, source, *more) == (0, "")
    assert {unit: (out / unit).stat().st_ino for unit in kept} == kept
    assert NORMAL.export(tmp_path / "alone" / "out", source, *more[:2]) == (0, "")
    assert files_of(out) == files_of(tmp_path / "alone" / "out")


def test_a_command_on_two_nodes(cluster: Any, tmp_path: Path) -> None:
    command = partial(ckptgate_in, tmp_path, cluster.address)
    done = command("export", str(SOURCE), "out", *RECIPE)
    assert (done.returncode, done.stderr) == (0, "")
    (tmp_path / "alone").mkdir()
    exporter.export(SOURCE, tmp_path / "alone" / "out", **EXPORT)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "alone" / "out")
    done = command("export", str(SOURCE), "out", *RECIPE)
    assert (done.returncode, done.stdout) == (2, "")
    assert "already exists" in done.stderr
    done = command("check", "out", "--records", "records", "--depth", "payload")
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict: PASSED" in done.stdout
    nan = tmp_path / "nan"
    _with_a_nan(nan)
    done = command("export", str(nan), "other", *RECIPE)
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1
    assert "NaN" in done.stderr


def _with_a_nan(folder: Path) -> None:
    """Copy the source with a NaN in one expert."""
    import json
    import shutil

    shutil.copytree(SOURCE, folder)
    shard = next(folder.glob("*.safetensors"))
    with shard.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        entry = next(e for n, e in header.items() if ".experts." in n and n.endswith(".weight"))
        file.seek(8 + length + entry["data_offsets"][0])
        file.write(b"\xc0\x7f")


@pytest.mark.parametrize(
    ("number", "code", "how"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")],
)
def test_a_signal(
    cluster: Any, tmp_path: Path, number: signal.Signals, code: int, how: str
) -> None:
    (tmp_path / "large").mkdir()
    source, out = write_large(tmp_path / "large"), tmp_path / "out"
    address = ["--ray", cluster.address]
    command = NORMAL.start(["export", str(source), str(out), *RECIPE, *address, "-q"])
    wait_for(lambda: work_folder(out).exists())
    command.send_signal(number)
    _, stderr = command.communicate(timeout=120)
    assert command.returncode == code
    kept = f"finished shards are kept in {work_folder(out)}; run the same command again to resume"
    assert stderr.strip() == f"ckptgate: {how}; {kept}"
    assert not out.exists()


def test_a_unit_that_is_always_lost_is_one_message(cluster: Any) -> None:
    with (
        on_ray(cluster.address, 1, ignore) as runner,
        pytest.raises(MachineError, match="keeps finished units") as error,
    ):
        runner(Deadly())
    assert "\n" not in str(error.value)


def test_nothing_listens_there() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(MachineError, match="cannot reach Ray"), on_ray(address, 1, ignore):
        pass
