# SPDX-License-Identifier: Apache-2.0
"""``ckptgate export`` and ``ckptgate merge``."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from exporter.cli.calibrate import calibrate_within_export
from exporter.cli.output import (
    NO_CHECK,
    SHARD_SIZE,
    UNCHECKED,
    WRITING_RENAMED,
    check_result,
    left_out,
    require_inputs,
    require_report_file,
    write_in_units,
    writers_given,
    writing_bar,
    writing_options,
)
from exporter.cli.preview import print_preview, read_prompts
from verifier.cli.options import RUNNERS
from verifier.cli.spellings import RenamedOptions
from verifier.errors import UsageError
from verifier.text import counted

if TYPE_CHECKING:
    from exporter.plan import Plan
    from verifier.manifest import Manifest


@click.command(
    cls=RenamedOptions,
    renamed=WRITING_RENAMED,
    short_help="Quantize a checkpoint file to file, and check the result.",
)
@click.argument("source")
@click.argument("out")
@click.option("--recipe", required=True, help="Name of a recipe, or a YAML file.")
@click.option(
    "--onto",
    metavar="BASE",
    help="Keep every module that is not selected from this checkpoint (mixed export).",
)
@click.option("--layers", metavar="3-59", help="Quantize in these layers only.")
@click.option(
    "--input-scale",
    type=click.Choice(["one", "stats"]),
    help="Activation scales: 1.0 (default with --onto), or from --stats.",
)
@click.option(
    "--stats", metavar="FILE", help="Input and KV maxima by hub module name (safetensors)."
)
@click.option(
    "--rest",
    type=click.Choice(["keep", "bf16"]),
    help="Quantized modules that the recipe does not select: keep their bytes, or decode them. "
    "[default: keep formats that engines read together with the recipe's]",
)
@click.option(
    "--kv",
    "kv_cache",
    type=click.Choice(["fp8", "fp8_cast"]),
    help="An FP8 KV cache: fp8 with scales from --stats, fp8_cast without scales.",
)
@click.option(
    "--expert-layout",
    type=click.Choice(["per-expert", "hub"]),
    help="How to write experts that SOURCE holds in stacks. [default: as engines read its family]",
)
@click.option(
    "--for",
    "engine",
    type=click.Choice(["vllm", "sglang", "trtllm", "none"]),
    help="The engine that has to load OUT; none: write what the recipe says, whether any engine "
    "loads it or not. [default: vLLM and SGLang]",
)
@click.option(
    "--calibrate-texts",
    metavar="FILE",
    multiple=True,
    help="Calibrate on these texts first; arguments after -- are passed to calibrate.",
)
@click.option(
    "--preview",
    "prompts",
    metavar="FILE",
    help="Print greedy completions of these prompts by SOURCE and OUT, side by side.",
)
@click.option("--dry-run", is_flag=True, help="Print the plan and write nothing.")
@NO_CHECK
@SHARD_SIZE
@writing_options
@RUNNERS
@click.argument("more", nargs=-1, metavar="[-- CALIBRATE OPTIONS]", type=click.UNPROCESSED)
@click.pass_context
def export(
    ctx: click.Context,
    /,
    source: str,
    out: str,
    calibrate_texts: tuple[str, ...],
    prompts: str | None,
    dry_run: bool,
    no_check: bool,
    more: tuple[str, ...],
    **options: Any,
) -> None:
    """Quantize the checkpoint SOURCE into the directory OUT, file to file, and check the result."""
    dividing = {name: options.pop(name) for name in ("units", "ray")}
    writing = {name: options.pop(name) for name in ("overwrite", "workers", "shard_bytes")}
    writers = writers_given(dividing, writing)
    report_file: Path | None = options.pop("report_file")
    if more and not calibrate_texts:
        raise UsageError(
            f"{' '.join(more)}: arguments after OUT are passed to calibrate, which needs "
            "--calibrate-texts"
        )
    require_inputs(
        out,
        source,
        options["onto"],
        # A part may find OUT made by the others.
        overwrite=writing["overwrite"] or dry_run or dividing["units"] is not None,
        recipe=options["recipe"],
    )
    require_report_file(report_file, out)
    prompt_list = read_prompts(prompts) if prompts is not None else []
    import exporter  # noqa: PLC0415  (torch costs a second, and a wrong call does not need it)

    if calibrate_texts:
        if dry_run:
            raise UsageError(
                "--calibrate-texts runs the model; use --dry-run with --stats or --input-scale one"
            )
        options["stats"] = calibrate_within_export(
            source, out, calibrate_texts, more, {**options, **writing}
        )
    if dry_run:
        click.echo(describe_plan(exporter.plan_export(source, **options)), nl=False)
        return
    notes = UNCHECKED if no_check else {}
    if writers is not None:
        arguments = {"source": source, **options}
        fields = {"notes": notes, "shard_bytes": writing["shard_bytes"]}
        manifest = write_in_units(writers, exporter.plan_export, arguments, out, fields)
    else:
        with writing_bar(exporter.plan_export(source, **options).nbytes) as progress:
            manifest = exporter.export(
                source, out, progress=progress, notes=notes, **writing, **options
            )
    if manifest is None:
        return
    click.echo("\n".join(describe_result(manifest, out)))
    if no_check:
        result = left_out(
            manifest, out, base=source, merged_from=options["onto"], report_file=report_file
        )
    else:
        result = check_result(
            manifest, out, base=source, merged_from=options["onto"], report_file=report_file
        )
    if prompt_list:
        result.write(preview=print_preview(source, out, prompt_list))
    ctx.exit(result.exit_code)


@click.command(
    cls=RenamedOptions,
    renamed=WRITING_RENAMED,
    short_help="Combine quantized experts with another checkpoint, without re-quantizing.",
)
@click.argument("experts")
@click.argument("out")
@click.option(
    "--onto",
    metavar="BASE",
    required=True,
    help="The checkpoint that everything else is kept from.",
)
@click.option(
    "--input-scale",
    type=click.Choice(["keep", "one"]),
    default="keep",
    show_default=True,
    help="Activation scales of the experts: keep them, or write 1.0.",
)
@NO_CHECK
@SHARD_SIZE
@writing_options
@RUNNERS
@click.pass_context
def merge(
    ctx: click.Context,
    /,
    experts: str,
    out: str,
    onto: str,
    input_scale: str,
    no_check: bool,
    overwrite: bool,
    workers: int | None,
    shard_bytes: int | None,
    report_file: Path | None,
    **dividing: str | None,
) -> None:
    """Copy the quantized routed experts of EXPERTS onto the checkpoint BASE, byte for byte, into
    OUT.
    """
    writers = writers_given(dividing, {"overwrite": overwrite, "workers": workers})
    require_inputs(out, experts, onto, overwrite=overwrite or dividing["units"] is not None)
    require_report_file(report_file, out)
    import exporter  # noqa: PLC0415  (as above)

    write = exporter.merge  # refuses where torch is missing
    manifest: Manifest | None
    notes = UNCHECKED if no_check else {}
    if writers is not None:
        from exporter.exporting import plan_merge_of  # noqa: PLC0415  (as above)

        arguments = {"experts": experts, "onto": onto, "input_scale": input_scale}
        fields = {"notes": notes, "shard_bytes": shard_bytes}
        manifest = write_in_units(writers, plan_merge_of, arguments, out, fields)
    else:
        with writing_bar(_merged_bytes(experts, onto)) as progress:
            manifest = write(
                experts,
                out,
                onto=onto,
                input_scale=input_scale,  # type: ignore[arg-type]
                overwrite=overwrite,
                workers=workers,
                shard_bytes=shard_bytes,
                progress=progress,
                notes=notes,
            )
    if manifest is None:
        return
    click.echo("\n".join(describe_result(manifest, out)))
    if no_check:
        result = left_out(manifest, out, merged_from=onto, report_file=report_file)
    else:
        result = check_result(manifest, out, merged_from=onto, report_file=report_file)
    ctx.exit(result.exit_code)


def _merged_bytes(experts: str, onto: str) -> int:
    from exporter.plan import merge as plan_merge  # noqa: PLC0415  (torch)
    from verifier.checkpoint import open_checkpoint  # noqa: PLC0415  (numpy)

    return plan_merge(open_checkpoint(experts), open_checkpoint(onto), input_scale="keep").nbytes


def describe_plan(plan: Plan) -> str:
    """Return a plan as text: what is quantized, kept and skipped, what is adapted for engines, and
    the exact size of the result.
    """
    import exporter.emit  # noqa: PLC0415  (torch)

    layers = {m.split(".layers.")[1].split(".")[0] for m in plan.modules if ".layers." in m}
    onto = f" onto {plan.onto.uri}" if plan.onto else ""
    lines = [f"{plan.kind} {plan.name}: {plan.source.uri}{onto}"]
    fused = plan.fused()
    for algo, count in sorted(plan.formats().items()):
        lines.append(
            f"  quantize  {counted(count, 'linear layer')} ({fused[algo]:,} after fusing) "
            f"to {algo} in {counted(len(layers), 'layer')}"
        )
    for (read, written), count in sorted(plan.requantized().items()):
        verb = "decode" if written == "BF16" else "re-quantize"
        lines.append(f"  {verb:9} {counted(count, 'module')} from {read} to {written}")
    if "expert_layout" in plan.options:
        hub = plan.options["expert_layout"] == "hub"
        lines.append(f"  experts   {'in stacks, as on the hub' if hub else 'individually'}")
    lines += [f"  adapted   {note}" for note in exporter.emit.adaptations(plan)]
    copies = sum(1 for action in plan.actions if hasattr(action, "origin"))
    lines.append(f"  copy      {counted(copies, 'tensor')} byte for byte from {plan.kept.uri}")
    reasons = Counter((origin, reason) for origin, _, reason in plan.skipped)
    for (origin, reason), count in reasons.items():
        lines.append(f"  skip      {counted(count, f'{origin} tensor')} ({reason})")
    lines.append(f"  result    {counted(len(plan.specs), 'tensor')}, {plan.nbytes:,} bytes")
    lines.append("nothing was written (dry run)")
    return "\n".join(lines) + "\n"


def describe_result(manifest: Manifest, out: str) -> list[str]:
    """Return the lines of what an export or merge wrote."""
    notes = manifest.notes
    lines = [f"wrote {out}: {counted(manifest.tensors, 'tensor')}, {manifest.bytes:,} bytes"]
    for algo, count in sorted(manifest.formats.items()):
        here = notes["quantized_here"].get(algo, 0)
        origin = f"{here:,} quantized now, {count - here:,} kept"
        line = f"  {algo:12} {counted(count, 'module')} ({origin})"
        if algo in notes["scale_range"]:
            low, high = notes["scale_range"][algo]
            line += f", scales {low} to {high}"
        lines.append(line)
        if algo in notes["linears"]:
            done, planned, fused = notes["linears"][algo]
            search = manifest.options.get("calibration") if "NVFP4" in algo else "max"
            lines.append(
                f"  {'':12} {done:,} of {counted(planned, 'linear layer')} "
                f"({fused:,} after fusing), scale search: {search}"
            )
    for pair, count in notes["requantized"].items():
        verb = "decoded" if pair.endswith("BF16") else "re-quantized"
        lines.append(f"  {verb:12} {counted(count, 'module')} from {pair}")
    lines += [f"  adapted      {note}" for note in notes["adapted"]]
    for equal, blocks in notes["mxfp4_blocks"].values():
        lines.append(
            f"  {'MXFP4':12} {equal:,} of {counted(blocks, 'block')} converted without loss, "
            f"{blocks - equal:,} with"
        )
    return lines
