# SPDX-License-Identifier: Apache-2.0
"""Export and merge as functions: open, plan, write; each returns the manifest that it wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from exporter.layout import ExpertLayout, unstacked
from exporter.plan import (
    DEFAULT_ENGINES,
    ExportChoices,
    Plan,
    Rest,
    build,
    parse_layers,
    read_stats,
)
from exporter.plan import merge as plan_merge
from exporter.plan.repair import logical
from exporter.recipes import KvName, Recipe
from exporter.recipes import load as load_recipe
from exporter.writing import PathLike, Progress, WriteOptions, prepare_out, write_plan
from verifier.checkpoint import Checkpoint, open_checkpoint
from verifier.errors import UsageError
from verifier.manifest import Manifest
from verifier.schemes import Engine

InputScale = Literal["one", "stats"]
EngineChoice = Literal["vllm", "sglang", "trtllm", "none"]


def plan_export(
    source: PathLike | Checkpoint,
    *,
    recipe: str | Path | Recipe,
    onto: PathLike | None = None,
    layers: str | None = None,
    input_scale: InputScale | None = None,
    stats: PathLike | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
    engine: EngineChoice | None = None,
) -> Plan:
    """Return the plan of an export without writing anything; the arguments are those of `export`.

    Raises:
        UsageError: options that contradict, an unknown recipe, a missing directory.
        PlanError: what the checkpoints do not allow.
    """
    if stats is not None and input_scale == "one":
        raise UsageError("--input-scale one and --stats contradict; pass one of them")
    if input_scale == "stats" and stats is None:
        raise UsageError("--input-scale stats needs --stats FILE")
    if stats is not None:
        input_scale = "stats"
    elif input_scale is None and onto is not None:
        input_scale = "one"
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    numbers = parse_layers(layers) if layers is not None else None
    checkpoint = unstacked(source if isinstance(source, Checkpoint) else open_checkpoint(source))
    target = unstacked(open_checkpoint(onto)) if onto is not None else None
    choices = ExportChoices(
        layers=numbers,
        input_scale=input_scale,
        stats=read_stats(stats) if stats is not None else None,
        rest=rest,
        kv_cache=kv_cache,
        expert_layout=expert_layout,
        engines=_engines(engine),
    )
    return build(checkpoint, loaded, onto=target, choices=choices)


def _engines(choice: EngineChoice | None) -> tuple[Engine, ...]:
    """Return the engines that have to load an export."""
    if choice is None:
        return DEFAULT_ENGINES
    return () if choice == "none" else (choice,)


def export(
    source: PathLike,
    out: PathLike,
    *,
    recipe: str | Path | Recipe,
    onto: PathLike | None = None,
    layers: str | None = None,
    input_scale: InputScale | None = None,
    stats: PathLike | None = None,
    rest: Rest | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
    engine: EngineChoice | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Quantize a checkpoint, file to file, and return the manifest that was written.

    Args:
        source: directory of a checkpoint in hub layout; quantized modules of it are decoded first.
        out: directory to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        onto: the checkpoint whose bytes everything that is not selected keeps (a mixed export).
        layers: ``3-59`` or ``3,5``: quantize in these layers only.
        input_scale: ``one`` writes 1.0 for every activation scale (the default with ``onto``).
        stats: a safetensors file of input maxima, ``<hub module>.input_amax``, and of KV maxima.
        rest: quantized modules that the recipe does not select: ``keep`` their bytes or write them
            as ``bf16``; by default their bytes are kept where engines read that format together
            with the recipe's.
        kv_cache: ``fp8`` (one scale per layer, from ``stats``) or ``fp8_cast`` (none), instead of
            the recipe's.
        expert_layout: of a source that holds experts in stacks: write them ``per-expert`` or as the
            ``hub`` has them; by default what engines read of its family (docs/expert-layouts.md).
        engine: the engine that has to load the result; ``none`` writes what the recipe says, even
            if no engine loads it. By default both vLLM and SGLang have to.
        overwrite: replace an existing checkpoint at ``out``.
        workers: threads that encode and copy; by default the number of processors, at most 4.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.
        notes: added to the manifest's notes.

    Raises:
        UsageError: options that contradict, an unknown recipe, ``out`` in use or existing.
        PlanError, EncodeError: what the checkpoints do not allow, or a weight that cannot be
            encoded.
        OSError: the disk.
    """
    options = WriteOptions(overwrite, workers, shard_bytes, progress, notes or {})
    target = prepare_out(out, options, source, onto)
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
        engine=engine,
    )
    return write_plan(plan, target, options)


def export_model(
    model: Any,
    out: PathLike,
    *,
    recipe: str | Path | Recipe,
    source: PathLike | None = None,
    layers: str | None = None,
    input_scale: InputScale | None = None,
    stats: PathLike | None = None,
    kv_cache: KvName | None = None,
    expert_layout: ExpertLayout | None = None,
    engine: EngineChoice | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    shard_bytes: int | None = None,
    progress: Progress | None = None,
) -> Manifest:
    """Quantize a transformers model in memory, with the plan, codecs and writer of `export`.

    Args:
        model: unquantized, its parameters on the CPU or on devices of this process; it is not
            changed.
        out: directory to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        source: the checkpoint that it was loaded from: its index decides the hub layout, and it
            provides auxiliary files and tensors that the model has no place for, or holds in a
            narrower dtype but unchanged. Without it, names and config are those that
            `save_pretrained` would write.
        layers: quantize in these layers only.
        input_scale: ``one`` writes 1.0 for every activation scale.
        stats: a safetensors file of input maxima by hub module.
        kv_cache: ``fp8`` or ``fp8_cast``, instead of the recipe's.
        expert_layout: as for `export`.
        engine: as for `export`.
        overwrite: replace an existing checkpoint at ``out``.
        workers: threads that encode and copy.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.

    Raises:
        UsageError: options that contradict, an unknown recipe, ``out`` in use or existing.
        UnsupportedConversion: a tensor that cannot be brought to hub layout; names in memory are
            never written.
        PlanError, EncodeError: what the model does not allow, or a weight that cannot be encoded.
    """
    # transformers is an optional extra.
    from exporter.layout.memory import as_checkpoint  # noqa: PLC0415

    options = WriteOptions(overwrite, workers, shard_bytes, progress)
    target = prepare_out(out, options, source)
    origin = open_checkpoint(source) if source is not None else None
    names = logical(origin) if origin is not None else None
    plan = plan_export(
        as_checkpoint(model, origin, names),
        recipe=recipe,
        layers=layers,
        input_scale=input_scale,
        stats=stats,
        kv_cache=kv_cache,
        expert_layout=expert_layout,
        engine=engine,
    )
    return write_plan(plan, target, options, auxiliary=origin)


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
    notes: Mapping[str, Any] | None = None,
) -> Manifest:
    """Move routed experts that another tool quantized onto a checkpoint in a different format; no
    byte is re-quantized.

    Args:
        experts: directory whose quantized routed experts are taken.
        out: directory to make.
        onto: directory of the checkpoint that everything else is kept from.
        input_scale: ``keep`` the experts' activation scales, or write ``one``.
        overwrite: replace an existing checkpoint at ``out``.
        workers: threads that encode and copy.
        shard_bytes: the size at which a new shard begins, in bytes.
        progress: called with the bytes of each finished step.
        notes: added to the manifest's notes.

    Raises:
        UsageError: a missing directory, ``out`` in use or existing.
        PlanError: what the checkpoints do not allow.
    """
    options = WriteOptions(overwrite, workers, shard_bytes, progress, notes or {})
    target = prepare_out(out, options, experts, onto)
    return write_plan(plan_merge_of(experts, onto, input_scale), target, options)


def plan_merge_of(
    experts: PathLike, onto: PathLike, input_scale: Literal["keep", "one"] = "keep"
) -> Plan:
    """Return the plan of a merge without writing anything; arguments and errors are those of
    `merge`.
    """
    return plan_merge(open_checkpoint(experts), open_checkpoint(onto), input_scale=input_scale)
