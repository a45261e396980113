# SPDX-License-Identifier: Apache-2.0
"""``ckptgate export`` and ``ckptgate merge``; the only place of the exporter that calls
`verifier.check`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.preview import read_prompts, show_preview
from verifier.cli.common import progress_bar
from verifier.errors import UsageError

if TYPE_CHECKING:
    from exporter.plan import Plan
    from verifier.manifest import Manifest

OVERWRITE = click.option("--overwrite", is_flag=True, help="Swap an existing OUT whole.")
WORKERS = click.option(
    "--workers",
    type=click.IntRange(1, 64),
    help="Shards at a time; by default processors, at most 4.",
)
REPORT = click.option(
    "--report",
    "report_file",
    type=click.Path(path_type=Path),
    help="Write summary and check as JSON here.",
)


@click.command()
@click.argument("source")
@click.argument("out")
@click.option("--recipe", required=True, help="A recipe's name, or a YAML file.")
@click.option(
    "--onto",
    metavar="VENDOR",
    help="Keep everything that is not selected from this checkpoint (mixed export).",
)
@click.option("--layers", metavar="3-59", help="Quantize in these layers only.")
@click.option(
    "--input-scale",
    type=click.Choice(["one", "stats"]),
    help="Activation scales: 1.0 (default with --onto), or --stats.",
)
@click.option(
    "--stats", metavar="FILE", help="Input and KV maxima by hub module name (safetensors)."
)
@click.option(
    "--rest",
    type=click.Choice(["keep", "bf16"]),
    help="Quantized modules that the recipe leaves: keep their bytes or decode them; by default as engines read them.",
)
@click.option(
    "--kv",
    "kv_cache",
    type=click.Choice(["fp8", "fp8_cast"]),
    help="An FP8 KV cache: fp8 with scales from --stats, fp8_cast without.",
)
@click.option(
    "--expert-layout",
    type=click.Choice(["per-expert", "hub"]),
    help="Of a source with stacked experts: how they are written; by default as engines read its family.",
)
@click.option(
    "--calibrate-texts",
    metavar="FILE",
    multiple=True,
    help="Calibrate first, on these texts; what follows after -- goes to calibrate.",
)
@click.option(
    "--preview",
    "prompts",
    metavar="FILE",
    help="Then let both models go on from these prompts, side by side.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@OVERWRITE
@WORKERS
@REPORT
@click.argument("more", nargs=-1, metavar="[-- CALIBRATE OPTIONS]", type=click.UNPROCESSED)
@click.pass_context
def export(
    ctx: click.Context,
    source: str,
    out: str,
    recipe: str,
    onto: str | None,
    layers: str | None,
    input_scale: str | None,
    stats: str | None,
    rest: str | None,
    kv_cache: str | None,
    expert_layout: str | None,
    calibrate_texts: tuple[str, ...],
    prompts: str | None,
    dry_run: bool,
    overwrite: bool,
    workers: int | None,
    report_file: Path | None,
    more: tuple[str, ...],
) -> None:
    """Quantize the checkpoint in SOURCE into the folder OUT, file to file, and check what was
    written.
    """
    import exporter  # noqa: PLC0415  (torch costs a second, and --help does not need it)

    given: dict[str, Any] = {
        "recipe": recipe,
        "onto": onto,
        "layers": layers,
        "input_scale": input_scale,
        "stats": stats,
        "rest": rest,
        "kv_cache": kv_cache,
        "expert_layout": expert_layout,
    }
    if more and not calibrate_texts:
        raise UsageError(
            f"{' '.join(more)}: what follows OUT goes to calibrate, and there is no --calibrate-texts"
        )
    if calibrate_texts:
        from exporter.cli.calibrate import within_export  # noqa: PLC0415  (of use here only)

        given["stats"] = within_export(
            source, out, recipe, calibrate_texts, more, given, overwrite, dry_run
        )
    if dry_run:
        click.echo(describe(exporter.plan_export(source, **given)), nl=False)
        return
    _require_writable(report_file, out)
    read = read_prompts(prompts) if prompts is not None else []
    with progress_bar("writing", in_bytes=True) as draw:
        progress = (
            None if draw is None else _sums(draw, exporter.plan_export(source, **given).nbytes)
        )
        manifest = exporter.export(
            source, out, overwrite=overwrite, workers=workers, progress=progress, **given
        )
    code = _finish(manifest, out, base=source, merged_from=onto, report_file=report_file)
    if read:
        show_preview(source, out, read, report_file)
    ctx.exit(code)


@click.command()
@click.argument("experts")
@click.argument("out")
@click.option(
    "--onto",
    metavar="VENDOR",
    required=True,
    help="The checkpoint that everything else is kept from.",
)
@click.option(
    "--input-scale", type=click.Choice(["keep", "one"]), default="keep", show_default=True
)
@OVERWRITE
@WORKERS
@REPORT
@click.pass_context
def merge(
    ctx: click.Context,
    experts: str,
    out: str,
    onto: str,
    input_scale: str,
    overwrite: bool,
    workers: int | None,
    report_file: Path | None,
) -> None:
    """Move the quantized routed experts of EXPERTS onto VENDOR's checkpoint, byte for byte, into
    OUT.
    """
    import exporter  # noqa: PLC0415  (as above)

    _require_writable(report_file, out)
    manifest = exporter.merge(
        experts,
        out,
        onto=onto,
        input_scale=input_scale,  # type: ignore[arg-type]
        overwrite=overwrite,
        workers=workers,
    )
    ctx.exit(_finish(manifest, out, base=None, merged_from=onto, report_file=report_file))


def describe(plan: Plan) -> str:
    """Return a plan as text: what is quantized, kept and left, and the exact size of the result."""
    layers = {m.split(".layers.")[1].split(".")[0] for m in plan.modules if ".layers." in m}
    lines = [
        f"{plan.kind} {plan.name}: {plan.source.uri}"
        + (f" onto {plan.onto.uri}" if plan.onto else "")
    ]
    stacked = plan.stacked()
    for algo, count in sorted(plan.formats().items()):
        lines.append(
            f"  quantize  {count:,} linears ({stacked[algo]:,} stacked) to {algo} in {len(layers)} layers"
        )
    for (read, written), count in sorted(plan.requantized().items()):
        kind = "decode" if written == "BF16" else "re-quantized"
        lines.append(f"  {kind:9} {count:,} modules from {read} to {written}")
    if "expert_layout" in plan.options:
        how = (
            "in stacks, as the hub has them"
            if plan.options["expert_layout"] == "hub"
            else "one by one"
        )
        lines.append(f"  experts   {how}")
    copies = [a for a in plan.actions if hasattr(a, "origin")]
    lines.append(f"  keep      {len(copies):,} tensors byte for byte from {plan.kept.uri}")
    reasons: dict[str, int] = {}
    for origin, _, reason in plan.left:
        reasons[f"{origin}, {reason}"] = reasons.get(f"{origin}, {reason}", 0) + 1
    lines += [f"  leave     {n:,} tensors ({why})" for why, n in reasons.items()]
    lines.append(f"  result    {len(plan.specs):,} tensors, {plan.nbytes:,} bytes")
    lines.append("nothing was written (dry run)")
    return "\n".join(lines) + "\n"


def _sums(draw: Callable[[int, int], None], total: int) -> Callable[[int], None]:
    """Return a callback that takes bytes as they are written, and draws their sum."""
    written, lock = 0, threading.Lock()

    def add(more: int) -> None:
        nonlocal written
        with lock:  # shards are written by threads
            written += more
            draw(written, total)

    return add


def _require_writable(report_file: Path | None, out: str) -> None:
    """Refuse a report path that cannot be written, before an export runs for hours; make its
    folder.

    Raises:
        UsageError: the path is a folder, or its folder cannot be made or written to.
    """
    if report_file is None:
        return
    folder, target = report_file.parent, Path(out).resolve()
    if report_file.resolve() == target:
        raise UsageError(f"{report_file}: is OUT; --report takes a file")
    if folder.resolve().is_relative_to(target):
        return  # only the export makes OUT
    try:
        folder.mkdir(parents=True, exist_ok=True)
        is_folder = report_file.is_dir()
    except OSError as error:
        raise UsageError(f"{report_file}: its folder cannot be made") from error
    if is_folder or not os.access(report_file if report_file.exists() else folder, os.W_OK):
        raise UsageError(
            f"{report_file}: {'a folder' if is_folder else 'cannot be written'}; --report takes a file"
        )


def _finish(
    manifest: Manifest,
    out: str,
    *,
    base: str | None,
    merged_from: str | None,
    report_file: Path | None,
) -> int:
    """Print the summary, check what was written, and return the check's exit code."""
    import verifier  # noqa: PLC0415  (numpy)
    from verifier.report import render_json, render_text  # noqa: PLC0415

    lines = [f"wrote {out}: {manifest.tensors:,} tensors, {manifest.bytes:,} bytes"]
    here, ranges, linears = (
        manifest.notes.get(n, {}) for n in ("quantized_here", "scale_range", "linears")
    )
    for algo, count in sorted(manifest.formats.items()):
        made = here.get(algo, 0)
        scale = f", scales {ranges[algo][0]} to {ranges[algo][1]}" if algo in ranges else ""
        lines.append(
            f"  {algo:12} {count:,} modules ({made:,} quantized here, {count - made:,} kept){scale}"
        )
        if algo in linears:
            done, of, stacked = linears[algo]
            how = manifest.options.get("calibration") if "NVFP4" in algo else "max"
            lines.append(
                f"  {'':12} {done:,} of {of:,} linears ({stacked:,} stacked) calibrated by {how}"
            )
    for pair, count in manifest.notes.get("requantized", {}).items():
        lines.append(
            f"  {'decoded' if pair.endswith('BF16') else 're-quantized':12} {count:,} modules from {pair}"
        )
    for same, blocks in manifest.notes.get("mxfp4_blocks", {}).values():
        lines.append(
            f"  MXFP4        {same:,} of {blocks:,} blocks carried over without loss, {blocks - same:,} not"
        )
    click.echo("\n".join(lines))
    report = verifier.check(out, base=base, merged_from=merged_from, depth="payload")
    click.echo(render_text(report), nl=False)
    if report_file is not None:
        value = {
            "manifest": manifest.model_dump(mode="json"),
            "check": json.loads(render_json(report)),
        }
        report_file.parent.mkdir(
            parents=True, exist_ok=True
        )  # one inside OUT could not be made before
        report_file.write_text(json.dumps(value, indent=2) + "\n")
    return report.exit_code
