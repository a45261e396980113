# SPDX-License-Identifier: Apache-2.0
"""Calibrate: choose sequences, run the source's model over them, check the statistics, write the
stats file.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch

from exporter.calibration.attention import KvState, ReadingCache
from exporter.calibration.extra import VERSIONS
from exporter.calibration.hooks import observing
from exporter.calibration.model import load_source, tokenizer_of
from exporter.calibration.names import kv_targets, refuse_outside, targets, with_experts
from exporter.calibration.report import CalibrationReport, TextUse
from exporter.calibration.sites import Site, collect
from exporter.calibration.stats import (
    OnProblem,
    Statistics,
    apply_fallbacks,
    experts_with,
    layers_of,
    require_called,
    write,
)
from exporter.calibration.texts import Ids, TextFile, batches, choose, read_texts
from exporter.layout import unstacked
from exporter.plan import ExportChoices, build, header_digest
from exporter.recipes import Recipe
from exporter.recipes import load as load_recipe
from verifier import __version__
from verifier.checkpoint import Checkpoint, local_directory, open_checkpoint
from verifier.errors import MachineError, PlanError, UsageError
from verifier.text import counted

PathLike = str | os.PathLike[str]
Method = Literal["max", "percentile"]
Progress = Callable[[int, int], None]
MIN_TOKENS = 32


@dataclass(frozen=True)
class CalibrationOptions:
    """The numbers and choices of a calibration."""

    samples: tuple[int, ...]
    seq_len: int
    batch_size: int
    seed: int
    device: str
    method: Method
    percentile: float
    on_bad_stat: OnProblem
    on_dead_expert: OnProblem
    min_tokens: int

    @property
    def described_method(self) -> str:
        """The method as the report and the stats file state it."""
        return "max" if self.method == "max" else f"percentile {self.percentile:g}"

    def check(self, texts: int) -> None:
        """Refuse options that contradict or are out of range.

        Raises:
            UsageError: naming the option.
        """
        if texts != len(self.samples) or not texts:
            raise UsageError(
                f"{texts} --texts and {counted(len(self.samples), 'number')} in --samples: "
                "pass one number per file"
            )
        if min(self.samples) < 1 or self.seq_len < 2 or self.batch_size < 1 or self.min_tokens < 0:
            raise UsageError(
                "--samples and --batch-size must be at least 1, --seq-len at least 2, --min-tokens "
                "at least 0"
            )
        if self.method not in ("max", "percentile"):
            raise UsageError(f"--method {self.method}: use max or percentile")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"--percentile {self.percentile:g}: must be above 0 and at most 100")
        for name, value in (
            ("--on-bad-stat", self.on_bad_stat),
            ("--on-dead-expert", self.on_dead_expert),
        ):
            if value not in ("fallback", "error"):
                raise UsageError(f"{name} {value}: use fallback or error")


def calibrate(
    source: PathLike,
    out: PathLike,
    *,
    recipe: str | Path | Recipe,
    texts: Sequence[PathLike],
    samples: Sequence[int],
    seq_len: int = 2048,
    batch_size: int = 1,
    seed: int = 0,
    device: str = "cpu",
    method: Method = "max",
    percentile: float = 99.9,
    on_bad_stat: OnProblem = "error",
    on_dead_expert: OnProblem = "fallback",
    min_tokens: int = MIN_TOKENS,
    kv: bool = False,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Run texts through the source's model and write each module's largest input to a stats file,
    by hub name.

    Only modules that the recipe quantizes with static activation scales are observed, and KV-cache
    inputs: keys after rotary embedding, and values.

    Args:
        source: a checkpoint in hub layout; a remote one is downloaded, a quantized one decoded.
        out: the stats file (safetensors) to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        texts: files of documents: ``.jsonl`` with ``text`` or ``ids``, else UTF-8 text with blank
            lines between documents.
        samples: sequences to take from each file.
        seq_len: tokens per sequence; nothing is padded.
        batch_size: sequences at a time.
        seed: decides which documents are taken.
        device: ``cpu``, ``cuda``, or ``auto`` (every GPU of the machine).
        method: ``max``, or ``percentile`` of the magnitudes of all inputs of a module.
        percentile: above 0, at most 100.
        on_bad_stat: ``error``, or replace values that give no normal float32 scale.
        on_dead_expert: replace the maximum of an expert without tokens, or ``error``.
        min_tokens: experts with fewer tokens are reported.
        kv: measure KV maxima also for a recipe without static activation scales.
        overwrite: replace an existing file.
        progress: called with (done, total) sequences.

    Raises:
        UsageError: options, a missing file, an unknown recipe, ``out`` existing.
        PlanError: what the checkpoint, the model or the texts do not allow.
        MachineError: the GPU is out of memory, or the disk fails.
    """
    options = CalibrationOptions(
        tuple(samples),
        seq_len,
        batch_size,
        seed,
        device,
        method,
        percentile,
        on_bad_stat,
        on_dead_expert,
        min_tokens,
    )
    options.check(len(texts))
    source = local_directory(source)
    target = _check_paths(source, out, overwrite)
    files = [read_texts(p) for p in texts]
    loaded = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    checkpoint = open_checkpoint(source)
    modules = static_modules(checkpoint, loaded, kv=kv)
    sequences = _choose(checkpoint, files, options)
    try:
        measured = _measure(checkpoint, modules, list(chain(*sequences)), options, progress)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU is out of memory: use a smaller --batch-size or --seq-len, or --device auto"
        ) from error
    statistics = apply_fallbacks(measured, on_bad=on_bad_stat, on_dead=on_dead_expert)
    uses = tuple(
        TextUse(file.path, file.sha256, asked, len(part), sum(map(len, part)))
        for file, asked, part in zip(files, options.samples, sequences, strict=True)
    )
    report = _report(checkpoint, target, loaded, options, uses, statistics)
    write(target, statistics, _metadata(checkpoint, loaded, options, report))
    return report


def static_modules(checkpoint: Checkpoint, recipe: Recipe, *, kv: bool = False) -> tuple[str, ...]:
    """Return the hub modules that a recipe quantizes with static activation scales.

    Raises:
        PlanError: a family outside the experts interface, or no plan can be made; there is no such
            module, and no KV scale either.
    """
    refuse_outside(checkpoint)
    # Whatever the engine: what one of them leaves unquantized, another may read.
    choices = ExportChoices(
        input_scale="one", kv_cache="fp8_cast", expert_layout="per-expert", engines=()
    )
    plan = build(unstacked(checkpoint), recipe, choices=choices)
    modules = tuple(m for e in plan.encodes if e.input_scales is not None for m in e.modules)
    if not modules and not kv and recipe.kv_cache != "fp8":
        formats = ", ".join(sorted(plan.formats()))
        raise PlanError(
            f"recipe {recipe.name} gives no module a static activation scale ({formats}): nothing "
            "to calibrate"
        )
    return modules


def _check_paths(source: PathLike, out: PathLike, overwrite: bool) -> Path:
    """Return the path of the stats file.

    Raises:
        UsageError: it cannot be written.
    """
    target = Path(out)
    if not target.parent.is_dir():
        raise UsageError(f"{target}: its directory does not exist")
    if target.parent.resolve() == Path(source).resolve():
        raise UsageError(
            f"{target}: in the source's directory it would be taken for one of its shards"
        )
    if target.is_dir():
        raise UsageError(f"{target}: is a directory; pass a file")
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target}: already exists; use --overwrite to replace it")
    return target


def _choose(
    checkpoint: Checkpoint, files: Sequence[TextFile], options: CalibrationOptions
) -> list[list[Ids]]:
    """Return the sequences of each file.

    Raises:
        PlanError: a file that gives none; texts without a tokenizer.
    """
    encode = tokenizer_of(checkpoint) if any(f.needs_tokenizer for f in files) else None
    sequences = []
    for i, (file, count) in enumerate(zip(files, options.samples, strict=True)):
        part = choose(file, count, options.seq_len, f"{options.seed}/{i}", encode)
        if not part:
            raise PlanError(f"{file.path}: gives no sequence of at least two tokens")
        sequences.append(part)
    return sequences


def _measure(
    checkpoint: Checkpoint,
    modules: Sequence[str],
    sequences: Sequence[Ids],
    options: CalibrationOptions,
    progress: Progress | None,
) -> Statistics:
    """Return the input statistics of modules when the model runs over the sequences."""
    model, source_keys = load_source(checkpoint, options.device)
    keys = with_experts(source_keys, checkpoint)
    _check_ids(model, checkpoint, sequences, options.seq_len)
    inputs, kv = targets(model, keys, modules), kv_targets(model, keys)
    percentile = options.percentile if options.method == "percentile" else None
    with observing(model, inputs, set(kv.values()), percentile=percentile) as readers:
        head = model.get_output_embeddings()
        observe_head = any(model.get_submodule(target.path) is head for target in inputs)
        _run(model, sequences, options, readers.cache, progress, every_logit=observe_head)
    by_site = collect(dict.fromkeys([*readers.inputs.values(), *readers.cache.values()]))
    measured = Statistics()
    for target, site in readers.inputs.items():
        measured.amax[target.hub] = by_site[site].amax[target.slot]
        measured.tokens[target.hub] = by_site[site].tokens[target.slot]
    for name, state in kv.items():
        site = readers.cache[state]
        if site.called:
            measured.kv[name] = by_site[site].amax[0]
    uncalled = [target.hub for target, site in readers.inputs.items() if not site.called]
    require_called(uncalled, measured.tokens)
    return measured


def _check_ids(model: Any, checkpoint: Checkpoint, sequences: Sequence[Ids], length: int) -> None:
    """Check that the model has the ids and positions of the sequences.

    Raises:
        PlanError: it has not.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max(max(s) for s in sequences)
    if highest >= vocabulary:
        raise PlanError(
            f"{checkpoint.uri}: the texts have the token id {highest}, and the vocabulary has "
            f"{vocabulary} entries"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and max(map(len, sequences)) > positions:
        raise PlanError(
            f"{checkpoint.uri}: --seq-len {length} is more than the model's {positions} positions"
        )


def _run(
    model: Any,
    sequences: Sequence[Ids],
    options: CalibrationOptions,
    kv: Mapping[KvState, Site],
    progress: Progress | None,
    *,
    every_logit: bool,
) -> None:
    """Run the model over the sequences.

    ``every_logit`` has the output head compute every position: logits of all positions are the
    largest tensor, and only a calibrated head needs them.
    """
    arguments: dict[str, Any] = {"use_cache": bool(kv)}
    if not every_logit and "logits_to_keep" in inspect.signature(model.forward).parameters:
        arguments["logits_to_keep"] = 1
    done = 0
    with torch.inference_mode():
        for batch in batches(sequences, options.batch_size):
            if kv:
                arguments["past_key_values"] = ReadingCache(model.config, kv)
            ids = torch.tensor(batch, dtype=torch.long, device=model.device)
            model(input_ids=ids, **arguments)
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))


def _report(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    options: CalibrationOptions,
    uses: tuple[TextUse, ...],
    statistics: Statistics,
) -> CalibrationReport:
    ordered = sorted((statistics.amax or statistics.kv).items(), key=lambda item: item[1])
    dead = experts_with(statistics.tokens, lambda count: count == 0)
    return CalibrationReport(
        source=checkpoint.uri,
        out=str(out),
        recipe=recipe.name,
        method=options.described_method,
        modules=len(statistics.amax),
        kv=len(statistics.kv),
        texts=uses,
        layers=layers_of(statistics.tokens),
        dead=tuple(name for name, _ in dead),
        few=experts_with(statistics.tokens, lambda count: 0 < count < options.min_tokens),
        min_tokens=options.min_tokens,
        fallbacks=tuple(statistics.fallbacks),
        smallest=ordered[0],
        largest=ordered[-1],
    )


def _metadata(
    checkpoint: Checkpoint, recipe: Recipe, options: CalibrationOptions, report: CalibrationReport
) -> dict[str, str]:
    """Return the file's metadata: strings, lists as JSON."""
    dead: dict[str, list[int]] = {}
    for layer in report.layers:
        for expert, tokens in zip(layer.experts, layer.tokens, strict=True):
            if not tokens:
                dead.setdefault(layer.container, []).append(expert)
    fallbacks = [[f.name, f.condition, f.value, f.taken_from] for f in report.fallbacks]
    return {
        "format": "pt",
        "kind": "ckptgate activation statistics",
        "tool": "ckptgate",
        "version": __version__,
        **VERSIONS,
        "source_header_sha256": header_digest(checkpoint),
        "recipe": recipe.name,
        "method": report.method,
        "texts": json.dumps([_text_entry(use) for use in report.texts]),
        "tokens": str(report.tokens),
        "samples": json.dumps([use.samples for use in report.texts]),
        "seq_len": str(options.seq_len),
        "seed": str(options.seed),
        "batch_size": str(options.batch_size),
        "dead_experts": json.dumps(dead),
        "few_tokens": json.dumps(dict(report.few)),
        "min_tokens": str(options.min_tokens),
        "fallbacks": json.dumps(fallbacks),
    }


def _text_entry(use: TextUse) -> dict[str, object]:
    return {
        "file": Path(use.path).name,
        "sha256": use.sha256,
        "asked": use.asked,
        "samples": use.samples,
        "tokens": use.tokens,
    }
