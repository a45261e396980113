# SPDX-License-Identifier: Apache-2.0
"""Jobs on Ray: each unit is a task. Ray decides where a task runs, and runs it again where a node
died.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import FrameType
from typing import Any

from verifier.errors import CkptgateError, MachineError, MissingExtra
from verifier.progress import Progress
from verifier.units import Job, Result

_CONNECT_SECONDS = 10


@dataclass(frozen=True, slots=True)
class RayRunner:
    """Does each unit of a job as a Ray task.

    Attributes:
        workers: processors of a task.
        slots: tasks that the cluster has room for at a time.
        gpus: GPUs of a task.
        progress: called with the number of finished units, and of all.
        of: a job is divided as its kind is best divided.
        here: tasks are other processes.
    """

    workers: int
    slots: int
    gpus: int
    progress: Progress
    of: None = None
    here: bool = False

    def __call__(self, job: Job[Result]) -> Result | None:
        """Do all units; return the job's result, None where another process has it.

        Raises:
            CkptgateError: what a unit raised.
            MachineError: a task was lost more often than Ray runs it again.
        """
        import ray  # noqa: PLC0415  (an extra)

        units, folder = job.units(), os.getcwd()
        task = ray.remote(num_cpus=self.workers, num_gpus=self.gpus)(_do)
        shared = ray.put(job)
        running = [task.remote(shared, unit, folder) for unit in units]
        result: Result | None = None
        with _failures():
            while running:
                self.progress(len(units) - len(running), len(units))
                (ended, *_), running = ray.wait(running)
                result = ray.get(ended) or result
        self.progress(len(units), len(units))
        return result


def _do(job: Job[Result], unit: str, folder: str) -> Result | None:
    """Do a unit in the directory of the command, where relative paths are."""
    try:
        os.chdir(folder)
    except OSError as error:
        raise MachineError(
            f"{folder}: {error.strerror} on node {socket.gethostname()}; run the command in a "
            "directory that all nodes mount"
        ) from error
    return job.do([unit])


@contextmanager
def on_ray(
    address: str | None, workers: int, progress: Progress, *, gpus: int = 0
) -> Iterator[RayRunner]:
    """Connect to a cluster, and yield what runs jobs there.

    Args:
        address: HOST:PORT of a cluster's head node; None: $RAY_ADDRESS or a cluster that runs on
            this machine, else Ray is started here and stopped at the end.
        workers: processors of a task; less where a node has less.
        progress: called with the number of finished units, and of all.
        gpus: GPUs of a task.

    Raises:
        MachineError: the cluster cannot be reached, or has no room for a task.
    """
    import ray  # noqa: PLC0415  (an extra)

    if address is not None:
        _require_reachable(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with _failures():
            ray.init(
                address,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        nodes = [n["Resources"] for n in ray.nodes() if n["Alive"] and n["Resources"].get("CPU")]
        each = int(min([workers, *(n["CPU"] for n in nodes)]))
        slots = sum(_room(node, each, gpus) for node in nodes) if each else 0
        if not slots:
            raise MachineError(f"Ray: no node has {each or 1} CPU and {gpus} GPU for a task")
        with _terminable(handler):
            yield RayRunner(each, slots, gpus, progress)
    finally:
        signal.signal(signal.SIGTERM, handler)  # Ray has set its own
        ray.shutdown()


@contextmanager
def _terminable(handler: Any) -> Iterator[None]:
    """Call a handler of SIGTERM outside Ray's functions: inside, they pass on nothing that it
    raises but KeyboardInterrupt.
    """
    received: list[int] = []

    def interrupt(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    except KeyboardInterrupt:
        if received and callable(handler):
            handler(received[0], None)
        raise


def _room(node: dict[str, float], cpus: int, gpus: int) -> int:
    """Return how many tasks a node has room for."""
    room = int(node["CPU"]) // cpus
    return min(room, int(node.get("GPU", 0)) // gpus) if gpus else room


def require_ray() -> None:
    """Refuse to start without Ray.

    Raises:
        MissingExtra: it is not installed.
    """
    if find_spec("ray") is None:
        raise MissingExtra("--ray", "ray")


def _require_reachable(address: str) -> None:
    """Refuse an address where nothing listens; Ray itself would try it for minutes."""
    host, port = address.rsplit(":", 1)
    try:
        socket.create_connection((host, int(port)), _CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise MachineError(f"cannot reach Ray at {address}: {error}") from error


@contextmanager
def _failures() -> Iterator[None]:
    """Turn errors of Ray into one line; what a task raised is raised as it was."""
    from ray.exceptions import RayError, RayTaskError  # noqa: PLC0415  (an extra)

    try:
        yield
    except RayTaskError as error:
        cause: Any = error.cause
        raise cause from (None if isinstance(cause, CkptgateError) else error)
    except (RayError, ConnectionError, RuntimeError) as error:
        first = str(error).strip().partition("\n")[0]
        raise MachineError(
            f"Ray: {type(error).__name__}: {first} Run the same command again when that is fixed: "
            "it keeps finished units"
        ) from error
