# SPDX-License-Identifier: Apache-2.0
"""Runs kept by what they depend on, so that a base is scored once for many candidates."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from verifier.checkpoint import Checkpoint
from verifier.errors import ContentError, MachineError
from verifier.gate.corpora import Corpus
from verifier.gate.jobs import HF, Scorer
from verifier.gate.run_file import Run, read_run, write_run
from verifier.gate.score import Progress, identity_of, score_run, weights_digest
from verifier.gate.windows import Protocol, plan_units


def cached_run(
    folder: Path,
    ckpt: Checkpoint,
    corpus: Corpus,
    *,
    protocol: Protocol,
    window: int,
    batch: int,
    device: str,
    workers: int | None,
    top_k: int,
    progress: Progress | None,
    say: Callable[[str], None] | None,
    keep: bool,
    scorer: Scorer = HF,
) -> Run:
    """Return a checkpoint's run from the cache, or score it; what an interrupted one had done is
    used.

    The name of the file is a digest of weights, protocol key, batch, device, top-k and versions. A
    file that does not read as it was written is scored anew.

    Args:
        folder: the cache.
        ckpt: what to score.
        corpus: on what.
        protocol: as in `score_run`, as the other arguments.
        window: tokens in a window.
        batch: windows in a unit of work.
        device: where the model runs.
        workers: processes.
        top_k: log-probabilities to keep a token.
        progress: called with (done, total).
        say: called with what a person should know.
        keep: whether the finished run stays in the cache.
        scorer: what turns tokens into log-probabilities.
    """
    key, _ = plan_units([ckpt], corpus, protocol, window, batch, scorer)
    identity = {
        "weights": weights_digest(ckpt),
        "key": {k: v for k, v in key.items() if k != "corpus"},
        "batch": batch,
        "device": device,
        "top_k": top_k,
        "versions": {p: version(p) for p in ("torch", "transformers")},
        **identity_of(scorer),
    }
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
    file, journal = folder / f"{name}.run", folder / f"{name}.run.part"
    if keep and file.is_file():
        try:
            found = read_run(file)
            if say:
                say(f"{ckpt.uri}: scored before, from {file}")
            return found
        except ContentError as error:
            if say:
                say(f"{error}; scoring it again")
    scored = score_run(
        ckpt,
        corpus,
        protocol=protocol,
        window=window,
        batch=batch,
        device=device,
        workers=workers,
        top_k=top_k,
        journal=journal,
        progress=progress,
        say=say,
        scorer=scorer,
    )
    if scored is None:
        raise MachineError("a unit of work was lost")
    if keep:
        write_run(file, scored)
    journal.unlink(missing_ok=True)
    return scored
