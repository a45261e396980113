# SPDX-License-Identifier: Apache-2.0
"""Write a plan: shards, index, configs, auxiliary files and manifest, under the final name at the
end.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exporter import emit, stream
from exporter.out import check_out, work_folder
from exporter.plan import Plan
from verifier.checkpoint import INDEX, Checkpoint
from verifier.errors import EncodeError, MachineError
from verifier.manifest import MANIFEST, Manifest
from verifier.text import counted

PathLike = str | os.PathLike[str]
Progress = Callable[[int], None]


@dataclass(frozen=True)
class WriteOptions:
    """How an output is written.

    Attributes:
        overwrite: replace an existing checkpoint at OUT.
        workers: threads that encode and copy; by default the number of processors, at most 4.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.
        notes: added to the manifest's notes.
    """

    overwrite: bool = False
    workers: int | None = None
    shard_bytes: int | None = None
    progress: Progress | None = None
    notes: Mapping[str, Any] = field(default_factory=dict)

    def tasks(self, plan: Plan) -> list[stream.Task]:
        """Return the shards of a plan."""
        return stream.tasks(plan, self.shard_bytes or stream.SHARD_BYTES)

    @property
    def threads(self) -> int:
        """How many threads encode and copy."""
        return self.workers or min(4, os.cpu_count() or 1)


def prepare_out(out: PathLike, options: WriteOptions, *inputs: PathLike | None) -> Path:
    """Return the path of an output after checking that it can be used.

    Args:
        out: the directory to make.
        options: how it is written.
        inputs: the checkpoints that are read.

    Raises:
        UsageError: it exists or is an input, or its parent does not exist.
    """
    target = Path(out)
    uris = tuple(os.fspath(uri) for uri in inputs if uri is not None)
    check_out(target, overwrite=options.overwrite, inputs=uris)
    return target


def write_plan(
    plan: Plan,
    out: Path,
    options: WriteOptions,
    *,
    prove: Callable[[Path], dict[str, Any]] | None = None,
    auxiliary: Checkpoint | None = None,
) -> Manifest:
    """Write a plan's output and return its manifest.

    Args:
        plan: what to write.
        out: the directory to make.
        options: how it is written.
        prove: called with the finished directory before it gets its name; what it returns goes into
            the manifest's notes.
        auxiliary: a further checkpoint whose auxiliary files are copied.

    Raises:
        PlanError, EncodeError: what the checkpoints do not allow, or a weight that cannot be
            encoded.
        UsageError: another export is writing the same directory.
        MachineError: the disk; or a source changed while it was read.
    """
    tasks = options.tasks(plan)
    fingerprint = stream.fingerprint(plan, tasks)
    with (
        disk_failures(out),
        stream.working(out, fingerprint, overwrite=options.overwrite) as folder,
    ):
        return write_result(plan, out, folder, options, prove=prove, auxiliary=auxiliary)


@contextmanager
def disk_failures(out: Path) -> Iterator[None]:
    """Turn errors of the disk into one that says how to resume.

    Raises:
        MachineError: naming the file.
    """
    try:
        yield
    except OSError as error:
        raise MachineError(
            f"cannot write {error.filename or work_folder(out)}: {error.strerror or error}; run "
            "the same command again when that is fixed: it keeps finished shards"
        ) from error


def write_result(
    plan: Plan,
    out: Path,
    folder: Path,
    options: WriteOptions,
    *,
    prove: Callable[[Path], dict[str, Any]] | None = None,
    auxiliary: Checkpoint | None = None,
) -> Manifest:
    """Write what a locked work directory does not have yet, and give it its final name; arguments
    and errors are those of `write_plan`.
    """
    versions = [(ckpt, ckpt.versions()) for ckpt in (plan.source, plan.onto) if ckpt is not None]
    kv_cache = emit.declares_kv_cache(plan)
    written = stream.write(
        plan,
        options.tasks(plan),
        folder,
        workers=options.threads,
        progress=options.progress or (lambda _nbytes: None),
    )
    for ckpt, before in versions:
        ckpt.require_unchanged(before)
    encoded = sum(summary.linears for summary in written.encoded.values())
    planned = sum(plan.formats().values())
    if encoded != planned:
        raise EncodeError(f"quantized {encoded:,} of {counted(planned, 'linear layer')}")
    emit.write_index(folder, written.digests)
    config = plan.kept.config or {}
    configs = emit.write_configs(folder, config, kv_cache=kv_cache, engines=plan.engines)
    files = [*configs, INDEX]
    origins = [plan.source, plan.kept] if plan.kind == "repair" else [plan.kept, plan.source]
    origins += [auxiliary] if auxiliary is not None else []
    files += emit.copy_auxiliary_files(folder, origins)
    manifest = emit.manifest_of(plan, out.name, folder, written, files)
    manifest.notes.update(options.notes)
    if prove is not None:
        manifest.notes.update(prove(folder))
    (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
    stream.finish(folder, out, overwrite=options.overwrite)
    return manifest
