# SPDX-License-Identifier: Apache-2.0
"""Export and merge as functions: open, plan, write, emit; each returns the manifest it wrote."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np

from exporter import emit, stream
from exporter.plan import Plan, Rest, Stats, build, header_digest, parse_layers
from exporter.plan import merge as plan_merge
from exporter.recipes import KvName, Recipe
from exporter.recipes import load as load_recipe
from verifier import __version__
from verifier.checkpoint import INDEX, NUMPY_DTYPES, Checkpoint, Tensor, open_checkpoint
from verifier.checkpoint.header import read_shard
from verifier.checkpoint.source import LocalSource
from verifier.errors import EncodeError, PlanError, UsageError
from verifier.manifest import MANIFEST, File, Manifest, Source, digest
from verifier.schemes import FLOATS, gather, read_declarations

PathLike = str | os.PathLike[str]
Progress = Callable[[int], None]
STATS_LEAF = "input_amax"
KV_LEAVES = ("k_amax", "v_amax")


def plan_export(
    source: PathLike,
    *,
    recipe: str | Path | Recipe,
    onto: PathLike | None = None,
    layers: str | None = None,
    input_scale: Literal["one", "stats"] | None = None,
    stats: PathLike | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
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
    opened, target = open_checkpoint(source), open_checkpoint(onto) if onto is not None else None
    values = read_stats(stats) if stats is not None else None
    how: Literal["one", "stats"] | None = "stats" if stats is not None else input_scale
    if how is None and onto is not None:
        how = "one"
    return build(
        opened, found, onto=target, layers=chosen, input_scale=how, stats=values, rest=rest, kv_cache=kv_cache
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
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize a checkpoint from folder to folder and return the manifest that was written.

    Args:
        source: folder of a checkpoint in hub layout; modules of it that are quantized are decoded first.
        out: folder to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        onto: the checkpoint whose bytes everything that is not selected keeps (a mixed export).
        layers: ``3-59`` or ``3,5``: quantize in these layers only.
        input_scale: ``one`` writes 1.0 for every activation scale (the default with ``onto``).
        stats: a safetensors file of input maxima, ``<hub module>.input_amax``, and of KV maxima.
        rest: quantized modules that the recipe leaves: ``keep`` their bytes or write them as ``bf16``; by default their
            bytes are kept where engines read that format beside the recipe's.
        kv_cache: ``fp8`` (a scale for each layer, from ``stats``) or ``fp8_cast`` (none), instead of the recipe's.
        overwrite: swap an existing checkpoint at ``out`` whole.
        workers: shards written at a time; by default the number of processors, at most 4.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: options that contradict, an unknown recipe, ``out`` in use or existing.
        PlanError, EncodeError: what the checkpoints do not allow, or a weight that cannot be encoded.
        OSError: the disk.
    """
    target = Path(out)
    stream.check_out(target, overwrite=overwrite, inputs=_inputs(source, onto))
    plan = plan_export(
        source, recipe=recipe, onto=onto, layers=layers, input_scale=input_scale, stats=stats, rest=rest, kv_cache=kv_cache
    )
    return _write(plan, target, overwrite, workers, shard_bytes, progress)


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
    """Move routed experts that another tool quantized onto a checkpoint of another format; no byte is re-quantized.

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
        raise PlanError(f"{file}: {tensor.name} is {tensor.dtype}; an input maximum is one of {floats}")
    value = source.read(tensor.file, tensor.offset, tensor.nbytes).view(NUMPY_DTYPES[tensor.dtype])
    amax = float(value.astype(np.float32).max(initial=0.0))
    if not math.isfinite(amax) or amax / 2688.0 < np.finfo(np.float32).tiny:
        raise PlanError(f"{file}: {tensor.name} is {amax}; an input maximum is a finite number above zero")
    return amax


def _write(
    plan: Plan, out: Path, overwrite: bool, workers: int | None, shard_bytes: int | None, progress: Progress | None
) -> Manifest:
    kept = plan.kept
    kv_cache = _declares_kv(plan)
    todo = stream.tasks(plan, shard_bytes or stream.SHARD_BYTES)
    with stream.working(out, stream.fingerprint(plan, todo), overwrite=overwrite) as folder:
        written = stream.write(
            plan, todo, folder, workers=workers or min(4, os.cpu_count() or 1), progress=progress or (lambda _n: None)
        )
        made = sum(m.linears for m in written.made.values())
        planned = sum(plan.formats().values())
        if made != planned:
            raise EncodeError(f"{made:,} of {planned:,} planned linears were quantized")
        emit.write_index(folder, written.digests)
        sides = [*emit.write_configs(folder, kept.config or {}, kv_cache=kv_cache), INDEX]
        sides += emit.copy_side_files(folder, [kept, plan.source])
        manifest = _manifest(plan, out, folder, written, sides)
        (folder / MANIFEST).write_text(manifest.model_dump_json(indent=2) + "\n")
        stream.finish(folder, out, overwrite=overwrite)
    return manifest


def _declares_kv(plan: Plan) -> bool:
    """Return whether the result declares an FP8 KV cache: asked for, or as the kept checkpoint does.

    Raises:
        PlanError: the kept checkpoint declares another one, which would be lost.
    """
    declared = read_declarations(plan.kept).effective
    kv = declared.kv if declared is not None and declared.known else None
    if plan.options.get("kv_cache") is not None:
        return True
    if kv is not None and kv.upper() != "FP8":
        raise PlanError(f"{plan.kept.uri}: declares a KV cache in {kv}; only FP8 is written: --kv fp8_cast")
    return kv is not None


def _manifest(plan: Plan, out: Path, folder: Path, written: stream.Written, sides: list[str]) -> Manifest:
    result = open_checkpoint(folder)
    shown = [m.shown for m in gather(result.tensors.values()).values() if m.quantized]
    formats = {f.algo: sum(1 for s in shown if s is f) for f in shown if f is not None}
    files = {n: File(bytes=size, sha256=found) for n, (found, size) in sorted(written.digests.items())}
    for name in sides:
        files[name] = digest(folder / name)
    planned, stacked = plan.formats(), plan.stacked()
    roles: list[tuple[Literal["source", "onto", "experts"], Checkpoint]] = [
        ("experts" if plan.kind == "merge" else "source", plan.source)
    ]
    if plan.onto is not None:
        roles.append(("onto", plan.onto))
    return Manifest(
        kind=plan.kind, name=out.name,
        made_by={"tool": "ckptgate", "version": __version__, "python": sys.version.split()[0]},
        sources=[Source(role=r, uri=c.uri, tensors=len(c.tensors), header_sha256=header_digest(c)) for r, c in roles],
        options=plan.options, formats=formats, tensors=len(result.tensors), bytes=result.nbytes, files=files,
        notes={
            "quantized_here": dict(plan.formats()),
            "scale_range": {a: [f"{m.low:.2e}", f"{m.high:.2e}"] for a, m in sorted(written.made.items())},
            "linears": {a: [m.linears, planned[a], stacked[a]] for a, m in sorted(written.made.items())},
            "requantized": {f"{a} to {b}": n for (a, b), n in sorted(plan.requantized().items())},
            "mxfp4_blocks": {a: [m.blocks - m.lost, m.blocks] for a, m in sorted(written.made.items()) if m.blocks},
            "resumed_shards": written.resumed,
        },
    )  # fmt: skip
