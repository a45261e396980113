# SPDX-License-Identifier: Apache-2.0
"""Repair as a function: diagnose, write, prove by values; returns the manifest that it wrote."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from exporter.layout import Layout, stacks_of, unstacked
from exporter.plan.repair import Repair, logical
from exporter.plan.repair import repair as plan_of
from exporter.stream import evidence
from exporter.writing import PathLike, Progress, WriteOptions, prepare_out, write_plan
from verifier.checkpoint import Checkpoint, Tensor, open_checkpoint
from verifier.errors import ContentError
from verifier.manifest import Manifest
from verifier.schemes import gather, read_declarations


@dataclass(frozen=True)
class Diagnosis:
    """What a repair will do.

    Attributes:
        repair: its plan.
        differences: how each unquantized tensor of both checkpoints differs from the base's.
        compared: how many quantized modules were compared with the base by value.
    """

    repair: Repair
    differences: dict[str, evidence.Difference]
    compared: int

    def summary(self) -> dict[str, Any]:
        """Return what a repair does, as counts and the first names of each kind; the manifest has
        it as ``notes.repair``.
        """
        repair = self.repair
        replaced = {n: d for n, d in self.differences.items() if d != "equal"}
        split = {n: list(parts[:3]) for n, parts in list(repair.split.items())[:3]}
        return {
            "renamed": [len(repair.renamed), dict(list(repair.renamed.items())[:3])],
            "split": [len(repair.split), sum(map(len, repair.split.values())), split],
            "replaced": [len(replaced), dict(list(replaced.items())[:10])],
            "from_base": [len(repair.missing), list(repair.missing[:10])],
            "dropped": [len(repair.dropped), list(repair.dropped[:10])],
            "kept": [len(repair.quantized), self.compared],
            "described": _declaration(repair),
        }


def _declaration(repair: Repair) -> dict[str, Any]:
    """Return what the broken export declares, what the result declares, and entries that match no
    module.
    """
    declared = read_declarations(repair.plan.source).effective
    specs = repair.plan.specs
    written = gather(Tensor(s.name, s.dtype, s.shape, "", 0, s.nbytes) for s in specs)
    formats = (m.inferred_format for m in written.values() if m.quantized)
    algos = sorted({fmt.algo for fmt in formats if fmt is not None})
    result = algos[0] if len(algos) == 1 else f"MIXED_PRECISION of {' and '.join(algos)}"
    if declared is None or not declared.modelopt:
        before = "nothing" if declared is None else declared.method
        return {"was": before, "shown": result, "dead": [0, []], "absent": [0, []]}
    dead = declared.exclusions.dead(set(written))
    absent = [n for n in declared.layers if n not in written]
    return {
        "was": declared.algo,
        "shown": result,
        "dead": [len(dead), dead[:3]],
        "absent": [len(absent), absent[:3]],
    }


def plan_repair(broken: PathLike, *, base: PathLike) -> Diagnosis:
    """Return what a repair would do, without writing anything: headers decide, and values are read
    to refuse in time.

    Raises:
        UsageError: a missing directory.
        PlanError, UnsupportedConversion: what cannot be known.
    """
    source, reference = open_checkpoint(broken), open_checkpoint(base)
    if not stacks_of(source):  # its experts are single tensors: read the base's so too
        reference = unstacked(reference)
    repair = plan_of(source, reference, lambda: _layout_of(reference))
    evidence.require_scales(repair, source)
    differences = evidence.compare(repair, source, reference)
    return Diagnosis(repair, differences, evidence.require_places(repair, source, reference))


def _layout_of(base: Checkpoint) -> Layout | None:
    """Return the layout of the base's model in memory; None where transformers is not installed, or
    does not know the model or how to convert it.
    """
    if find_spec("transformers") is None:
        return None
    # An optional extra, which costs seconds.
    from exporter.detect import meta_model  # noqa: PLC0415
    from exporter.layout.hf_mapping import of_model  # noqa: PLC0415

    try:
        return of_model(meta_model(base.uri, base.config or {}), logical(base))
    except ContentError:
        return None


def repair(
    broken: PathLike,
    out: PathLike,
    *,
    base: PathLike,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Fix names, expert layout and configs of an export without re-quantizing; no quantized byte
    changes.

    Args:
        broken: directory of the export.
        out: directory to make.
        base: directory of the checkpoint that it was made from, in hub layout.
        overwrite: replace an existing checkpoint at ``out``.
        workers: shards written at a time.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: a missing directory, ``out`` in use or existing.
        PlanError, UnsupportedConversion: what cannot be known; nothing is written then.
    """
    options = WriteOptions(overwrite, workers, shard_bytes, progress)
    target = prepare_out(out, options, broken, base)
    diagnosis = plan_repair(broken, base=base)

    def prove(folder: Path) -> dict[str, Any]:
        return {
            "unchanged": evidence.unchanged(diagnosis.repair, folder),
            "repair": diagnosis.summary(),
        }

    return write_plan(diagnosis.repair.plan, target, options, prove=prove)
