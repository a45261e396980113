# SPDX-License-Identifier: Apache-2.0
"""A Slurm cluster of two nodes on this machine: its daemons, and job arrays of the example.

All that the daemons write is in one folder; nothing of the machine's own Slurm is used.
"""

from __future__ import annotations

import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.paths import ROOT
from tests.waiting import wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scancel", "scontrol")
NODES = ("n1", "n2")
SCRIPT = ROOT / "examples" / "slurm.sh"
ENDED = frozenset({"COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY"})
# Each node says that it has what the example asks for, whatever this machine has. A requeued task
# waits until its credential expires.
CONFIG = """\
ClusterName=ckptgate
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmUser={user}
SlurmdUser={user}
AuthInfo=socket={folder}/munge,cred_expire=20
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
SlurmdTimeout=15
MessageTimeout=10
KillWait=30
MinJobAge=86400
ReturnToService=2
JobRequeue=1
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=8192
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=8192
PartitionName=all Nodes=n1,n2 Default=YES State=UP
"""


@dataclass(frozen=True)
class Task:
    """A task of an array as Slurm shows it: where it ran, how it ended, and how often it was put
    back into the queue.
    """

    number: int
    state: str
    node: str
    exit_code: int
    signal: int
    restarts: int


class Cluster:
    """A running cluster."""

    def __init__(self, folder: Path) -> None:
        """Start the daemons in a folder, and wait until all nodes are idle."""
        self._folder, self._config = folder, folder / "slurm.conf"
        self._daemons: dict[str, subprocess.Popen[bytes]] = {}
        self._configure()
        files = [f"--{name}-file={folder}/munge.{name}" for name in ("log", "pid", "seed")]
        files += [f"--key-file={folder}/key", f"--socket={folder}/munge"]
        # Forced: a temporary folder is closed to other users.
        self._start("munged", "--foreground", "--force", *files)
        wait_for((folder / "munge").exists)
        self._start("slurmctld", "-D")
        self.start_dead_nodes()

    def start_dead_nodes(self) -> None:
        """Start each node that does not run, and wait until all take tasks."""
        for node in NODES:
            if node not in self._daemons:
                self._start("slurmd", "-D", "-N", node, name=node, SLURMD_NODENAME=node)
        wait_for(lambda: all(r["State"] == "IDLE" for r in self._records("node")))

    def kill_node(self, node: str) -> None:
        """Kill a node's daemon and all that runs on the node, at once."""
        tasks = self.processes(SLURMD_NODENAME=node)
        for process in {*tasks, *map(_parent, tasks)} - {os.getpid()}:
            os.kill(process, signal.SIGKILL)
        self._daemons.pop(node).wait()

    def submit(self, logs: Path, array: str, *arguments: str, of: int | None = None) -> str:
        """Submit the example as an array, as a user does who has ``ckptgate`` on PATH.

        Args:
            logs: the folder that gets what each task prints.
            array: the numbers of the tasks.
            arguments: of ``ckptgate``.
            of: the number of tasks, in CKPTGATE_TASKS.

        Returns:
            The number of the array.
        """
        python = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        more = {"PATH": python, "PYTHONPATH": str(ROOT)}
        more |= {"CKPTGATE_TASKS": str(of)} if of is not None else {}
        options = ["--parsable", f"--array={array}", f"--output={logs}/%A_%a"]
        return self._run("sbatch", *options, str(SCRIPT), *arguments, **more).strip()

    def cancel(self, array: str, number: int) -> None:
        """Cancel a task."""
        self._run("scancel", f"{array}_{number}")

    def running(self, array: str) -> list[Task]:
        """Return the tasks of an array that run."""
        records = self._records("job", array)
        return [_task_of(record) for record in records if record["JobState"] == "RUNNING"]

    def ended(self, array: str) -> list[Task]:
        """Wait until all tasks of an array have ended, and return them by number."""
        wait_for(lambda: all(r["JobState"] in ENDED for r in self._records("job", array)))
        tasks = [_task_of(record) for record in self._records("job", array)]
        return sorted(tasks, key=lambda task: task.number)

    def processes(self, **environment: str) -> list[int]:
        """Return the processes of this cluster that have these variables."""
        wanted = {"SLURM_CONF": str(self._config), **environment}
        entries = {f"{name}={value}".encode() for name, value in wanted.items()}
        found = []
        for file in Path("/proc").glob("[0-9]*/environ"):
            with suppress(OSError):  # it has ended, or is another user's
                if entries <= set(file.read_bytes().split(b"\0")):
                    found.append(int(file.parent.name))
        return found

    def stop(self) -> None:
        """Stop the daemons, the first one last, and wait until no process is left."""
        for daemon in reversed(self._daemons.values()):
            daemon.terminate()
            daemon.wait(120)
        wait_for(lambda: not self.processes())

    def _configure(self) -> None:
        (self._folder / "state").mkdir()
        key = self._folder / "key"
        key.touch(0o600)
        key.write_bytes(secrets.token_bytes(128))
        values = {
            "folder": self._folder,
            "host": socket.gethostname(),
            "user": pwd.getpwuid(os.getuid()).pw_name,
            "ports": _free_ports(3),
        }
        self._config.write_text(CONFIG.format_map(values))

    def _start(self, program: str, *options: str, name: str = "", **more: str) -> None:
        name = name or program
        with (self._folder / f"{name}.out").open("ab") as out:
            self._daemons[name] = subprocess.Popen(
                [_path(program), *options], stdout=out, stderr=out, env=self._environment(more)
            )

    def _run(self, program: str, *arguments: str, **more: str) -> str:
        line = [_path(program), *arguments]
        return subprocess.check_output(line, text=True, env=self._environment(more))

    def _environment(self, more: Mapping[str, str]) -> dict[str, str]:
        return {**os.environ, "SLURM_CONF": str(self._config), **more}

    def _records(self, *what: str) -> list[dict[str, str]]:
        lines = self._run("scontrol", "--oneliner", "show", *what).splitlines()
        return [dict(re.findall(r"(\S+?)=(\S*)", line)) for line in lines]


def _task_of(record: Mapping[str, str]) -> Task:
    code, number = map(int, record["ExitCode"].split(":"))
    return Task(
        int(record["ArrayTaskId"]),
        record["JobState"],
        record["NodeList"],
        code,
        number,
        int(record["Restarts"]),
    )


def _parent(process: int) -> int:
    """Return the number of a process's parent."""
    status = Path(f"/proc/{process}/status").read_text()
    return int(re.findall(r"^PPid:\s*([0-9]+)", status, re.MULTILINE)[0])


def _path(program: str) -> str:
    """Return the path of a daemon or command; daemons are not on every user's PATH."""
    return shutil.which(program, path=f"{os.environ['PATH']}{os.pathsep}/usr/sbin") or ""


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(closing(socket.socket())) for _ in range(count)]
        for free in sockets:
            free.bind(("127.0.0.1", 0))
        return [free.getsockname()[1] for free in sockets]


MISSING = [name for name in PROGRAMS if not _path(name)]


def slurm_version() -> str:
    """Return the version of Slurm on this machine."""
    return subprocess.check_output([_path("slurmctld"), "-V"], text=True).split()[-1]
