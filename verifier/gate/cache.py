# SPDX-License-Identifier: Apache-2.0
"""Runs kept by what they depend on, so that a base is scored once for many candidates."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError
from verifier.gate.corpora import document_digests
from verifier.gate.identity import identity_of
from verifier.gate.run_file import Run, read_run, write_run
from verifier.gate.score import Journaled, Scored, scoring_identity
from verifier.gate.windows import ScoringPlan


@dataclass(frozen=True)
class Cached:
    """Take the base's run from a directory, or score it and keep it there; the units of an
    interrupted run are resumed.

    A file is named by a digest of weights, configuration, tokenizer, protocol key, batch, device,
    top-k and versions. A file that is damaged, or whose contents are of another checkpoint, is
    scored again. With ``keep_all`` the candidate's run is kept as well.
    """

    folder: Path
    keep_all: bool = False

    def __call__(self, plan: ScoringPlan) -> Scored:
        """Score a plan's checkpoints one after another; the last one, the base, is kept."""
        base = plan.checkpoints[-1]
        return Scored(
            tuple(
                self._run(
                    replace(plan, checkpoints=(ckpt,), model=model),
                    keep=self.keep_all or ckpt is base,
                )
                for ckpt, model in zip(plan.checkpoints, plan.models, strict=True)
            )
        )

    def _run(self, plan: ScoringPlan, *, keep: bool) -> Run:
        (ckpt,) = plan.checkpoints
        file = self.folder / f"{_name(plan, ckpt)}.run"
        if keep and file.is_file():
            try:
                run = read_run(file)
            except ContentError as error:
                plan.options.say(f"{error}; scoring it again")
            else:
                difference = _difference(run, plan, ckpt)
                if difference is None:
                    plan.options.say(f"{ckpt.uri}: taken from the cache, {file}")
                    return run
                plan.options.say(f"{file}: its {difference} differs from {ckpt.uri}; scoring again")
        journal = file.with_name(f"{file.name}.part")
        (run,) = Journaled(journal)(plan).runs
        if keep:
            write_run(file, run)
        journal.unlink(missing_ok=True)
        return run


def _difference(run: Run, plan: ScoringPlan, ckpt: Checkpoint) -> str | None:
    """Return in what a cached run differs from the checkpoint on disk or the plan, or None."""
    recorded = run.header.model_dump()
    for name, digest in asdict(identity_of(ckpt)).items():
        if recorded[name] != digest:
            return name
    for name in sorted(plan.key.keys() | run.header.key.keys()):
        if name != "corpus" and plan.key.get(name) != run.header.key.get(name):
            return name
    return None if run.header.documents == document_digests(plan.options.corpus) else "documents"


def _name(plan: ScoringPlan, ckpt: Checkpoint) -> str:
    identity = {
        **asdict(identity_of(ckpt)),
        "key": {name: value for name, value in plan.key.items() if name != "corpus"},
        "device": plan.options.device,
        **scoring_identity(plan.options),
    }
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
