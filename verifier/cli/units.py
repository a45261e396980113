# SPDX-License-Identifier: Apache-2.0
"""Checks and scores as jobs whose units several processes and machines do."""

from __future__ import annotations

import glob
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verifier.errors import UsageError
from verifier.progress import Progress
from verifier.units import Records, Runner

if TYPE_CHECKING:
    from verifier.findings import Report
    from verifier.gate.corpora import Corpus
    from verifier.gate.run_file import Run


def require_records(paths: Sequence[str], options: Mapping[str, Any]) -> str:
    """Return where the records of a check in units are kept.

    Raises:
        UsageError: options that do not go together.
    """
    place: str | None = options["records"]
    if place is None:
        raise UsageError("--units and --ray need --records PLACE, which all machines see")
    if len(paths) > 1 or options["subset"] is not None:
        raise UsageError("--units and --ray take one PATH, and no --subset")
    if options["depth"] == "eval":
        raise UsageError("--depth eval is not divided: use `ckptgate score` with --units or --ray")
    return place


@dataclass(frozen=True)
class CheckJob:
    """The subsets of a check, each a unit.

    Attributes:
        uri: the checkpoint.
        options: arguments of `verifier.check`.
        of: how many subsets, each a run of modules; a large shard may lie in several.
        place: where their reports are kept.
    """

    uri: str
    options: Mapping[str, Any]
    of: int
    place: str

    @classmethod
    def for_runner(
        cls, runner: Runner, uri: str, options: Mapping[str, Any], place: str
    ) -> CheckJob:
        """Return the check of a checkpoint, in as many subsets as the runner has parts; else as an
        earlier run began, or as there are shards, or as are checked at a time if that is more. Its
        records are those of these files, options and this version.

        Raises:
            CkptgateError: a checkpoint cannot be opened.
        """
        from verifier import __version__  # noqa: PLC0415  (numpy; --help needs it not)
        from verifier.checkpoint import open_checkpoint  # noqa: PLC0415

        given = {k: v for k, v in options.items() if k not in ("workers", "progress", "subset")}
        identity: list[Any] = [__version__, repr(sorted(given.items(), key=lambda item: item[0]))]
        others = [options[name] for name in ("base", "merged_from") if options.get(name)]
        checkpoints = [open_checkpoint(address) for address in (uri, *others)]
        for opened in checkpoints:
            versions = opened.versions()
            identity.append([(s.file, s.size, *versions[s.file]) for s in opened.shards])
        digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:16]
        options = {**options, "workers": runner.workers}
        if not runner.here:
            options.pop("progress", None)
        place = f"{place.rstrip('/')}/{digest}"
        of = runner.of or _parts_begun(Records(place).names())
        return cls(uri, options, of or max(len(checkpoints[0].shards), runner.slots), place)

    def units(self) -> list[str]:
        """Return the names of all subsets."""
        return [f"{number}/{self.of}" for number in range(1, self.of + 1)]

    def do(self, units: Sequence[str]) -> Report | None:
        """Check some subsets; where all are checked, return the report on the checkpoint."""
        from verifier.report import render_json  # noqa: PLC0415  (numpy; --help needs it not)
        from verifier.run import check, merge_reports, report_of  # noqa: PLC0415

        records = Records(self.place)
        done = records.names()
        for unit in units:
            if _file(unit) not in done:
                report = check(self.uri, **{**self.options, "subset": unit})
                records.write(_file(unit), render_json(report).encode())
        files = [_file(unit) for unit in self.units()]
        if not records.names().issuperset(files):
            return None
        return merge_reports([report_of(json.loads(records.read(file))) for file in files])


def _file(unit: str) -> str:
    return f"{unit.replace('/', '-of-')}.json"


@dataclass(frozen=True)
class ScoreJob:
    """The documents of a score in parts, each a unit with a journal of its own.

    Attributes:
        checkpoint: a local directory, or a remote checkpoint that each machine downloads.
        corpus: the documents.
        options: further arguments of `verifier.gate.score_run`.
        of: how many parts.
    """

    checkpoint: str
    corpus: Corpus
    options: Mapping[str, Any]
    of: int

    @classmethod
    def for_runner(
        cls,
        runner: Runner,
        checkpoint: str,
        corpus: Corpus,
        options: Mapping[str, Any],
        progress: Progress,
    ) -> ScoreJob:
        """Return the score of a checkpoint in as many parts as the runner has; else as an earlier
        run began, or as are scored at a time.
        """
        more = {"workers": runner.workers, "progress": progress if runner.here else None}
        journal: Path = options["journal"]
        begun = (p.name for p in journal.parent.glob(f"{glob.escape(journal.name)}.*"))
        of = runner.of or _parts_begun(begun) or runner.slots
        return cls(checkpoint, corpus, {**options, **more}, of)

    def units(self) -> list[str]:
        """Return the names of all parts."""
        return [str(number) for number in range(1, self.of + 1)]

    def do(self, units: Sequence[str]) -> Run | None:
        """Score some parts; where all are scored, return the run."""
        from verifier.checkpoint import local_directory, open_checkpoint  # noqa: PLC0415
        from verifier.gate import score_run  # noqa: PLC0415

        run = None
        for unit in units:
            ranks = int(unit) - 1, self.of
            checkpoint = open_checkpoint(local_directory(self.checkpoint))
            run = score_run(checkpoint, self.corpus, ranks=ranks, **self.options) or run
        return run


def _parts_begun(names: Iterable[str]) -> int | None:
    """Return into how many parts an earlier run divided a job, by the names of its records; None
    where there is none.
    """
    found = (re.search(r"-of-([0-9]+)(?:\.json)?$", name) for name in names)
    return max((int(match[1]) for match in found if match), default=None)
