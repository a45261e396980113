# SPDX-License-Identifier: Apache-2.0
"""``ckptgate repair``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from exporter.cli.output import (
    WRITING_RENAMED,
    check_result,
    require_inputs,
    require_report_file,
    writing_bar,
    writing_options,
)
from verifier.cli.spellings import RenamedOptions
from verifier.text import counted


@click.command(
    cls=RenamedOptions,
    renamed=WRITING_RENAMED,
    short_help="Fix names, expert layout and configs without re-quantizing.",
)
@click.argument("broken")
@click.argument("out")
@click.option(
    "--base",
    metavar="REF",
    required=True,
    help="The checkpoint that BROKEN was made from, in hub layout.",
)
@click.option("--dry-run", is_flag=True, help="Print what would be done and write nothing.")
@writing_options
@click.pass_context
def repair(
    ctx: click.Context,
    broken: str,
    out: str,
    base: str,
    dry_run: bool,
    overwrite: bool,
    workers: int | None,
    report_file: Path | None,
) -> None:
    """Fix names, expert layout and configs of the export BROKEN without re-quantizing, into OUT.

    No quantized byte changes. What cannot be known is refused (exit 1) before anything is written.
    OUT is then checked against REF.
    """
    require_inputs(out, broken, base, overwrite=overwrite or dry_run)
    require_report_file(report_file, out)
    import exporter  # noqa: PLC0415  (torch costs a second, and a wrong call does not need it)

    if dry_run:
        diagnosis = exporter.plan_repair(broken, base=base)
        plan = diagnosis.repair.plan
        lines = [f"repair {broken} against {base}", *describe(diagnosis.summary())]
        lines.append(f"  result       {counted(len(plan.specs), 'tensor')}, {plan.nbytes:,} bytes")
        click.echo("\n".join([*lines, "nothing was written (dry run)"]))
        return
    plan = exporter.plan_repair(broken, base=base).repair.plan
    with writing_bar(plan.nbytes) as progress:
        manifest = exporter.repair(
            broken, out, base=base, overwrite=overwrite, workers=workers, progress=progress
        )
    unchanged: dict[str, Any] = manifest.notes["unchanged"]
    lines = [f"wrote {out}: {counted(manifest.tensors, 'tensor')}, {manifest.bytes:,} bytes"]
    lines += describe(manifest.notes["repair"])
    lines.append(
        f"  sha256       {unchanged['sha256_before']} of "
        f"{counted(unchanged['quantized_tensors'], 'quantized tensor')} before"
    )
    lines.append(f"               {unchanged['sha256_after']} after: equal, tensor by tensor")
    if unchanged["stacks"]:
        lines.append(
            f"{'':15}{counted(unchanged['stacks'], 'stack')} re-assembled from their parts: equal"
        )
    click.echo("\n".join(lines))
    result = check_result(manifest, out, base=base, report_file=report_file)
    ctx.exit(result.exit_code)


def describe(summary: dict[str, Any]) -> list[str]:
    """Return the lines of what a repair does; ``summary`` is that of `Diagnosis` or of the
    manifest.
    """
    kept, compared = summary["kept"]
    more = f", {compared:,} compared with the base" if compared else ""
    lines = [f"  keep         {counted(kept, 'quantized tensor')}, byte for byte{more}"]
    count, names = summary["renamed"]
    if count:
        old, new = next(iter(names.items()))
        lines.append(f"  rename       {counted(count, 'tensor')} ({old} to {new} first)")
    count, parts, names = summary["split"]
    if count:
        stack, into = next(iter(names.items()))
        lines.append(
            f"  split        {counted(count, 'stacked or fused tensor')} into {parts:,} "
            f"({stack} to {into[0]} first)"
        )
    count, names = summary["replaced"]
    if count:
        first = ", ".join(f"{name} ({how})" for name, how in list(names.items())[:3])
        lines.append(
            f"  replace      {counted(count, 'unquantized tensor')} different from the base's: "
            f"{first}"
        )
    count, names = summary["from_base"]
    if count:
        lines.append(
            f"  add          {counted(count, 'missing tensor')} of the base: {', '.join(names[:3])}"
        )
    count, names = summary["dropped"]
    if count:
        lines.append(
            f"  drop         {counted(count, 'tensor')} without a place in a checkpoint: "
            f"{', '.join(names[:3])}"
        )
    declared = summary["described"]
    lines.append(
        f"  rewrite      index and configs: {declared['shown']} (declared: {declared['was']})"
    )
    for key, text in (
        ("dead", "exclusion"),
        ("absent", "quantized_layers key"),
    ):
        count, names = declared[key]
        if count:
            lines.append(
                f"  drop         {counted(count, text)} without a module: {', '.join(names)}"
            )
    return lines
