# SPDX-License-Identifier: Apache-2.0
"""Work that is divided into independent units, and who does them.

A job names its units, does any of them, and keeps a completion record of each where every machine
sees it. A unit that was lost is done by whoever runs the command again; one that has a record is
not.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from verifier.errors import MachineError, UsageError
from verifier.files import write_atomic

MAX_SHARES = 10_000
Result = TypeVar("Result")
Result_co = TypeVar("Result_co", covariant=True)


class Job(Protocol[Result_co]):
    """Independent units of one piece of work; it is pickled where another process does a unit."""

    def units(self) -> Sequence[str]:
        """Return the names of all units, the same on every machine."""
        ...

    def do(self, units: Sequence[str]) -> Result_co | None:
        """Do those of some units that have no completion record, and record each; whoever finds
        all recorded puts the result together and returns it.
        """
        ...


class Runner(Protocol):
    """Who does the units of a job."""

    @property
    def of(self) -> int | None:
        """Into how many units a job is divided; None: as its kind is best divided."""
        ...

    @property
    def workers(self) -> int | None:
        """Threads or processes of each unit; None: as many as the command is given."""
        ...

    @property
    def slots(self) -> int:
        """How many units are done at a time."""
        ...

    @property
    def here(self) -> bool:
        """Whether this process does units: it can show how each advances."""
        ...

    def __call__(self, job: Job[Result]) -> Result | None:
        """Do units; return the job's result, None where another process has it or units left."""
        ...


@dataclass(frozen=True, slots=True)
class Share:
    """Every ``of``-th unit from the ``number``-th on, from 1; whoever does the last one finishes
    the job.
    """

    number: int
    of: int
    workers: int | None = None
    slots: int = 1
    here: bool = True

    def __str__(self) -> str:
        return f"{self.number}/{self.of}"

    def __call__(self, job: Job[Result]) -> Result | None:
        """Do this share; return the job's result, None where another share has it or units left."""
        return job.do(job.units()[self.number - 1 :: self.of])


def share_of(text: str) -> Share:
    """Return the share that ``2/8`` names.

    Raises:
        UsageError: not of that form, or a number out of range.
    """
    match = re.fullmatch(r"([0-9]{1,5})/([0-9]{1,5})", text.strip())
    if not match or not 1 <= int(match[1]) <= int(match[2]) <= MAX_SHARES:
        raise UsageError(
            f"--units {text!r}: write k/n, such as 2/8; k from 1 to n, n at most {MAX_SHARES:,}"
        )
    return Share(int(match[1]), int(match[2]))


class Records:
    """Completion records of units, by name: in a folder that all machines see, or in an object
    store.
    """

    def __init__(self, place: str) -> None:
        """Find the place; a folder is made with the first record.

        Raises:
            MissingExtra, UsageError: an address that fsspec cannot open.
        """
        self._place, self._fs, self._root = place, None, place
        if "://" not in place:
            return
        try:
            import fsspec  # type: ignore[import-untyped]  # noqa: PLC0415

            self._fs, self._root = fsspec.core.url_to_fs(place)
        except (ImportError, ValueError) as error:
            raise UsageError(f"{place}: {error}") from error

    def names(self) -> set[str]:
        """Return the names of all records.

        Raises:
            MachineError: the place cannot be listed.
        """
        if self._fs is None:
            return {p.name for p in Path(self._root).glob("*.json")}
        self._fs.invalidate_cache()  # fsspec remembers listings for the whole process
        names: list[str] = self._asked("list", lambda fs: fs.glob(f"{self._root}/*.json"))
        return {name.rsplit("/", 1)[-1] for name in names}

    def read(self, name: str) -> bytes:
        """Return a record.

        Raises:
            MachineError: it cannot be read.
        """
        if self._fs is None:
            return Path(self._root, name).read_bytes()
        raw: bytes = self._asked("read", lambda fs: fs.cat_file(f"{self._root}/{name}"))
        return raw

    def write(self, name: str, raw: bytes) -> None:
        """Write a record, completely or not at all.

        Raises:
            MachineError: it cannot be written.
        """
        if self._fs is None:
            Path(self._root).mkdir(parents=True, exist_ok=True)
            write_atomic(Path(self._root, name), raw)
        else:
            self._asked("write", lambda fs: fs.pipe_file(f"{self._root}/{name}", raw))

    def _asked(self, action: str, ask: Callable[[Any], Any]) -> Any:
        """Return the store's answer; its error may name credentials, so only its kind is shown."""
        try:
            return ask(self._fs)
        except Exception as error:
            raise MachineError(f"cannot {action} {self._place}: {type(error).__name__}") from error
