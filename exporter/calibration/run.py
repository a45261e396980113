# SPDX-License-Identifier: Apache-2.0
"""Calibrate: choose sequences, run the source's model over them, judge what was seen, write the
stats file.
"""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from exporter.calibration.attention import KvSpot, ReadingCache
from exporter.calibration.extra import VERSIONS
from exporter.calibration.hooks import observing
from exporter.calibration.model import load_source, tokenizer_of
from exporter.calibration.names import kv_targets, refuse_outside, targets, with_experts
from exporter.calibration.report import CalibrationReport, TextUse
from exporter.calibration.sites import Site, collect
from exporter.calibration.stats import (
    OnProblem,
    Statistics,
    experts_with,
    layers_of,
    require_seen,
    settle,
    write,
)
from exporter.calibration.texts import Ids, TextFile, batches, choose, read_texts
from exporter.layout import unstacked
from exporter.plan import build, header_digest
from exporter.recipes import Recipe
from exporter.recipes import load as load_recipe
from verifier import __version__
from verifier.checkpoint import Checkpoint, local_directory, open_checkpoint
from verifier.errors import MachineError, PlanError, UsageError

PathLike = str | os.PathLike[str]
Method = Literal["max", "percentile"]
MIN_TOKENS = 32


@dataclass(frozen=True)
class Options:
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

    def check(self, texts: int) -> None:
        """Refuse options that contradict or are out of range.

        Raises:
            UsageError: naming the option.
        """
        if texts != len(self.samples) or not texts:
            raise UsageError(
                f"{texts} --texts and {len(self.samples)} numbers in --samples: give one number for each file"
            )
        if min(self.samples) < 1 or self.seq_len < 2 or self.batch_size < 1 or self.min_tokens < 0:
            raise UsageError(
                "samples and batch size are at least 1, --seq-len at least 2, --min-tokens at least 0"
            )
        if self.method not in ("max", "percentile"):
            raise UsageError(f"no method {self.method!r}; max or percentile")
        if not 0 < self.percentile <= 100:
            raise UsageError(f"--percentile {self.percentile:g}: above 0, at most 100")
        for name, value in (
            ("--on-bad-stat", self.on_bad_stat),
            ("--on-dead-expert", self.on_dead_expert),
        ):
            if value not in ("fallback", "error"):
                raise UsageError(f"{name} {value}: fallback or error")


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
    progress: Callable[[int, int], None] | None = None,
) -> CalibrationReport:
    """Run texts through the source's model and write each module's largest input to a stats file,
    by hub name.

    Read are exactly the modules that the recipe quantizes with static activation scales, and what
    goes into the KV cache: keys after rotary embedding, and values.

    Args:
        source: local folder of a checkpoint in hub layout; a quantized one is decoded.
        out: the stats file (safetensors) to make; its parent must exist.
        recipe: a recipe's name, a YAML file, or a `Recipe`.
        texts: files of documents: ``.jsonl`` with ``text`` or ``ids``, else UTF-8 text with blank
            lines between documents.
        samples: sequences to take from each file.
        seq_len: tokens in a sequence; nothing is padded.
        batch_size: sequences at a time.
        seed: decides which documents are taken.
        device: ``cpu``, ``cuda``, or ``auto`` (every GPU there is).
        method: ``max``, or ``percentile`` of the magnitudes of all values that a module sees.
        percentile: above 0, at most 100.
        on_bad_stat: ``error``, or replace values that give no normal float32 scale.
        on_dead_expert: replace the maximum of an expert without tokens, or ``error``.
        min_tokens: experts with fewer tokens are reported.
        kv: KV maxima are wanted, also by a recipe without static activations.
        overwrite: replace an existing file.
        progress: called with (done, total) sequences.

    Raises:
        UsageError: options, a missing file, an unknown recipe, ``out`` existing.
        PlanError: what the checkpoint, the model or the texts do not allow.
        MachineError: the GPU's memory is full.
    """
    options = Options(
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
    found = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    checkpoint = open_checkpoint(source)
    wanted = static_modules(checkpoint, found, kv=kv)
    chosen = _choose(checkpoint, files, options)
    try:
        seen = _read(checkpoint, wanted, [s for part in chosen for s in part], options, progress)
    except torch.OutOfMemoryError as error:
        raise MachineError(
            "the GPU's memory is full; a smaller --batch-size or --seq-len, or --device auto"
        ) from error
    settled = settle(seen.amax, seen.tokens, seen.kv, on_bad=on_bad_stat, on_dead=on_dead_expert)
    uses = tuple(
        TextUse(f.path, f.sha256, asked, len(part), sum(map(len, part)))
        for f, asked, part in zip(files, options.samples, chosen, strict=True)
    )
    report = _report(checkpoint, target, found, options, uses, settled)
    write(target, settled, _metadata(checkpoint, found, options, report))
    return report


def static_modules(checkpoint: Checkpoint, recipe: Recipe, *, kv: bool = False) -> tuple[str, ...]:
    """Return the hub modules that a recipe quantizes with static activation scales.

    Raises:
        PlanError: the source is outside the experts interface, or no plan can be made of it; there
            is none, nor KV scales.
    """
    refuse_outside(checkpoint)
    plan = build(
        unstacked(checkpoint),
        recipe,
        input_scale="one",
        kv_cache="fp8_cast",
        expert_layout="per-expert",
    )
    found = tuple(m for e in plan.encodes if e.input_scales is not None for m in e.modules)
    if not found and not kv and recipe.kv_cache != "fp8":
        formats = ", ".join(sorted(plan.formats()))
        raise PlanError(
            f"recipe {recipe.name} gives no module a static activation scale ({formats}): nothing to calibrate"
        )
    return found


def _check_paths(source: PathLike, out: PathLike, overwrite: bool) -> Path:
    target = Path(out)
    if not target.parent.is_dir():
        raise UsageError(f"{target}: its folder does not exist")
    if target.parent.resolve() == Path(source).resolve():
        raise UsageError(f"{target}: beside the source's shards it would be taken for one of them")
    if target.is_dir():
        raise UsageError(f"{target}: is a folder")
    if os.path.lexists(target) and not overwrite:
        raise UsageError(f"{target}: exists; --overwrite replaces it")
    return target


def _choose(checkpoint: Checkpoint, files: Sequence[TextFile], options: Options) -> list[list[Ids]]:
    """Return the sequences of each file."""
    encode = tokenizer_of(checkpoint) if any(f.needs_tokenizer for f in files) else None
    found = []
    for i, (file, count) in enumerate(zip(files, options.samples, strict=True)):
        part = choose(file, count, options.seq_len, f"{options.seed}/{i}", encode)
        if not part:
            raise PlanError(f"{file.path}: gives no sequence of two tokens or more")
        found.append(part)
    return found


def _read(
    checkpoint: Checkpoint,
    wanted: Sequence[str],
    sequences: Sequence[Ids],
    options: Options,
    progress: Callable[[int, int], None] | None,
) -> Statistics:
    """Return what the wanted modules see when the model reads the sequences."""
    model, places = load_source(checkpoint, options.device)
    where = with_experts(places, checkpoint)
    _check_ids(model, checkpoint, sequences, options.seq_len)
    spots, kv = targets(model, where, wanted), kv_targets(model, where)
    percentile = options.percentile if options.method == "percentile" else None
    with observing(model, spots, set(kv.values()), percentile=percentile) as readers:
        head = model.get_output_embeddings()
        every = any(model.get_submodule(s.path) is head for s in spots)
        _forward(model, sequences, options, progress, readers.cache, every=every)
    seen = collect(dict.fromkeys([*readers.inputs.values(), *readers.cache.values()]))
    found = Statistics()
    for spot, site in readers.inputs.items():
        found.amax[spot.hub], found.tokens[spot.hub] = (
            seen[site].amax[spot.slot],
            seen[site].tokens[spot.slot],
        )
    found.kv = {
        n: seen[site].amax[0] for n, spot in kv.items() if (site := readers.cache[spot]).called
    }
    require_seen(
        [spot.hub for spot, site in readers.inputs.items() if not site.called], found.tokens
    )
    return found


def _check_ids(model: Any, checkpoint: Checkpoint, sequences: Sequence[Ids], length: int) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    highest = max(max(s) for s in sequences)
    if highest >= vocabulary:
        raise PlanError(
            f"{checkpoint.uri}: the texts have token id {highest}, the vocabulary {vocabulary} entries"
        )
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(positions, int) and max(map(len, sequences)) > positions:
        raise PlanError(
            f"{checkpoint.uri}: --seq-len {length} is beyond the model's {positions} positions"
        )


def _forward(
    model: Any,
    sequences: Sequence[Ids],
    options: Options,
    progress: Callable[[int, int], None] | None,
    kv: Mapping[KvSpot, Site],
    *,
    every: bool,
) -> None:
    """Run the model over the sequences; ``every`` where the output head must see every position,
    too.
    """
    given: dict[str, Any] = {"use_cache": bool(kv)}
    # Logits of all positions would be the largest tensor of all.
    if not every and "logits_to_keep" in inspect.signature(model.forward).parameters:
        given["logits_to_keep"] = 1
    done = 0
    with torch.inference_mode():
        for batch in batches(sequences, options.batch_size):
            if kv:
                given["past_key_values"] = ReadingCache(model.config, kv)
            model(input_ids=torch.tensor(batch, dtype=torch.long, device=model.device), **given)
            done += len(batch)
            if progress is not None:
                progress(done, len(sequences))


def _report(
    checkpoint: Checkpoint,
    out: Path,
    recipe: Recipe,
    options: Options,
    uses: tuple[TextUse, ...],
    settled: Statistics,
) -> CalibrationReport:
    ordered = sorted((settled.amax or settled.kv).items(), key=lambda item: item[1])
    few = experts_with(settled.tokens, lambda n: 0 < n < options.min_tokens)
    return CalibrationReport(
        source=checkpoint.uri,
        out=str(out),
        recipe=recipe.name,
        method=_method(options),
        modules=len(settled.amax),
        kv=len(settled.kv),
        texts=uses,
        layers=layers_of(settled.tokens),
        dead=tuple(n for n, _ in experts_with(settled.tokens, lambda n: n == 0)),
        few=few,
        min_tokens=options.min_tokens,
        fallbacks=tuple(settled.fallbacks),
        smallest=ordered[0],
        largest=ordered[-1],
    )


def _method(options: Options) -> str:
    return "max" if options.method == "max" else f"percentile {options.percentile:g}"


def _metadata(
    checkpoint: Checkpoint, recipe: Recipe, options: Options, report: CalibrationReport
) -> Mapping[str, str]:
    """Return the file's metadata: strings, lists as JSON."""
    numbers = {
        x.container: [e for e, t in zip(x.experts, x.tokens, strict=True) if not t]
        for x in report.layers
    }
    return {
        "format": "pt",
        "kind": "ckptgate activation statistics",
        "tool": "ckptgate",
        "version": __version__,
        **VERSIONS,
        "source_header_sha256": header_digest(checkpoint),
        "recipe": recipe.name,
        "method": report.method,
        "texts": json.dumps([{"file": Path(u.path).name, **_use(u)} for u in report.texts]),
        "tokens": str(report.tokens),
        "samples": json.dumps([u.samples for u in report.texts]),
        "seq_len": str(options.seq_len),
        "seed": str(options.seed),
        "batch_size": str(options.batch_size),
        "dead_experts": json.dumps({c: n for c, n in numbers.items() if n}),
        "few_tokens": json.dumps(dict(report.few)),
        "min_tokens": str(options.min_tokens),
        "fallbacks": json.dumps(
            [[f.name, f.condition, f.value, f.taken_from] for f in report.fallbacks]
        ),
    }


def _use(use: TextUse) -> dict[str, object]:
    return {"sha256": use.sha256, "asked": use.asked, "samples": use.samples, "tokens": use.tokens}
