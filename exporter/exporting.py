# SPDX-License-Identifier: Apache-2.0
"""Export and merge as functions: open, plan, write, emit; each returns the manifest it wrote."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporter import emit, stream
from exporter.layout import ExpertLayout, Layout, of_model, read_stacks, unstacked
from exporter.plan import Plan, Rest, Stats, build, header_digest, parse_layers
from exporter.plan import merge as plan_merge
from exporter.plan.repair import Repair, logical
from exporter.plan.repair import repair as repair_of
from exporter.recipes import KvName, Recipe
from exporter.recipes import load as load_recipe
from exporter.stream import evidence
from verifier import __version__
from verifier.checkpoint import INDEX, NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.checkpoint.header import read_shard
from verifier.checkpoint.source import LocalSource
from verifier.errors import ContentError, EncodeError, PlanError, UsageError
from verifier.manifest import MANIFEST, File, Manifest, SourceRecord, digest
from verifier.schemes import FLOATS, gather, read_declarations

PathLike = str | os.PathLike[str]
Progress = Callable[[int], None]
STATS_LEAF = "input_amax"
KV_LEAVES = ("k_amax", "v_amax")


def plan_export(
    source: PathLike | Checkpoint,
    *,
    recipe: str | Path | Recipe,
    onto: PathLike | None = None,
    layers: str | None = None,
    input_scale: Literal["one", "stats"] | None = None,
    stats: PathLike | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
) -> Plan:
    """Return the plan of an export without writing anything; the arguments are those of `export`.

    Raises:
        UsageError: options that contradict, an unknown recipe, a missing folder.
        PlanError: what the checkpoints do not allow.
    """
    if stats is not None and input_scale == "one":
        raise UsageError("--input-scale one and --stats contradict: give one of them")
    if input_scale == "stats" and stats is None:
        raise UsageError("--input-scale stats needs --stats FILE")
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    chosen = parse_layers(layers) if layers is not None else None
    opened = unstacked(source if isinstance(source, Checkpoint) else open_checkpoint(source))
    target = unstacked(open_checkpoint(onto)) if onto is not None else None
    values = read_stats(stats) if stats is not None else None
    how: Literal["one", "stats"] | None = "stats" if stats is not None else input_scale
    if how is None and onto is not None:
        how = "one"
    return build(
        opened,
        found,
        onto=target,
        layers=chosen,
        input_scale=how,
        stats=values,
        rest=rest,
        kv_cache=kv_cache,
        expert_layout=expert_layout,
    )


def export(
    source: PathLike,
    out: PathLike,
    *,
    recipe: str | Path | Recipe,
    onto: PathLike | None = None,
    layers: str | None = None,
    input_scale: Literal["one", "stats"] | None = None,
    stats: PathLike | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize a checkpoint from folder to folder and return the manifest that was written.

    Args:
        source: folder of a checkpoint in hub layout; modules of it that are quantized are decoded
            first.
        out: folder to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        onto: the checkpoint whose bytes everything that is not selected keeps (a mixed export).
        layers: ``3-59`` or ``3,5``: quantize in these layers only.
        input_scale: ``one`` writes 1.0 for every activation scale (the default with ``onto``).
        stats: a safetensors file of input maxima, ``<hub module>.input_amax``, and of KV maxima.
        rest: quantized modules that the recipe leaves: ``keep`` their bytes or write them as
            ``bf16``; by default their bytes are kept where engines read that format beside the
            recipe's.
        kv_cache: ``fp8`` (a scale for each layer, from ``stats``) or ``fp8_cast`` (none), instead
            of the recipe's.
        expert_layout: of a source that holds experts in stacks: write them ``per-expert`` or as the
            ``hub`` has them; by default what engines read of its family (docs/expert-layouts.md).
        overwrite: swap an existing checkpoint at ``out`` whole.
        workers: shards written at a time; by default the number of processors, at most 4.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: options that contradict, an unknown recipe, ``out`` in use or existing.
        PlanError, EncodeError: what the checkpoints do not allow, or a weight that cannot be
            encoded.
        OSError: the disk.
    """
    target = Path(out)
    stream.check_out(target, overwrite=overwrite, inputs=_inputs(source, onto))
    plan = plan_export(
        source,
        recipe=recipe,
        onto=onto,
        layers=layers,
        input_scale=input_scale,
        stats=stats,
        rest=rest,
        kv_cache=kv_cache,
        expert_layout=expert_layout,
    )
    return _write(plan, target, overwrite, workers, shard_bytes, progress)


def export_model(
    model: Any,
    out: PathLike,
    *,
    recipe: str | Path | Recipe,
    source: PathLike | None = None,
    layers: str | None = None,
    input_scale: Literal["one", "stats"] | None = None,
    stats: PathLike | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize a transformers model that is in memory, by the plan, codecs and writer of `export`.

    Args:
        model: unquantized, its parameters on the CPU or on devices of this process; it is not
            changed.
        out: folder to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        source: the checkpoint that it was loaded from: its index decides the hub layout, and side
            files, and tensors that the model has no place for or holds narrower but unchanged, come
            from there. Without it, names and config are what `save_pretrained` would write.
        layers: quantize in these layers only.
        input_scale: ``one`` writes 1.0 for every activation scale.
        stats: a safetensors file of input maxima by hub module.
        kv_cache: ``fp8`` or ``fp8_cast``, instead of the recipe's.
        expert_layout: as for `export`.
        overwrite: swap an existing checkpoint at ``out`` whole.
        workers: shards written at a time.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: options that contradict, an unknown recipe, ``out`` in use or existing.
        UnsupportedConversion: a tensor that cannot be brought to hub layout; no in-memory name is
            ever written.
        PlanError, EncodeError: what the model does not allow, or a weight that cannot be encoded.
    """
    from exporter.layout.memory import as_checkpoint  # noqa: PLC0415  (transformers is used here only)

    target = Path(out)
    stream.check_out(target, overwrite=overwrite, inputs=_inputs(source))
    origin = open_checkpoint(source) if source is not None else None
    held = as_checkpoint(model, origin, logical(origin) if origin is not None else None)
    plan = plan_export(
        held,
        recipe=recipe,
        layers=layers,
        input_scale=input_scale,
        stats=stats,
        kv_cache=kv_cache,
        expert_layout=expert_layout,
    )
    return _write(plan, target, overwrite, workers, shard_bytes, progress, sides=origin)


def merge(
    experts: PathLike,
    out: PathLike,
    *,
    onto: PathLike,
    input_scale: Literal["keep", "one"] = "keep",
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Move routed experts that another tool quantized onto a checkpoint of another format; no byte
    is re-quantized.

    Args:
        experts: folder whose quantized routed experts are taken.
        out: folder to make.
        onto: folder that everything else is kept from.
        input_scale: ``keep`` the experts' activation scales, or write ``one``.
        overwrite: swap an existing checkpoint at ``out`` whole.
        workers: shards written at a time.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.
    """
    target = Path(out)
    stream.check_out(target, overwrite=overwrite, inputs=_inputs(experts, onto))
    plan = plan_merge(open_checkpoint(experts), open_checkpoint(onto), input_scale=input_scale)
    return _write(plan, target, overwrite, workers, shard_bytes, progress)


@dataclass(frozen=True)
class Diagnosis:
    """What a repair will do: its plan, and what values say: how each unquantized tensor differs
    from the base's.
    """

    repair: Repair
    same: dict[str, evidence.How]
    compared: int


def plan_repair(broken: PathLike, *, base: PathLike) -> Diagnosis:
    """Return what a repair would do, without writing anything; headers decide, and values are read
    to refuse in time.

    Raises:
        UsageError: a missing folder.
        PlanError, UnsupportedConversion: what cannot be known.
    """
    source, reference = open_checkpoint(broken), open_checkpoint(base)
    if read_stacks(source) is None:  # its experts stand one by one: so are the base's read
        reference = unstacked(reference)
    found = repair_of(source, reference, lambda: _layout_of(reference))
    evidence.require_scales(found, source)
    same = evidence.compare(found, source, reference)
    return Diagnosis(found, same, evidence.require_places(found, source, reference))


def _layout_of(base: Checkpoint) -> Layout | None:
    """Return the layout of the base's model in memory, where transformers is here and has that
    model and mapping.
    """
    if find_spec("transformers") is None:
        return None
    from exporter.detect import meta_model  # noqa: PLC0415  (transformers costs seconds)

    try:
        model = meta_model(base.uri, base.config or {})
        return of_model(model, logical(base))
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
    """Make a wrongly named, wrongly stacked or wrongly described export right; no quantized byte
    changes.

    Args:
        broken: folder of the export.
        out: folder to make.
        base: folder of the checkpoint that it was made from, in hub layout.
        overwrite: swap an existing checkpoint at ``out`` whole.
        workers: shards written at a time.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: a missing folder, ``out`` in use or existing.
        PlanError, UnsupportedConversion: what cannot be known; nothing is written then.
    """
    target = Path(out)
    stream.check_out(target, overwrite=overwrite, inputs=_inputs(broken, base))
    found = plan_repair(broken, base=base)
    plan = found.repair.plan

    def prove(folder: Path) -> dict[str, Any]:
        return {
            "unchanged": evidence.unchanged(plan, found.repair, folder),
            "repair": summary(found),
        }

    return _write(plan, target, overwrite, workers, shard_bytes, progress, prove)


def summary(found: Diagnosis) -> dict[str, Any]:
    """Return what a repair does, as counts and the first names of each kind."""
    it = found.repair
    replaced = {n: how for n, how in found.same.items() if how != "equal"}
    return {
        "renamed": [len(it.renamed), dict(list(it.renamed.items())[:3])],
        "split": [
            len(it.split),
            sum(map(len, it.split.values())),
            {n: list(v[:3]) for n, v in list(it.split.items())[:3]},
        ],
        "replaced": [len(replaced), dict(list(replaced.items())[:10])],
        "from_base": [len(it.missing), list(it.missing[:10])],
        "dropped": [len(it.dropped), list(it.dropped[:10])],
        "kept": [len(it.quantized), found.compared],
        "described": _described(it),
    }


def _described(it: Repair) -> dict[str, Any]:
    """Return what the export's own description says that its tensors do not show."""
    declared = read_declarations(it.plan.source).effective
    written = gather(Tensor(s.name, s.dtype, s.shape, "", 0, s.nbytes) for s in it.plan.specs)
    modules, algos = (
        set(written),
        sorted(
            {
                m.inferred_format.algo
                for m in written.values()
                if m.quantized and m.inferred_format is not None
            }
        ),
    )
    shown = algos[0] if len(algos) == 1 else f"MIXED_PRECISION of {' and '.join(algos)}"
    if declared is None or not declared.known:
        was = "nothing" if declared is None else declared.method
        return {"was": was, "shown": shown, "dead": [0, []], "absent": [0, []]}
    dead, absent = (
        declared.exclusions.dead(modules),
        [n for n in declared.layers if n not in modules],
    )
    return {
        "was": declared.algo,
        "shown": shown,
        "dead": [len(dead), dead[:3]],
        "absent": [len(absent), absent[:3]],
    }


def _inputs(*paths: PathLike | None) -> tuple[str, ...]:
    return tuple(os.fspath(p) for p in paths if p is not None)


def read_stats(path: PathLike) -> Stats:
    """Return input maxima by hub module name, and KV maxima by their own, from a stats file.

    Raises:
        UsageError: no such file.
        PlanError: no safetensors, no entry, or a value that is not finite and positive.
    """
    file = Path(path)
    if not file.is_file():
        raise UsageError(f"{file}: no such stats file")
    source = LocalSource(file.parent)
    shard = read_shard(source, file.name, file.stat().st_size)
    if shard.problems:
        raise PlanError(f"{file}: no stats file: {shard.problems[0].message}")
    inputs: dict[str, float] = {}
    kv: dict[str, float] = {}
    for name, tensor in shard.tensors.items():
        module, _, leaf = name.rpartition(".")
        if leaf == STATS_LEAF:
            inputs[module] = _maximum(file, tensor, source)
        elif leaf in KV_LEAVES:
            kv[name] = _maximum(file, tensor, source)
    if not inputs and not kv:
        raise PlanError(f"{file}: holds no tensor named <module>.{STATS_LEAF}")
    return Stats(inputs, kv)


def _maximum(file: Path, tensor: Tensor, source: LocalSource) -> float:
    if tensor.dtype not in FLOATS:
        floats = ", ".join(sorted(FLOATS))
        raise PlanError(
            f"{file}: {tensor.name} is {tensor.dtype}; an input maximum is one of {floats}"
        )
    value = source.read(tensor.file, tensor.offset, tensor.nbytes).view(NUMPY_DTYPES[tensor.dtype])
    amax = float(value.astype(np.float32).max(initial=0.0))
    if not math.isfinite(amax) or amax / 2688.0 < np.finfo(np.float32).tiny:
        raise PlanError(
            f"{file}: {tensor.name} is {amax}; an input maximum is a finite number above zero"
        )
    return amax


def _write(
    plan: Plan,
    out: Path,
    overwrite: bool,
    workers: int | None,
    shard_bytes: int | None,
    progress: Progress | None,
    prove: Callable[[Path], dict[str, Any]] | None = None,
    sides: Checkpoint | None = None,
) -> Manifest:
    kept = plan.kept
    kv_cache = _declares_kv(plan)
    todo = stream.tasks(plan, shard_bytes or stream.SHARD_BYTES)
    with stream.working(out, stream.fingerprint(plan, todo), overwrite=overwrite) as folder:
        written = stream.write(
            plan,
            todo,
            folder,
            workers=workers or min(4, os.cpu_count() or 1),
            progress=progress or (lambda _n: None),
        )
        made = sum(m.linears for m in written.made.values())
        planned = sum(plan.formats().values())
        if made != planned:
            raise EncodeError(f"{made:,} of {planned:,} planned linears were quantized")
        emit.write_index(folder, written.digests)
        names = [*emit.write_configs(folder, kept.config or {}, kv_cache=kv_cache), INDEX]
        origins = [plan.source, kept] if plan.kind == "repair" else [kept, plan.source]
        names += emit.copy_side_files(folder, [*origins, *([sides] if sides is not None else [])])
        manifest = _manifest(plan, out, folder, written, names)
        if prove is not None:
            manifest.notes.update(prove(folder))
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        stream.finish(folder, out, overwrite=overwrite)
    return manifest


def _declares_kv(plan: Plan) -> bool:
    """Return whether the result declares an FP8 KV cache: asked for, or as the kept checkpoint
    does.

    Raises:
        PlanError: the kept checkpoint declares another one, which would be lost.
    """
    described = plan.source if plan.kind == "repair" else plan.kept
    declared = read_declarations(described).effective
    kv = declared.kv if declared is not None and declared.known else None
    if plan.options.get("kv_cache") is not None:
        return True
    if kv is not None and kv.upper() != "FP8":
        raise PlanError(
            f"{described.uri}: declares a KV cache in {kv}; only FP8 is written: --kv fp8_cast"
        )
    return kv is not None


def _manifest(
    plan: Plan, out: Path, folder: Path, written: stream.Written, sides: list[str]
) -> Manifest:
    result = unstacked(open_checkpoint(folder))
    shown = [m.inferred_format for m in gather(result.tensors.values()).values() if m.quantized]
    formats = {f.algo: sum(1 for s in shown if s is f) for f in shown if f is not None}
    files = {
        n: File(bytes=size, sha256=found) for n, (found, size) in sorted(written.digests.items())
    }
    for name in sides:
        files[name] = digest(folder / name)
    planned, stacked = plan.formats(), plan.stacked()
    roles: list[tuple[Literal["source", "onto", "experts", "base"], Checkpoint]] = [
        ("experts" if plan.kind == "merge" else "source", plan.source)
    ]
    if plan.onto is not None:
        roles.append(("base" if plan.kind == "repair" else "onto", plan.onto))
    return Manifest(
        kind=plan.kind,
        name=out.name,
        made_by={"tool": "ckptgate", "version": __version__, "python": sys.version.split()[0]},
        sources=[
            SourceRecord(
                role=r,
                uri=c.uri,
                tensors=sum(len(s.tensors) for s in c.shards),
                header_sha256=header_digest(c),
            )
            for r, c in roles
        ],
        options=plan.options,
        formats=formats,
        tensors=len(plan.specs),
        bytes=result.nbytes,
        files=files,
        notes={
            "quantized_here": dict(plan.formats()),
            "scale_range": {
                a: [f"{m.low:.2e}", f"{m.high:.2e}"] for a, m in sorted(written.made.items())
            },
            "linears": {
                a: [m.linears, planned[a], stacked[a]] for a, m in sorted(written.made.items())
            },
            "requantized": {f"{a} to {b}": n for (a, b), n in sorted(plan.requantized().items())},
            "mxfp4_blocks": {
                a: [m.blocks - m.lost, m.blocks]
                for a, m in sorted(written.made.items())
                if m.blocks
            },
            "resumed_shards": written.resumed,
        },
    )
